"""Rejection, SVDD, Feynman-Kac on rollouts and DAS against closed forms; the presets of the experiments."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import treesearch as ts
from experiments.shared.baselines import BASELINES, Settings
from tests.support import laws
from tests.support.beds import BEDS
from tests.support.laws import unbiased
from treesearch.backends.base import describe
from treesearch.backends.exact.enumerable import DiscreteChain
from treesearch.backends.exact.gaussian import Tilt
from treesearch.backends.guidance import DAS, TDS
from treesearch.citations import bibtex
from treesearch.cli.main import main
from treesearch.core.tree import ROOT
from treesearch.core.weights import ess, log_mean
from treesearch.errors import KernelError
from treesearch.methods.base import NOT_OF_PI
from treesearch.methods.feynman_kac import FeynmanKacSearch
from treesearch.methods.svdd import BIASED, Choice
from treesearch.registry import registry as specs
from treesearch.rewards.analytic import linear, quadratic, table
from treesearch.rewards.base import RewardError
from treesearch.testing import bare_chain, check_kernel, check_method, check_store

BED, CHAIN = BEDS["gaussian"], DiscreteChain.random()
VALUES = [-2.0, -1.0, -0.5, 0.0]
TABLE, P, STEPS = table(VALUES), np.array(CHAIN.prior_probs), np.array(CHAIN.steps)
QUADRATIC, TILT = quadratic(1.5, 1.5), Tilt(k=1.5, y=1.5)
LOG_Z = BED.tilted(TILT).log_z
ROLLOUT = {"num_particles": 8, "value": "rollout"}


def search(kernel, reward, method, **how):
    how.setdefault("budget", ts.Budget(nfe=400))
    return ts.search(kernel, reward, method, batch_size=laws.WIDE, **how)


def base_law():
    """p(x_0) of the discrete chain."""
    law = P
    for step in STEPS[::-1]:
        law = law @ step
    return law


def follows(states, law, *others):
    """Independent states have the given law: each share within 4 standard errors of at most 1 %; others are 10 off."""
    share = np.bincount(states, minlength=len(law)) / len(states)
    se = np.sqrt(law * (1 - law) / len(states))
    assert se.max() <= 0.01
    assert np.abs((share - law) / se).max() < 4, (share, law)
    for other in others:
        assert np.abs((other - law) / se).max() > 10, (other, law)


def independent_z(result, log_z):
    """Ẑ/Z of each population, from the samples that carry weight."""
    sizes, log_w = result.diagnostics["populations"], result.log_weights.numpy()
    final = log_w[log_w > -math.inf]
    final = final - math.log(len(log_w) / len(final))
    return np.exp([log_mean(part) - log_z for part in np.split(final, np.cumsum(sizes)[:-1])])


# Rejection.


def test_rejection_draws_are_draws_of_the_target():
    target = CHAIN.tilted(torch.tensor(VALUES), 1.5)
    result = search(CHAIN, TABLE, ts.Rejection(lam=1.5), budget=ts.Budget(iterations=12_000), seed=1)
    accepted = result.samples[result.log_weights > -math.inf, 0].numpy()
    follows(accepted, target.posterior.numpy(), base_law())
    assert abs(result.log_z - target.log_z) < 4 * result.log_z_se < 0.1
    assert result.diagnostics["accepted"] == len(accepted)
    assert result.diagnostics["acceptance_rate"] == pytest.approx(math.exp(result.log_z))


def test_a_loose_bound_costs_draws_and_keeps_the_law():
    tight, loose = (
        search(BED, QUADRATIC, ts.Rejection(r_max=bound), budget=ts.Budget(iterations=20_000)) for bound in (0.0, 1.0)
    )
    for result, bound in ((tight, 0.0), (loose, 1.0)):
        draws, exact = result.samples[result.log_weights > -math.inf, 0], BED.tilted(TILT)
        assert abs(draws.mean() - exact.mean) < 4 * exact.std / len(draws) ** 0.5
        assert abs(draws.std() / exact.std - 1) < 4 / (2 * len(draws)) ** 0.5
        assert result.diagnostics["acceptance_rate"] == pytest.approx(math.exp(exact.log_z - bound), rel=0.05)
        assert abs(result.log_z - exact.log_z) < 4 * result.log_z_se
        assert log_mean(result.log_weights.numpy()) == pytest.approx(result.log_z)
    assert tight.diagnostics["accepted"] > 2 * loose.diagnostics["accepted"]


def test_rejection_estimates_z_without_bias_and_knows_its_error():
    n = 400
    budget = ts.Budget(iterations=50 * n)
    tasks = search(BED, QUADRATIC, ts.Rejection(), prompts=list(range(n)), budget=budget).tasks
    z = np.exp([task.log_z - LOG_Z for task in tasks])
    unbiased(z)
    assert np.mean([task.log_z_se for task in tasks]) == pytest.approx(z.std(), rel=0.15)


def test_rejection_keeps_the_rollouts_of_best_of_n_and_accepts_all_at_lambda_zero():
    best = search(BED, QUADRATIC, ts.BestOfN(n=50))
    some, every = (search(BED, QUADRATIC, ts.Rejection(n=50, lam=lam)) for lam in (1.0, 0.0))
    assert torch.equal(best.samples, some.samples)
    assert 0 < some.diagnostics["accepted"] < 50
    assert every.diagnostics["accepted"] == 50
    assert every.log_z == 0.0


def test_a_reward_above_the_bound_is_named():
    with pytest.raises(RewardError, match=r"reward 2\.\d+ of node \d+ is above r_max = 0 "):
        search(BED, linear(1.0), ts.Rejection())
    with pytest.raises(ValueError, match="finite upper bound"):
        ts.Rejection(r_max=math.inf)


def test_rejection_refuses_weighted_samples(drifting):
    with pytest.raises(KernelError, match="log p/q"):
        search(drifting, QUADRATIC, ts.Rejection())


# SVDD.


def picked_law(law, value, m, lam):
    """Law of the candidate picked among m draws of `law`, a candidate's weight being exp(λ value)."""
    out = np.zeros(len(law))
    for drawn in itertools.product(range(len(law)), repeat=m):
        v = value[list(drawn)]
        w = (v == v.max()) / (v == v.max()).sum() if math.isinf(lam) else np.exp(lam * v) / np.exp(lam * v).sum()
        np.add.at(out, list(drawn), law[list(drawn)].prod() * w)
    return out


