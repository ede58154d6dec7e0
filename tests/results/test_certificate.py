"""Certificates: intervals against closed forms, every method's flags, the alarm on planted cases, hashes."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import treesearch as ts
from experiments.coverage.beds import BEDS
from tests.support import laws
from treesearch.backends.base import Guided, shift_mean
from treesearch.backends.exact.gaussian import LinearGaussian, Tilt
from treesearch.backends.guidance import TDS, TrustRegion
from treesearch.cli.main import main
from treesearch.cli.show import read_result_of
from treesearch.core import pareto
from treesearch.methods import genealogy
from treesearch.methods.base import Readout
from treesearch.methods.claims import Z95, Bias, Claims, Interval, Standing, t95
from treesearch.registry import registry as specs
from treesearch.results.certificate import UNDECLARED, Context
from treesearch.results.intervals import log_z
from treesearch.results.overoptimisation import spearman
from treesearch.rewards.analytic import linear, quadratic

BED, R = LinearGaussian(), linear(1.2)
TILTED = BED.tilted(Tilt(c=1.2))
KL = 0.5 * (1.2 * BED.std) ** 2
RUNS = 200
GREEDY_TREE = {"greedy", "shared_ancestors"}
EXPECTED = {
    "best_of_n": {"self_normalised"},
    "rejection": set(),
    "fk": {"self_normalised", "resampled"},
    "dts": {"soft_value", "self_normalised", "shared_ancestors"},
    "dts_star": GREEDY_TREE,
    "tree_sampling": {"self_normalised", "resampled"},
    "tree_search": GREEDY_TREE,
    "beam": GREEDY_TREE,
    "svdd": {"steered"},
    "lookahead_beam": GREEDY_TREE,
    "mcts": GREEDY_TREE,
    "depth_first": GREEDY_TREE,
    "rollover": GREEDY_TREE,
    "noise_search": {"greedy", "noise_neighbours"},
}


class Declares:
    """The bed with attributes of its own."""

    def __init__(self, **declared):
        self.__dict__.update(declared)

    def __getattr__(self, name):
        return getattr(BED, name)


def method_of(name):
    return specs.method({"rejection": "rejection(r_max=5)", "fk": "fk(num_particles=8)"}.get(name, name))


def search(method, kernel=BED, reward=None, *, nfe=600, **how):
    reward = R.clip(-9, 5) if reward is None else reward
    return ts.search(kernel, reward, method, budget=ts.Budget(nfe=nfe), **how)


def flags(result):
    return {str(flag.name) for flag in result.certificate().flags}


def intervals(method, samples, reward=R):
    """log Z of RUNS independent searches."""
    nfe = RUNS * samples * BED.num_steps
    result = ts.search(BED, reward, method, prompts=list(range(RUNS)), budget=ts.Budget(nfe=nfe), batch_size=laws.WIDE)
    return [task.certificate().log_z for task in result.tasks]


def covered(found, exact):
    """Share of the intervals that hold the truth, and share of the searches that have one."""
    have = [z for z in found if z.high is not None]
    return np.mean([z.low <= exact <= z.high for z in have]), len(have) / len(found)


def chance(n, rate=0.95):
    """Where the share of n draws lies but for one time in a thousand on each side."""
    return stats.binom.ppf([0.001, 0.999], n, rate) / n


@pytest.mark.parametrize(
    ("method", "samples", "least", "most"),
    [
        (ts.BestOfN(), 200, 0.95, 0.95),
        (ts.Rejection(r_max=5.0), 300, 0.9468, 0.9468),  # of the binomial law, at 4.6 acceptances
        (ts.FeynmanKac(num_particles=32, ess_threshold=0.9), 192, 0.95, 0.987),  # six; systematic: V 1.6 x too large
        (ts.FeynmanKac(num_particles=200, ess_threshold=0.9, resampling="multinomial"), 200, 0.95, 0.95),  # one
    ],
)
def test_intervals_of_log_z_cover_it(method, samples, least, most):
    found = intervals(method, samples, R.clip(-9, 5))
    share, have = covered(found, TILTED.log_z)
    assert chance(RUNS, least)[0] <= share <= chance(RUNS, most)[1]
    assert have > 0.95
    third = [replace(z, low=z.value - z.se * 0.65, high=z.value + z.se * 0.65) for z in found if z.se]
    assert not third or covered(third, TILTED.log_z)[0] < 0.75  # intervals a third as wide would be noticed


def test_heavy_weights_are_called_unreliable():
    standings = [z.standing for z in intervals(ts.BestOfN(), 60, linear(5.0))]
    assert np.mean([s == Standing.UNRELIABLE for s in standings]) > 0.9
    standings = [z.standing for z in intervals(ts.BestOfN(), 100, linear(0.5))]
    assert np.mean([s == Standing.OK for s in standings]) > 0.9


def test_intervals_allow_for_a_tail_that_was_hardly_met():
    """r = 3 x: where Ẑ is too low its spread is too small as well; of symmetric intervals .7 hold log Z."""
    found, exact = intervals(ts.BestOfN(), 200, linear(3.0)), BED.tilted(Tilt(c=3.0)).log_z
    assert covered(found, exact)[0] >= chance(RUNS)[0]
    plain = [replace(z, low=z.value - Z95 * z.se, high=z.value + Z95 * z.se) for z in found if z.se]
    assert covered(plain, exact)[0] < covered(found, exact)[0] - 0.03
    assert all(z.reason for z in found if z.standing != Standing.OK)


def test_tiny_populations_of_a_steep_reward_are_not_relied_on():
    found, exact = intervals(ts.FeynmanKac(num_particles=4), 192, linear(3.0)), BED.tilted(Tilt(c=3.0)).log_z
    assert holds(found, exact)[1] < 0.1


def holds(found, exact):
    """Share of those relied on that hold log Z, and how many are relied on."""
    ok = [z.low <= exact <= z.high for z in found if z.standing == Standing.OK]
    return (np.mean(ok) if ok else 1.0), len(ok) / len(found)


def on_bed(name, method, samples=200, searches=50):
    bed = BEDS[name]()
    budget = ts.Budget(nfe=samples * searches * bed.kernel.num_steps)
    how = {"prompts": list(range(searches)), "budget": budget, "batch_size": laws.WIDE}
    tasks = ts.search(bed.kernel, bed.reward, method, **how).tasks
    return [task.certificate().log_z for task in tasks], bed.log_z


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
def test_steering_that_lost_the_target_is_never_relied_on(potential, monkeypatch):
    """Eight modes on a ring: endpoints at high noise lie between them, and good ones are pruned for it."""
    method = ts.FeynmanKac(num_particles=200, potential=potential)
    found, exact = on_bed("ring", method)
    assert holds(found, exact)[1] == 0
    if potential == "difference":
        assert covered(found, exact)[0] < 0.9  # no spread shows what was pruned
        monkeypatch.setattr(genealogy, "lost", lambda parts: 0.0)
        assert holds(on_bed("ring", method)[0], exact)[0] < 0.8, "the test can fail"


def test_good_intervals_of_trees_are_relied_on():
    found, exact = on_bed("linear, steep", ts.TreeSampling())
    share, often = holds(found, exact)
    assert share >= chance(round(often * len(found)))[0]
    assert often >= 0.5


@pytest.mark.parametrize(("name", "guide", "relied"), [("peaks", TDS, False), ("linear, steep", TrustRegion, True)])
def test_what_a_guide_lost_is_seen(name, guide, relied):
    """TDS takes steps of many standard deviations where the reward is steep; TrustRegion keeps within its bound."""
    bed = BEDS[name]()
    kernel = guide(bed.kernel, bed.reward, lam=bed.lam)
    for method in (ts.BestOfN(), ts.FeynmanKac(num_particles=400)):
        found = ts.search(
            kernel, bed.reward, method, budget=ts.Budget(nfe=400 * bed.kernel.num_steps), batch_size=laws.WIDE
        )
        assert (found.certificate().log_z.standing == Standing.OK) == relied


def test_an_unreliable_interval_is_a_warning():
    heavy = search(ts.BestOfN(n=60), reward=linear(5.0))
    reason = heavy.certificate().log_z.reason
    assert f"the interval of log Z is unreliable: {reason}" in heavy.diagnostics["warnings"]
    assert not search(ts.BestOfN()).diagnostics["warnings"]
    assert not search(ts.MCTS()).certificate().log_z.high
    assert not any("unreliable" in line for line in search(ts.MCTS()).diagnostics["warnings"])


def test_what_steering_lost():
    """ψ = 2 u where u = λ r: half of ψ was true; b = 1 loses nothing, and b > 1 is only less than could be had."""
    chance = np.random.default_rng(0)
    u = chance.normal(size=4_000)
    for slope, expected in ((1.0, 0.0), (2.0, 0.5 * 2.0), (0.5, 0.0)):
        past = genealogy.Genealogy.of(len(u))
        past.resample(0, np.arange(len(u)), slope * u, np.ones(len(u)))
        parts = [genealogy.Part(np.zeros(len(u)), u, u, past)]
        assert genealogy.lost(parts) == pytest.approx(expected, abs=0.03)
        assert genealogy.lost([*parts, genealogy.independent(np.zeros(len(u)), u)]) == pytest.approx(
            expected / 2**0.5, abs=0.03
        )
    guided = genealogy.independent(-u, u)  # moved by log q/p = 2 u
    assert genealogy.lost([guided]) == pytest.approx(1.0, abs=0.1)


def test_bounds_of_normal_totals_are_those_of_t():
    """Many draws of a law without skew: ± 1.96 standard errors."""
    d = np.random.default_rng(0).normal(size=100_000) / 1e4
    se, dof, low, high = genealogy.bounds(0.0, np.concatenate([d, -d]))
    assert se == pytest.approx(math.sqrt(2 * d @ d)), "the estimate itself"
    assert dof > 1_000
    wide = math.sqrt(2 * d @ d + np.abs(d).max() ** 2)  # one more like the largest
    assert (low, high) == pytest.approx((-1.96 * wide, 1.96 * wide), rel=0.01)
    _, few, low, high = genealogy.bounds(0.0, np.array([0.5, *np.full(99, -0.5 / 99)]))
    assert few == pytest.approx(4, abs=0.2), "2 a term that carries all, and one more like it"
    assert -low == pytest.approx(t95(few) * math.sqrt(2 * 0.25 + 0.25 / 99))
    c = np.random.default_rng(0).exponential(size=60) ** 2
    _, _, low, high = genealogy.bounds(0.0, (c - c.mean()) / c.sum())
    assert high > 1.1 * -low, "the side of the tail"


def test_populations_are_the_terms_where_there_are_more_of_them_than_particles():
    """Particles of a population that err together: their spread says nothing, that of the populations does."""
    errors = np.random.default_rng(0).normal(size=40)
    parts = [genealogy.Part(np.full(5, e), np.zeros(5), np.zeros(5), genealogy.Genealogy.of(5)) for e in errors]
    shares = np.exp(errors) / np.exp(errors).sum()
    d = (shares - shares.mean()) * math.sqrt(40 / 39)
    assert genealogy.interval(parts, alike=True).se == pytest.approx(math.sqrt(d @ d))
    assert genealogy.interval(parts).se < 1e-6, "lineages see nothing of it"
    few = [genealogy.independent(np.random.default_rng(i).normal(size=30)) for i in range(4)]
    assert genealogy.interval(few, alike=True) == genealogy.interval(few)


def test_few_acceptances_are_not_relied_on():
    """Of a rate far below 1/N what was accepted is all that is told."""
    some = search(ts.Rejection(r_max=5.0), nfe=2_000)
    assert 0 < some.diagnostics["accepted"] < 10
    assert some.certificate().log_z.standing == Standing.UNRELIABLE
    assert "fewer than 10" in some.certificate().log_z.reason
    many = search(ts.Rejection(r_max=3.0, lam=0.5), reward=R.clip(-9, 3))
    assert many.certificate().log_z.standing == Standing.OK


def test_few_samples_and_one_sample():
    few = search(ts.BestOfN(n=10)).certificate().log_z
    assert few.standing == Standing.UNRELIABLE
    assert "fewer than 10" in few.reason
    twenty = search(ts.BestOfN(n=20), reward=linear(0.1)).certificate().log_z
    assert "fewer than 25" in twenty.reason
    one = search(ts.BestOfN(n=1)).certificate().log_z
    assert (one.high, one.standing) == (None, Standing.NONE)
    assert one.reason


def test_nothing_accepted_still_bounds_log_z():
    result = search(ts.Rejection(r_max=9.0), nfe=50)
    found = result.certificate().log_z
    assert found.value == -math.inf
    assert found.low == -math.inf
    assert TILTED.log_z < found.high < 9.0
    assert found.standing == Standing.UNRELIABLE


def test_acceptances_have_wilsons_interval():
    result = search(ts.Rejection(r_max=3.0, lam=0.5), reward=R.clip(-9, 3))
    found, accepted = result.certificate().log_z, result.diagnostics["accepted"]
    exact = stats.binomtest(accepted, 120).proportion_ci(method="wilson")
    assert found.low == pytest.approx(math.log(exact.low) + 1.5, abs=1e-6)
    assert found.high == pytest.approx(math.log(exact.high) + 1.5, abs=1e-6)


def test_no_weights_say_nothing():
    found = search(ts.BestOfN(), reward=lambda x: torch.full((len(x),), -math.inf)).certificate()
    assert found.log_z.high is None
    assert "zero" in found.log_z.reason
    assert found.ess == found.lineages == found.distinct_leaves == 0
    json.dumps(found.asdict(), allow_nan=False)


def test_few_lineages_have_no_interval():
    found = search(ts.FeynmanKac(num_particles=8, ess_threshold=1.0), nfe=40).certificate().log_z
    assert found.value is not None
    assert found.high is None
    assert "lineages" in found.reason


def test_trees_have_no_interval():
    for name in ("dts", "mcts"):
        found = search(method_of(name)).certificate().log_z
        assert found.low is found.high is None
        assert found.standing == Standing.NONE
        assert found.reason


def readout(interval, value=0.5):
    return Readout(np.arange(3), np.zeros(3), value, interval=interval)


def test_a_search_states_its_own_interval():
    found = log_z(readout(Interval(source="trees", se=0.1, dof=9)), Claims())
    t = stats.t.ppf(0.975, 9)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.1 * t, 0.5 + 0.1 * t), abs=1e-4)
    assert (found.standing, found.source) == (Standing.OK, "trees")
    assert log_z(readout(Interval(source="trees", se=0.4)), Claims()).standing == Standing.UNRELIABLE
    own = log_z(readout(Interval(source="trees", se=0.6, low=0.1, high=0.7)), Claims())
    assert (own.low, own.high, own.standing) == (0.1, 0.7, Standing.OK)


def test_an_estimate_that_is_not_positive_is_a_status():
    stated = Interval(source="trees", se=2.0, high=-1.0, standing=Standing.NOT_POSITIVE, reason="Ẑ = -0.1 ± 0.2")
    found = log_z(readout(stated, None), Claims())
    assert (found.value, found.low, found.high) == (None, None, -1.0)
    assert (found.standing, found.reason) == ("not positive", "Ẑ = -0.1 ± 0.2")
    with pytest.raises(ValueError, match="expected a reason"):
        Interval(source="trees", standing=Standing.NOT_POSITIVE)


@pytest.mark.parametrize("dof", [2, 3, 4, 5, 9, 30, math.inf])
def test_quantiles_of_t(dof):
    assert t95(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=0.01)


@pytest.mark.parametrize("k", [0.0, 0.3, 0.7, 1.2])
def test_pareto_shape_is_recovered(k):
    found = [pareto.fit(np.sort(stats.genpareto.rvs(k, size=2000, random_state=i))) for i in range(20)]
    assert np.mean(found) == pytest.approx(k, abs=0.03)


def test_pareto_tail_of_weights():
    u = np.random.default_rng(0).uniform(size=4000)
    assert pareto.k_hat(-0.9 * np.log(u)) == pytest.approx(0.9, abs=0.25)  # Pareto weights u^-0.9
    assert pareto.k_hat(np.log(u)) < 0.2  # bounded
    assert pareto.k_hat(np.zeros(100)) == -math.inf
    assert pareto.k_hat(np.zeros(24)) is None


def test_kl_is_the_closed_form():
    guide = shift_mean(lambda x, t, base, cond: 0.2 * base.std**2)
    for kernel in (BED, Guided(BED, guide)):  # from p, wherever the samples came from
        found = search(ts.BestOfN(), kernel, R, nfe=100_000, batch_size=laws.WIDE).certificate()
        assert found.kl == pytest.approx(KL, abs=0.03)
    fk = search(ts.FeynmanKac(), reward=R, nfe=100_000, batch_size=laws.WIDE).certificate()
    assert fk.kl == pytest.approx(KL, abs=0.03)
    assert search(ts.DiffusionTreeSearch()).certificate().kl is None


def test_sizes():
    found = search(ts.BestOfN(n=40)).certificate()
    assert (found.samples, found.lineages, found.distinct_leaves) == (40, 40, 40)
    fk = search(ts.FeynmanKac(num_particles=40, ess_threshold=1.0), nfe=200)
    assert fk.certificate().lineages == len(np.unique(fk.tree.roots(fk.leaves))) < 40
    assert fk.certificate().distinct_leaves == 40
    rejection = search(ts.Rejection(r_max=5.0))
    assert rejection.certificate().distinct_leaves == rejection.diagnostics["accepted"] < 120


def test_every_method_has_an_expectation():
    assert set(EXPECTED) == set(specs.METHOD_NAMES), "a new method: say here which flags it must carry"


@pytest.mark.parametrize("name", EXPECTED)
def test_flags_of_every_method(name):
    result = search(method_of(name))
    assert flags(result) == EXPECTED[name]
    assert all(flag.reason for flag in result.certificate().flags)
    assert json.loads(json.dumps(result.certificate().asdict(), allow_nan=False)) == result.certificate().asdict()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ts.FeynmanKac(num_particles=8, ess_threshold=0), {"self_normalised"}),
        (
            ts.FeynmanKac(num_particles=8, tempering="ess", ess_threshold=0),
            {"self_normalised", "resampled", "chosen_temperatures"},
        ),
        (ts.DiffusionTreeSampling(selection="round_robin"), {"self_normalised", "shared_ancestors"}),
        (ts.DiffusionTreeSampling(lam=math.inf), GREEDY_TREE),
        (ts.SVDD(lam=math.inf), {"greedy"}),
        (ts.SVDD(lam=0), set()),
        (ts.NoiseSearch(theta=math.pi / 2), {"greedy"}),
        (ts.DiffusionTreeSearch(mode="async"), GREEDY_TREE | {"asynchronous"}),
    ],
)
def test_settings_decide_flags(method, expected):
    assert flags(search(method)) == expected


def test_steps_without_noise():
    expected = EXPECTED["best_of_n"]
    quiet = search(ts.BestOfN(), Declares(stochastic=(True, *[False] * 5)))
    assert flags(quiet) == expected | {"deterministic_steps"}
    assert "nothing can branch" in str(quiet.certificate())
    assert "2 of 5" in str(
        search(ts.BestOfN(), Declares(stochastic=(True, True, False, False, True, True))).certificate()
    )
    assert flags(search(ts.BestOfN(), Declares(stochastic=(True, False, True, True, True, True)))) == expected


def test_guides_whose_weights_are_ignored():
    guided = Guided(BED, shift_mean(lambda x, t, base, cond: 0.2 * base.std**2))
    assert "unweighted_guide" in flags(search(ts.MCTS(), guided))
    assert "unweighted_guide" not in flags(search(ts.MCTS()))
    for name in ("best_of_n", "fk", "dts", "dts_star"):
        assert "unweighted_guide" not in flags(search(method_of(name), guided))


def test_previews():
    kernel = Declares(preview=lambda x: x)
    assert "previewed" in flags(search(method_of("fk"), kernel))
    assert "previewed" not in flags(search(ts.BestOfN(), kernel))  # scores nothing above t = 0


@pytest.mark.parametrize(("asked", "took", "told"), [(3.0, 5.6, True), (3.0, 5.4, False), (None, 12.8, False)])
def test_a_search_that_took_longer_than_it_was_given_says_so(asked, took, told):
    (task,) = search(ts.BestOfN()).tasks
    config = {**task.context.config, "budget": {"nfe": None, "seconds": asked}}
    context = replace(task.context, config=config, cost=replace(task.context.cost, seconds=took))
    warnings = replace(task, context=context).diagnostics["warnings"]
    assert [w.split(":")[0] for w in warnings if "seconds" in w or " s of " in w] == [f"took {took} s of 3 s"] * told


def test_the_clock_and_a_halt(tmp_path):
    timed = ts.search(BED, R, ts.BestOfN(), budget=ts.Budget(seconds=0.05), store=tmp_path / "timed")
    assert "out_of_time" in flags(timed)
    assert any("seconds" in c for c in timed.certificate().caveats)
    assert "out_of_time" in flags(read_result_of(tmp_path / "timed")[1])
    more = ts.resume(tmp_path / "timed", BED, R, budget=ts.Budget(nfe=timed.cost.nfe + 600))
    assert flags(more) == flags(read_result_of(tmp_path / "timed")[1]) == EXPECTED["best_of_n"]
    both = ts.Budget(seconds=1000, nfe=600)
    assert "out_of_time" not in flags(ts.search(BED, R, ts.BestOfN(), budget=both))
    halted = halt(tmp_path / "halted", ts.DiffusionTreeSampling(), waves=1)
    assert "unfinished" in flags(halted)
    assert "unfinished" in flags(read_result_of(tmp_path / "halted")[1])
    assert "unfinished" not in flags(ts.resume(tmp_path / "halted", BED, R.clip(-9, 5)))


def test_a_method_that_does_not_say_claims_nothing():
    context = Context(method=object(), config={}, task=0, over=True, out_of_time=False)
    assert context.claims is UNDECLARED
    assert {flag.name for flag in UNDECLARED.flags} == {Bias.UNDECLARED}
    assert not UNDECLARED.iid


BED2 = LinearGaussian(dim=2)
FIRST = linear((1.0, 0.0))
PLANTED = quadratic(1.0, (0.3, 0.0))  # falls away from the mean of the first coordinate
ALIGNED = linear((1.0, 0.5))
UNRELATED = linear((0.0, 1.0))


@pytest.mark.parametrize("name", ["best_of_n", "fk", "dts_star"])
def test_the_alarm_fires_on_a_planted_case_alone(name):
    result = search(method_of(name), BED2, FIRST, nfe=2_000)
    planted, aligned = result.certificate(PLANTED).alarm, result.certificate(ALIGNED).alarm
    assert planted.fires is True
    assert planted.rho < 0
    assert planted.p <= 0.01
    assert "ALARM" in str(result.certificate(PLANTED))
    assert aligned.fires is False
    assert result.certificate(lambda samples: samples[:, 0]).alarm.fires is False  # a plain function


def test_the_alarm_is_quiet_about_an_unrelated_reward():
    found = [search(ts.BestOfN(), BED2, FIRST, nfe=500, seed=s).certificate(UNRELATED).alarm for s in range(60)]
    assert sum(alarm.fires for alarm in found) <= 4  # P = .4 % at a level of 1 %
    assert np.mean([alarm.p for alarm in found]) == pytest.approx(0.5, abs=0.15)


def test_the_alarm_says_what_it_lacks():
    result = search(ts.BestOfN(), BED2, FIRST)
    assert (result.certificate().alarm.fires, result.certificate().alarm.reason) == (
        None,
        "unknown: no held-out reward",
    )
    assert result.certificate(lambda x: torch.zeros(len(x))).alarm.fires is None
    assert "needs 20" in search(ts.BestOfN(n=30), BED2, FIRST).certificate(PLANTED).alarm.reason


def test_the_alarm_scores_at_most_512_samples_of_the_better_half():
    asked = []

    def held_out(samples):
        asked.append(samples)
        return samples[:, 1]

    result = search(ts.BestOfN(), BED2, FIRST, nfe=10_000, batch_size=laws.WIDE)
    result.certificate(held_out)
    (samples,) = asked
    assert len(samples) == 512
    assert samples[:, 0].min() >= result.rewards.median()


def test_prompts_reach_the_held_out_reward():
    result = ts.search(BED, R, ts.BestOfN(), prompts=["a", "b"], budget=ts.Budget(nfe=800))
    seen = []

    def held_out(samples, prompts=None):
        seen.append(set(prompts))
        return samples[:, 0]

    for task in result.tasks:
        task.certificate(held_out)
    assert seen == [{"a"}, {"b"}]
    with pytest.raises(ts.TreeSearchError, match="2 tasks"):
        result.certificate()


def test_spearman_is_scipys():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 9, 60).astype(float), rng.normal(size=60)
    rho, p = spearman(x, y)
    exact = stats.spearmanr(x, y, alternative="less")
    assert rho == pytest.approx(exact.statistic)
    assert p == pytest.approx(exact.pvalue, abs=0.05)


def halt(path, method, waves, **how):
    """A run that was stopped after some waves."""
    snapshots = ts.stream(BED, R.clip(-9, 5), method, budget=ts.Budget(nfe=600), batch_size=16, store=path, **how)
    *_, last = itertools.islice(snapshots, waves)
    result = last.result()
    snapshots.close()
    return result


@pytest.mark.parametrize("name", EXPECTED)
def test_a_resumed_run_has_the_hash_of_a_straight_one(name, tmp_path):
    method = method_of(name)
    straight = search(method, batch_size=16, store=tmp_path / "straight").certificate()
    halt(tmp_path / "halted", method, waves=2)
    resumed = ts.resume(tmp_path / "halted", BED, R.clip(-9, 5), batch_size=16)
    assert resumed.certificate().hash == straight.hash
    assert search(method, batch_size=16).certificate().hash == straight.hash
    loaded = read_result_of(tmp_path / "halted")[1]
    assert loaded.certificate().asdict() == straight.asdict()


def test_what_decides_the_result_is_in_the_hash():
    def hashes(method=None, kernel=BED, reward=R, **how):
        found = search(method or ts.BestOfN(), kernel, reward, **how).certificate()
        return found.settings_hash, found.tree_hash

    settings, tree = hashes()
    assert hashes() == hashes(keep_states="none") == (settings, tree)
    for other in (
        {"seed": 1},
        {"method": ts.BestOfN(lam=0.5)},
        {"method": ts.BestOfN(n=120)},
        {"kernel": LinearGaussian(std=0.7)},
        {"reward": linear(1.3)},
        {"reward": replace(R, settings=("linear(c=1.2, version=2)",))},
        {"nfe": 605},
        {"batch_size": 8},
    ):
        assert hashes(**other)[0] != settings, other
    for other in ({"seed": 1}, {"kernel": LinearGaussian(std=0.7)}, {"reward": linear(1.3)}, {"nfe": 605}):
        assert hashes(**other)[1] != tree, other
    assert hashes(batch_size=8)[1] == hashes(method=ts.BestOfN(n=120))[1] == tree


def test_tasks_differ_in_their_hash():
    result = ts.search(BED, R, ts.BestOfN(), prompts=["a", "a"], budget=ts.Budget(nfe=100))
    first, second = (task.certificate() for task in result.tasks)
    assert first.settings_hash != second.settings_hash
    assert first.tree_hash != second.tree_hash


def test_the_command_line_shows_it(tmp_path, capsys):
    words = ["--kernel", "gaussian(dim=2)", "--reward", "linear((1, 0))", "--nfe", "500"]
    store = str(tmp_path / "run")
    assert main(["run", "best-of-n", *words, "--store", store]) == 0
    capsys.readouterr()
    assert main(["show", store]) == 0
    shown, card = capsys.readouterr().out, (tmp_path / "run" / "README.md").read_text("utf-8")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"][0]["certificate"]
    for text in (shown, card):
        assert found["hash"] in text
        assert "95 % interval" in text
        assert "bias, self_normalised" in text
        assert "no held-out reward" in text
    assert main(["show", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certificates"] == [found]


def test_a_run_made_from_python_is_shown(tmp_path, capsys):
    ts.search(BED, R, method_of("fk"), prompts=["a", "b"], budget=ts.Budget(nfe=800), store=tmp_path / "run")
    assert main(["show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "certificate of FeynmanKac, task 1: b" in shown
    with pytest.raises(ts.StoreError, match="without its kernel"):
        read_result_of(tmp_path / "run")[1].tasks[0].samples  # noqa: B018


def test_a_comparison_raises_the_alarm(tmp_path, capsys):
    words = ["--kernel", "gaussian(dim=2)", "--reward", "linear((1, 0))", "--also", "quadratic(1, (0.3, 0))"]
    store = str(tmp_path / "c")
    assert main(["compare", *words, "--methods", "best_of_n", "--nfe", "2k", "--store", store]) == 0
    assert "ALARM" in capsys.readouterr().out
    assert "ALARM" in (tmp_path / "c" / "README.md").read_text("utf-8")
    record = json.loads((tmp_path / "c" / "comparison.jsonl").read_text())
    assert record["certificate"]["alarm"]["fires"] is True
