"""Best-of-N with drafts: what is finished is best-of-N's, budgets hold, estimates are unbiased, runs resume."""

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.engine.test_drafting import REWARD, Bed, total
from tests.support import laws
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.core import two_phase
from treesearch.core.noise import root_key
from treesearch.errors import StoreError
from treesearch.methods.base import NO_NODES, Problem, Status
from treesearch.methods.two_phase import TwoPhaseSearch
from treesearch.results.result import SearchResult
from treesearch.testing import check_store
from treesearch.testing.methods import check_edges, check_noise

T = 12
BED = Bed()
RACES = {"search": ts.BestOfN(draft=3), "race": ts.BestOfN(draft=(2, 4)), "sampling": ts.BestOfN(draft=2, floor=0.2)}
every = pytest.mark.parametrize("method", RACES.values(), ids=RACES)


def run(method, nfe=1800, **how) -> SearchResult:
    return ts.search(BED, REWARD, method, budget=ts.Budget(nfe=nfe, **how), seed=4)


@every
def test_finished_samples_are_those_of_best_of_n_with_the_same_keys(method):
    found = run(method)
    plain = ts.search(BED, REWARD, ts.BestOfN(n=1000), seed=4)
    key, reward = plain.tree.key[plain.tasks[0].leaves], plain.rewards.numpy()
    of = {int(k): r for k, r in zip(key, reward, strict=True)}
    leaves = found.tasks[0].leaves
    assert len(leaves) < 150
    assert found.cost.draft_nfe > 0
    assert np.array_equal([of[int(k)] for k in found.tree.key[leaves]], found.tree.reward[leaves])
    assert len(np.unique(found.tree.key[leaves])) == len(leaves)
    check_edges(BED, found.tasks[0], seed=4)
    check_noise([found.tree], T)


@every
def test_budgets_hold_and_batches_change_nothing(method):
    found = run(method)
    assert 0.97 * 1800 < found.cost.nfe <= 1800
    assert found.cost.repeated_nfe == 0
    again = ts.search(BED, REWARD, method, budget=ts.Budget(nfe=1800), seed=4, batch_size=7)
    assert np.array_equal(again.tree.reward, found.tree.reward, equal_nan=True)
    few = run(method, reward_calls=70)
    assert few.cost.reward_calls <= 70
    assert few.cost.nfe <= 1800
    assert (run(method, iterations=30).tree.t == 0).sum() <= 30


@every
def test_tasks_are_searched_apart_and_a_run_resumes(method, tmp_path):
    two = ts.search(BED, REWARD, method, prompts=[0, 1], budget=ts.Budget(nfe=1600), seed=4)
    one = ts.search(BED, REWARD, method, prompts=[0], budget=ts.Budget(nfe=800), seed=4)
    assert np.array_equal(two.tasks[0].tree.reward, one.tasks[0].tree.reward, equal_nan=True)
    check_store(method, BED, REWARD, str(tmp_path / "a"), cuts=1, atol=0)
    ts.search(BED, REWARD, method, budget=ts.Budget(nfe=900), store=tmp_path / "b", seed=4)
    longer = ts.resume(tmp_path / "b", BED, REWARD, budget=ts.Budget(nfe=1300))
    assert 0.97 * 1300 < longer.cost.nfe <= 1300


def test_n_counts_candidates():
    """n = 60, 32 tasks: of what best-of-N draws most drafts are dropped, and mostly the best is kept.

    It is kept with a chance of .82, in 164 of 200 tasks. With .75 fewer than 17 of 32 keep it in one case of 500, with
    the .4 of dropping any at all 17 do in one of 10.
    """
    of = {"prompts": list(range(32)), "seed": 1}
    found = ts.search(BED, REWARD, ts.BestOfN(n=60, draft=3), **of)
    plain = ts.search(BED, REWARD, ts.BestOfN(n=60), **of)
    assert {task.status for task in found.tasks} == {Status.FINISHED}
    assert found.cost.reward_calls - sum(len(task.rewards) for task in found.tasks) == 32 * 60
    assert found.cost.nfe < 0.75 * plain.cost.nfe
    kept = 0
    for mine, whole in zip(found.tasks, plain.tasks, strict=True):
        assert set(mine.tree.key[mine.leaves]) < set(whole.tree.key[whole.leaves])
        assert mine.rewards.max() <= whole.rewards.max()
        kept += bool(mine.rewards.max() == whole.rewards.max())
    assert kept >= 17