def svdd_law(m, lam):
    """Law of SVDD's sample on the discrete chain with every level scheduled."""
    endpoint, t = CHAIN._endpoint.numpy(), CHAIN.num_steps
    values = np.array(VALUES)
    law = picked_law(P, values[endpoint[t]], m, lam)
    for level in range(t - 1, -1, -1):
        law = law @ np.stack([picked_law(row, values[endpoint[level]], m, lam) for row in STEPS[level]])
    return law


@pytest.mark.parametrize(("m", "lam"), [(2, 1.5), (3, 1.5), (3, math.inf), (3, 0.0)])
def test_svdd_has_the_law_of_its_algorithm(m, lam):
    n, method = 3_000, ts.SVDD(candidates=m, lam=lam, schedule=(3, 2, 1, 0))
    result = search(CHAIN, TABLE, method, budget=ts.Budget(iterations=n))
    assert result.cost.nfe == n * m * CHAIN.num_steps
    states = result.samples[result.log_weights > -math.inf, 0].numpy()
    assert len(states) == n
    others = [] if lam == 0 else [base_law(), svdd_law(m, 0.5 if math.isinf(lam) else 3 * lam)]
    follows(states, svdd_law(m, lam), *others)
    assert result.log_z is None
    assert result.diagnostics["warnings"] == [NOT_OF_PI if math.isinf(lam) else BIASED]


def test_svdd_with_one_candidate_is_the_base_sampler():
    result = search(BED, QUADRATIC, ts.SVDD(candidates=1))
    assert torch.equal(result.samples, bare_chain(BED, 80)[-1])
    assert not result.log_weights.any()


def test_greedy_svdd_goes_on_from_the_best_candidate():
    result = search(BED, linear(1.0), ts.SVDD(candidates=5, lam=math.inf), budget=ts.Budget(iterations=6))
    tree = result.tree
    for level in (4, 3, 2, 1):
        for candidates in np.split(np.flatnonzero(tree.t == level), 6):
            best = candidates[tree.reward[candidates].argmax()]
            assert tree.children[best] == 5
            assert tree.children[candidates].sum() == 5
    chosen = result.rewards.reshape(6, 5).argmax(1)
    assert (result.log_weights.reshape(6, 5).argmax(1) == chosen).all()
    assert result.best(1)[1] == result.rewards.max()


def test_svdd_weighs_candidates_of_a_proposal_and_takes_no_forbidden_one():
    quarter, forbidden = np.log([0.25, 0.75]), np.array([-math.inf, 2.0])

    def picks(lam, reward, log_w, u):
        return Choice(lam).step(0, np.asarray(reward), np.asarray(log_w), lambda: np.array([u])).tolist()

    assert picks(0.0, [5.0, 0.0], quarter, 0.24) == [0, 0]
    assert picks(0.0, [5.0, 0.0], quarter, 0.26) == [1, 1]
    assert picks(1.0, np.log([3.0, 1.0]), quarter, 0.49) == [0, 0]
    assert picks(1.0, np.log([3.0, 1.0]), quarter, 0.51) == [1, 1]
    assert picks(1.0, forbidden, quarter, 0.0) == [1, 1]
    assert picks(math.inf, [9.0, 1.0], forbidden, 0.0) == [1, 1]
    assert picks(1.0, [-math.inf] * 2, quarter, 0.26) == [1, 1]  # no endpoint is a verdict


def test_a_forbidden_sample_of_svdd_carries_no_weight():
    result = search(BED, lambda x: torch.where(x[:, 0] > 0.3, 0.0, -math.inf), ts.SVDD(candidates=2))
    chosen = result.log_weights > -math.inf
    assert 0 < chosen.sum() < 40
    assert (result.samples[chosen] > 0.3).all()


# Feynman-Kac on rollouts.


@pytest.mark.parametrize(
    ("n", "c", "options"),
    [
        (1200, 0.8, {"ess_threshold": 0.8}),
        (1200, 0.6, {"ess_threshold": 1.0, "resampling": "multinomial"}),
        (1000, 0.8, {"ess_threshold": 1.0, "schedule": (5, 2, 0), "tempering": (0.5, 0.8, 1.0), "resampling": "ssp"}),
    ],
    ids=["adaptive", "always", "tempered"],
)
def test_rollouts_as_values_keep_z_unbiased(n, c, options):
    method = ts.FeynmanKac(**ROLLOUT, **options)
    result = search(BED, linear(c), method, budget=ts.Budget(iterations=n), seed=1)
    assert sum(result.diagnostics["resamplings"]) > n / 2
    unbiased(independent_z(result, BED.tilted(Tilt(c=c)).log_z))


def test_offspring_that_share_the_noise_of_the_rollout_that_chose_them_bias_z(monkeypatch):
    """What the law above would catch."""
    offspring = FeynmanKacSearch._offspring

    def shared(self):
        self.rollouts = False
        found = offspring(self)
        self.rollouts = True
        return found

    monkeypatch.setattr(FeynmanKacSearch, "_offspring", shared)
    method = ts.FeynmanKac(**ROLLOUT, ess_threshold=0.8)
    result = search(BED, linear(0.8), method, budget=ts.Budget(iterations=700))
    gap, se = laws.error(independent_z(result, BED.tilted(Tilt(c=0.8)).log_z))
    assert gap < -10 * se


def test_rollouts_as_values_keep_z_unbiased_on_an_enumerable_chain():
    log_z = CHAIN.tilted(torch.tensor(VALUES)).log_z
    result = search(CHAIN, TABLE, ts.FeynmanKac(**ROLLOUT, ess_threshold=0.9), budget=ts.Budget(iterations=1500))
    assert sum(result.diagnostics["resamplings"]) > 200
    unbiased(independent_z(result, log_z))


def test_a_level_is_scored_by_one_full_rollout_of_each_particle():
    result = search(BED, linear(0.8), ts.FeynmanKac(**ROLLOUT, ess_threshold=1.0), budget=ts.Budget(iterations=1))
    tree, levels = result.tree, [4, 3, 2, 1, 0]
    assert result.cost.nfe == 8 * (5 + 4 + 3 + 2 + 1)
    assert result.cost.reward_calls == 8 * len(levels)
    inner = np.flatnonzero((tree.t > 0) & (tree.parent >= ROOT))
    rollout = inner + 1
    assert (tree.t[rollout] == 0).all()
    assert (tree.parent[rollout] == inner).all()
    assert (tree.key[rollout] == tree.key[inner]).all()
    assert np.isnan(tree.reward[inner]).all()
    first = tree.reward[rollout[:8]]
    assert result.diagnostics["ess_levels"][0][0] == pytest.approx(ess(first))
    best = search(BED, linear(0.8), ts.BestOfN(n=8))
    assert torch.equal(best.samples, result.samples[:8])  # the first level's rollouts
    assert result.log_z == pytest.approx(log_mean(result.log_weights.numpy()))
    assert (result.log_weights > -math.inf).sum() == 8
    assert len(result.samples) == 40
    assert float(result.best(1)[1]) == result.history[-1]["best_reward"]