def test_n_counts_drawn_candidates_of_a_weighed_search_too():
    weighed = ts.search(BED, REWARD, ts.BestOfN(n=400, draft=2, floor=0.1), seed=4)
    assert weighed.status == Status.FINISHED
    assert weighed.cost.nfe < 0.6 * 400 * T
    assert sum(count for count, _ in weighed.diagnostics["waves"]) == 400
    few = ts.search(BED, REWARD, ts.BestOfN(n=400, draft=2, floor=0.1), budget=ts.Budget(iterations=100), seed=4)
    assert sum(count for count, _ in few.diagnostics["waves"]) == 100
    assert few.status == Status.BUDGET


@pytest.mark.parametrize("draft", [(2, 4), (10, 11), 11])
def test_every_budget_that_pays_for_a_rollout_has_a_sample(draft):
    method = ts.BestOfN(draft=draft)
    for nfe in range(T, 420, 29):
        found = ts.search(BED, REWARD, method, budget=ts.Budget(nfe=nfe), seed=3)
        assert len(found.rewards) > 0
        assert nfe - 2 * T < found.cost.nfe <= nfe
        assert found.tree.t[-1] == 0  # no draft without the means to finish one
    for calls in (1, 2, 3, 7, 31):
        found = ts.search(BED, REWARD, method, budget=ts.Budget(reward_calls=calls), seed=3)
        assert len(found.rewards) > 0
        assert found.cost.reward_calls <= calls
        assert found.tree.t[-1] == 0


def test_a_run_that_began_with_a_smaller_budget_goes_on(tmp_path):
    ts.search(BED, REWARD, ts.BestOfN(draft=(2, 4)), budget=ts.Budget(nfe=T + 1), store=tmp_path, seed=3)
    found = ts.resume(tmp_path, BED, REWARD, budget=ts.Budget(nfe=900))
    assert found.cost.draft_nfe > 0
    assert found.cost.nfe > 880


class Rare:
    """Few samples are allowed."""

    def __init__(self, least):
        self.least = least

    def __call__(self, x, prompts):
        of = total(x, prompts)
        return torch.where(of > self.least, of, -torch.inf)


@pytest.mark.parametrize("method", [RACES["search"], RACES["race"]], ids=["search", "race"])
def test_where_nothing_is_finite_candidates_are_finished_until_something_is(method):
    found = ts.search(BED, Rare(5.0), method, budget=ts.Budget(nfe=3000), seed=1)
    plain = ts.search(BED, Rare(5.0), ts.BestOfN(), budget=ts.Budget(nfe=3000), seed=1)
    assert not plain.rewards[:40].isfinite().any()
    assert plain.rewards[:200].isfinite().any()
    assert found.rewards.max().isfinite()
    assert found.cost.nfe > 3000 - T
    never = ts.search(BED, Rare(1e9), method, budget=ts.Budget(nfe=6000), seed=1)
    assert never.cost.nfe > 6000 - T
    assert never.cost.draft_nfe <= 16 * 6


def constant(x, prompts):
    return torch.zeros(len(x))


NOTHING_LEARNT = "drafted samples carry weight"


@pytest.mark.parametrize(
    ("reward", "method", "nfe", "most", "why"),
    [
        (constant, ts.BestOfN(draft=3, floor=0.2), 6000, 100, NOTHING_LEARNT),
        (Rare(1e9), ts.BestOfN(draft=3, floor=0.2), 6000, 100, NOTHING_LEARNT),
        (Rare(4.0), ts.BestOfN(draft=3, floor=0.2), 1800, 110, NOTHING_LEARNT),
        (REWARD, ts.BestOfN(draft=3, floor=1.0), 1800, 0, "floor is 1"),
        (REWARD, ts.BestOfN(draft=3, floor=0.2, lam=0), 1800, 0, "λ = 0"),
        (REWARD, ts.BestOfN(draft=3, floor=0.2), 600, 0, "fewer than 64 rollouts"),
        (REWARD, ts.BestOfN(draft=11, floor=0.2), 1800, 360, "too little of the samples for their price"),
    ],
)
def test_drafts_that_decide_nothing_are_not_made_and_said_to_decide_nothing(reward, method, nfe, most, why):
    found = ts.search(BED, reward, method, budget=ts.Budget(nfe=nfe), seed=4)
    said = [text for text in found.diagnostics["warnings"] if "drafts decided nothing" in text]
    assert len(said) == 1
    assert why in said[0]
    assert found.cost.draft_nfe <= most
    assert not found.diagnostics["drafted"][-1]