def test_one_large_population_on_rollouts_reaches_the_target():
    method = ts.FeynmanKac(value="rollout", num_particles=4000)
    result = search(BED, linear(1.2), method, budget=ts.Budget(iterations=1))
    assert laws.posterior_mean(result) == pytest.approx(1.068, abs=0.06)


# DAS.


def das(reward=QUADRATIC, gamma=0.3, **how):
    """The guided kernel and the method that make up DAS."""
    kernel = DAS(BED, reward, gamma=gamma)
    tempering = kernel.tempering(kernel.schedule)
    return kernel, ts.FeynmanKac(
        num_particles=8, schedule=kernel.schedule, tempering=tempering, resampling="ssp", ess_threshold=0.8, **how
    )


def test_temperatures_rise_from_zero_and_the_last_level_has_the_whole_of_lambda():
    kernel, method = das(gamma=0.1)
    assert method.schedule == (4, 3, 2, 1, 0)
    np.testing.assert_allclose(method.tempering, [1.1 - 1, 1.1**2 - 1, 1.1**3 - 1, 1.1**4 - 1, 1.0])
    np.testing.assert_allclose(DAS(BED, QUADRATIC, gamma=0.5).factors, [1, 1, 1, 1, 0.5, 0])
    with pytest.raises(ValueError, match="end in 0"):
        kernel.tempering((4, 2))
    with pytest.raises(ValueError, match="gamma is 0"):
        DAS(BED, QUADRATIC, gamma=0)


def test_a_step_of_das_is_that_of_tds_at_the_temperature_it_leads_to():
    tempered, full = DAS(BED, QUADRATIC, lam=2.0, gamma=0.2), TDS(BED, QUADRATIC, lam=2.0)
    x, t = torch.linspace(-1, 2, 10, dtype=torch.float64)[:, None], torch.arange(10) % 5 + 1
    one, other = tempered.transition(x, t), full.transition(x, t)
    factor = ((1.2 ** (5 - (t - 1)) - 1).clamp(max=1.0))[:, None]
    torch.testing.assert_close(one.mean - one.base_mean, factor * (other.mean - other.base_mean))
    assert torch.equal(one.rewards, other.rewards)
    assert DAS(BED, QUADRATIC, gamma=0.2).fingerprint != DAS(BED, QUADRATIC, gamma=0.3).fingerprint
    check_kernel(tempered, atol=1e-9, proposal=True)


def test_a_sudden_temperature_is_tds():
    kernel, method = das(gamma=1e12)
    one = search(kernel, QUADRATIC, method)
    other = search(TDS(BED, QUADRATIC), QUADRATIC, method)
    assert torch.equal(one.samples, other.samples)
    torch.testing.assert_close(one.log_weights, other.log_weights)


class WithoutWeights:
    """A guide whose steps forget log p/q."""

    def __init__(self, kernel):
        self.kernel = kernel

    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t, cond)
        return type(law)(law.mean, law.std, law.endpoint)

    def __getattr__(self, name):
        if name == "kernel":
            raise AttributeError(name)
        return getattr(self.kernel, name)


@pytest.mark.parametrize("gamma", [0.3, 0.02])  # λ_0 = λ, and λ_0 = λ / 10
def test_das_estimates_z_without_bias(gamma):
    kernel, method = das(gamma=gamma)
    unbiased(laws.populations(kernel, QUADRATIC, method, LOG_Z, 700, seed=1))


def test_das_without_log_p_q_is_caught():
    kernel, method = das()
    gap, se = laws.error(laws.populations(WithoutWeights(kernel), QUADRATIC, method, LOG_Z, 300))
    assert gap > 10 * se


def test_das_varies_less_than_feynman_kac():
    kernel, method = das()
    plain = ts.FeynmanKac(num_particles=8, ess_threshold=0.8)
    one, other = (laws.populations(k, QUADRATIC, m, LOG_Z, 300).std() for k, m in ((kernel, method), (BED, plain)))
    assert one < 0.6 * other


# Laws of every method.