def test_drafts_that_decide_something_are_not_complained_of():
    assert not any("drafts" in text for text in run(RACES["sampling"]).diagnostics["warnings"])


def test_good_drafts_find_more_than_best_of_n():
    """Expected scores of the best of as many as the budget pays for, over seeds."""
    nfe, found = 1800, []
    for seed in range(5):
        mine = ts.search(BED, REWARD, ts.BestOfN(draft=2), budget=ts.Budget(nfe=nfe), seed=seed)
        plain = ts.search(BED, REWARD, ts.BestOfN(), budget=ts.Budget(nfe=nfe), seed=seed)
        found.append(float(mine.rewards.max() - plain.rewards.max()))
    assert np.mean(found) > 0
    assert sum(f >= 0 for f in found) >= 4


def blind(x, prompts):
    """A reward that no draft predicts."""
    return torch.sin(1e4 * x.double().flatten(1).sum(1))


@pytest.mark.parametrize("method", [RACES["search"], RACES["sampling"]], ids=["search", "sampling"])
def test_drafts_that_predict_nothing_are_switched_off(method):
    found = ts.search(BED, blind, method, budget=ts.Budget(nfe=1800), seed=4)
    assert found.cost.draft_nfe <= 0.06 * 1800
    assert len(found.rewards) >= 0.93 * 1800 // T


def test_over_seeds_drafts_that_predict_nothing_cost_little_and_good_ones_are_made():
    """12 tasks: 16 trials are 1.6 % of a budget, the 64 of a plan in doubt 6.4 %; without the doubt it was a tenth."""
    of = {"prompts": list(range(12)), "budget": ts.Budget(nfe=12 * 3000), "seed": 9, "batch_size": laws.WIDE}
    found = ts.search(BED, blind, ts.BestOfN(draft=3), **of)
    assert found.cost.draft_nfe <= 0.07 * found.cost.nfe
    good = ts.search(BED, REWARD, ts.BestOfN(draft=3), **of)
    assert sum(task.diagnostics["drafts"][3] > 300 for task in good.tasks) >= 11


def test_the_estimate_is_unbiased_and_its_interval_covers(monkeypatch):
    """Reward Σ x_0, Gaussian: Z in closed form. Two in five are finished, whether that pays or not."""
    monkeypatch.setattr(two_phase, "share", lambda *given: 0.4)
    bed = GaussianStates(torch.zeros(3, 2).double(), torch.eye(6).double(), num_steps=T)
    lam, (mean, cov) = 0.3, bed.law
    log_z = float(lam * mean.sum() + 0.5 * lam**2 * cov.sum())
    found = ts.search(
        bed,
        REWARD,
        ts.BestOfN(draft=3, floor=0.2, lam=lam),
        prompts=list(range(160)),
        budget=ts.Budget(nfe=160 * 1200),
        batch_size=laws.WIDE,
    )
    laws.unbiased([np.exp(task.log_z - log_z) for task in found.tasks])
    assert all(finished < 0.5 * drawn for drawn, finished in found.tasks[0].diagnostics["waves"][2:])
    weights = [np.exp(task.log_weights.numpy() - log_z) for task in found.tasks]
    tops = np.array([np.mean(w * task.rewards.numpy()) for w, task in zip(weights, found.tasks, strict=True)])
    z = np.array([w.mean() for w in weights])
    gap = tops - (mean.sum() + lam * cov.sum()).item() * z  # draws have the mean of π
    assert abs(gap.mean()) < 4 * gap.std() / len(z) ** 0.5
    assert gap.std() / len(z) ** 0.5 < 0.05
    bounds = [task.certificate().log_z for task in found.tasks]
    assert all(b.standing == "ok" for b in bounds)
    assert found.cost.draft_nfe > 0
    assert np.mean([b.low <= log_z <= b.high for b in bounds]) >= 0.88


def searched(monkeypatch, bed, method, tasks, nfe):
    """A search, with the state that each task ended in."""
    begun: list[TwoPhaseSearch] = []
    start = ts.BestOfN.start
    monkeypatch.setattr(ts.BestOfN, "start", lambda self, problem: begun.append(start(self, problem)) or begun[-1])
    ts.search(bed, REWARD, method, prompts=list(range(tasks)), budget=ts.Budget(nfe=nfe * tasks), seed=4)
    return begun


def test_pairs_stand_for_all_that_were_drafted(monkeypatch):
    """Horvitz-Thompson: the mean draft of the pairs is that of all drafts, though good ones are finished more often."""
    monkeypatch.setattr(two_phase, "share", lambda *given: 0.4)
    given: list[two_phase.Pairs] = []
    fit = two_phase.fit
    monkeypatch.setattr(two_phase, "fit", lambda pairs: given.append(pairs) or fit(pairs))
    weighed, alike = [], []
    for search in searched(monkeypatch, BED, ts.BestOfN(draft=3, floor=0.2), 12, 3000):
        search._fit()
        u, _, log_mass = given[-1]
        mass = np.exp(log_mass)
        truth = sum(share * wave.u.mean() for wave, share in zip(search.waves, search._shares(), strict=True))
        weighed.append(mass @ u - truth * mass.sum())
        alike.append(u.mean() - truth)
        assert mass.sum() == pytest.approx(1.0, abs=0.1)
    assert abs(np.mean(weighed)) < 4 * np.std(weighed) / 12**0.5
    assert np.mean(alike) > 10 * np.std(weighed) / 12**0.5


def test_what_a_wave_is_fitted_by_was_seen_before_it(monkeypatch):
    """Ẑ_k is linear in the wave's own weights: they change no m and no π."""
    monkeypatch.setattr(two_phase, "share", lambda *given: 0.4)
    (search,) = searched(monkeypatch, BED, ts.BestOfN(draft=3, floor=0.2), 1, 3000)
    last, before = search.waves[-1], _waves(search)
    assert last.drafted
    assert last.finish < last.count
    search.tree.reward[last.leaves] += 1.0
    again = TwoPhaseSearch(search.problem, None, 1.0, 3, 0.2)
    again.tree = search.tree
    again.restore(search.state(), NO_NODES)
    moved = np.expm1(1.0) * np.exp(last.log_w) / last.pi[last.chosen]
    assert _waves(again)[:-1] == before[:-1]
    assert np.exp(_waves(again)[-1]) - np.exp(before[-1]) == pytest.approx(moved.sum() / last.count, rel=1e-9)


def _waves(search):
    return search.readout().extra["log_z_waves"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draft": 1}, "draft is 1, expected"),
        ({"draft": 2.5}, "draft is 2.5, expected"),
        ({"draft": (5, 3)}, r"draft is \(5, 3\), expected"),
        ({"draft": True}, "draft is True, expected"),
        ({"draft": ()}, r"draft is \(\), expected"),
        ({"draft": []}, r"draft is \(\), expected"),
        ({"draft": 3, "floor": 0.0}, r"floor is 0\.0, expected"),
        ({"draft": 3, "floor": float("nan")}, "floor is nan, expected"),
        ({"floor": 0.1}, "use it with one draft"),
        ({"draft": (2, 4), "floor": 0.1}, "use it with one draft"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ts.BestOfN(**wrong)


@pytest.mark.parametrize("method", [ts.TreeSampling, ts.FeynmanKac, ts.TreeSearch])
@pytest.mark.parametrize("draft", [(2, 4), (), 1, 2.5, True])
def test_methods_of_one_draft_ask_for_one_number(method, draft):
    with pytest.raises(ValueError, match="expected one number"):
        method(draft=draft, **({"value": "draft"} if method is ts.FeynmanKac else {}))


def test_a_kernel_that_cannot_draft_is_refused():
    with pytest.raises(ValueError, match="no `chain`"):
        ts.search(LinearGaussian(), lambda x: x[:, 0], ts.BestOfN(draft=2), budget=ts.Budget(nfe=500))
    with pytest.raises(ValueError, match="13 evaluations, expected"):
        ts.search(BED, REWARD, ts.BestOfN(draft=13), budget=ts.Budget(nfe=500))


@every
@pytest.mark.parametrize("column", ["parent", "key"])
def test_records_that_no_search_leaves_are_refused(method, column):
    problem = Problem(0, describe(BED), root_key(4, 0), ts.Budget(nfe=1200).share(1))
    found, again = run(method, 1200).tree, method.start(problem)
    again.tree.append(found.parent[1:], found.t[1:], found.key[1:])
    again.tree.reward[:] = found.reward
    again.tree.parent[-1] = 1
    if column == "key":
        again.tree.key[-1] += np.uint64(1)
    search = method.start(problem)
    with pytest.raises((StoreError, ValueError), match="damaged"):
        again.restore(search.state(), NO_NODES)