@pytest.mark.parametrize(
    ("method", "reward"),
    [
        (ts.Rejection(), QUADRATIC),
        (ts.Rejection(lam="auto", r_max=0.5), QUADRATIC),
        (ts.SVDD(candidates=5), linear(1.2)),
        (ts.SVDD(candidates=7, lam=math.inf, schedule=(4, 2, 0)), linear(1.2)),
        (ts.FeynmanKac(value="rollout"), linear(1.2)),
        (ts.FeynmanKac(**ROLLOUT, ess_threshold=1.0, schedule=(5, 2, 0)), linear(1.2)),
    ],
    ids=["rejection", "rejection auto", "svdd", "svdd greedy", "rollout", "rollout of 8"],
)
def test_methods_obey_the_laws(method, reward):
    check_method(method, BED, reward)


def test_das_runs_go_on(tmp_path):
    kernel, method = das()
    check_store(method, kernel, QUADRATIC, tmp_path, cuts=3, atol=1e-9)


@pytest.mark.parametrize("keep", ["frontier", "none"])
def test_rollouts_do_not_depend_on_the_states_that_are_kept(keep):
    method = ts.FeynmanKac(**ROLLOUT)
    whole, less = (search(BED, QUADRATIC, method, keep_states=how) for how in ("all", keep))
    assert torch.equal(whole.samples, less.samples)
    assert whole.cost.nfe == less.cost.nfe == 390


# Presets, names, the command line.


@pytest.mark.parametrize("name", BASELINES)
def test_every_preset_spends_its_budget_and_tends_to_what_it_says(name):
    setup = BASELINES[name](BED, QUADRATIC, Settings(gamma=0.3, candidates=4))
    result = search(setup.kernel, QUADRATIC, setup.method, budget=ts.Budget(nfe=20_000), seed=1)
    assert 0.97 * 20_000 <= result.cost.nfe <= 20_000
    assert result.cost.backward_nfe == (20_000 if name in ("tds", "das", "dps") else 0)
    weight = result.log_weights.softmax(0) if setup.weighted else torch.full((len(result.samples),), 1 / 4000)
    gap = abs(float((weight * result.samples[:, 0]).sum() - BED.tilted(TILT).mean))
    if name == "dps":
        assert gap > 0.1
    elif name != "svdd":  # its law is tested above
        assert gap < (0.2 if name == "fk_sum" else 0.06)


def test_presets_read_their_settings():
    settings = Settings(lam=2.0, schedule=(5, 3, 0), ess_threshold=0.7, resampling="ssp", gamma=0.2, candidates=3)
    setups = {name: make(BED, QUADRATIC, settings) for name, make in BASELINES.items()}
    assert {setup.method.lam for setup in setups.values()} == {2.0}
    for name in ("fk_difference", "fk_max", "fk_sum", "fk_immediate", "fk_rollout", "tds"):
        method = setups[name].method
        assert (method.schedule, method.ess_threshold, method.resampling) == ((5, 3, 0), 0.7, "ssp")
    assert setups["fk_max"].method.potential == "max"
    assert setups["das"].method.schedule == (3, 0)  # λ_T = 0
    assert setups["das"].method.tempering == pytest.approx((1.2**2 - 1, 1.0))
    assert setups["das"].kernel.lam == setups["tds"].kernel.lam == 2.0
    assert setups["svdd"].method.candidates == 3
    assert [name for name, setup in setups.items() if not setup.weighted] == ["dps"]


def test_names_and_citations():
    assert specs.method("rejection(r_max=1.0)") == ts.Rejection(r_max=1.0)
    assert specs.method("svdd") == ts.SVDD()
    kernel = specs.kernel("das(gaussian(), linear(1.0), gamma=0.1)")
    assert isinstance(kernel, DAS)
    assert describe(kernel).backward_per_nfe == (0, 1, 1, 1, 1, 1)
    assert "li2024derivative" in bibtex(ts.SVDD.papers)
    assert "booktitle = {Monte Carlo Method" in bibtex(ts.Rejection.papers)


@pytest.mark.parametrize("words", [["rejection"], ["svdd", "--candidates", "3"], ["fk", "--value", "rollout"]])
def test_the_command_line_has_them(tmp_path, capsys, words):
    store = str(tmp_path / "run")
    toy = ["--kernel", "gaussian", "--reward", "quadratic()", "--nfe", "600", "--json", "--store", store]
    assert main(["run", *words, *toy]) == 0
    assert json.loads(capsys.readouterr().out)["cost"]["nfe"] >= 0.97 * 600
    assert main(["show", store]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ts.SVDD(candidates=0), "candidates is 0, expected a positive"),
        (lambda: ts.SVDD(schedule=(3, 1)), "lacks 0"),
        (lambda: ts.Rejection(lam=math.inf), "finite number"),
        (lambda: ts.FeynmanKac(value="rollouts"), "did you mean 'rollout'"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
