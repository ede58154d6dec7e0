"""TreeSampling: unbiased at every size, calibrated intervals, waves, and what it may see."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from tests.support.beds import BEDS
from treesearch.backends.base import Guided, shift_mean
from treesearch.backends.exact.gaussian import LinearGaussian, Tilt
from treesearch.backends.guidance import TrustRegion
from treesearch.core import values
from treesearch.core.values import Value
from treesearch.core.weights import log_mean
from treesearch.methods.genealogy import Genealogy
from treesearch.methods.tree_sampling import SplittingTree
from treesearch.rewards.analytic import constant, linear, quadratic
from treesearch.testing import bare_chain, check_method

METHOD = ts.TreeSampling()
CHAIN = LinearGaussian()  # T = 5
R, LOG_Z = linear(1.2), 1.2 * 0.3 + 1.2**2 * 0.8**2 / 2


def run(reward=R, kernel=CHAIN, method=METHOD, *, nfe=500, seed=0, **options):
    budget = options.pop("budget", ts.Budget(nfe=nfe * len(options.get("prompts", [0]))))
    return ts.search(kernel, reward, method, budget=budget, seed=seed, batch_size=laws.WIDE, **options)


def many(reward=R, kernel=CHAIN, method=METHOD, *, n=300, nfe=500, seed=0):
    """n independent searches, a task each."""
    return run(reward, kernel, method, nfe=nfe, seed=seed, prompts=list(range(n))).tasks


# E[Ẑ] = Z.


def near_one(ratios):
    gap, se = laws.error(ratios)
    assert abs(gap) < 4 * se
    assert se < 0.025


@pytest.mark.parametrize("leaves", [10, 100, 400])
def test_z_is_unbiased_on_the_chain(leaves):
    tasks = many(n={10: 500, 100: 100, 400: 60}[leaves], nfe=5 * leaves)
    assert [len(task.leaves) for task in tasks[:2]] == [leaves, leaves]
    near_one(np.exp([task.log_z - LOG_Z for task in tasks]))


def test_z_is_unbiased_with_weights_on_the_edges_and_a_coarse_schedule():
    kernel = Guided(LinearGaussian(), shift_mean(lambda x, t, base, cond: 0.2 * base.std))
    tasks = many(linear(0.8), kernel, ts.TreeSampling(schedule=(3, 1, 0)), n=150)
    assert any(task.tree.log_w.any() for task in tasks[:3])
    near_one(np.exp([task.log_z - (0.8 * 0.3 + 0.8**2 * 0.8**2 / 2) for task in tasks]))


def test_a_trust_region_keeps_it_unbiased_and_makes_it_better():
    """8-D, T = 20, r = 3 c·x: at 40 leaves values alone do not find the target, the gradient within its bound does."""
    kernel, reward = LinearGaussian(num_steps=20, dim=8), linear((3 / 8**0.5,) * 8)
    exact = kernel.tilted(Tilt(c=(3 / 8**0.5,) * 8), 1.0).log_z
    near_one(np.exp([t.log_z - LOG_Z for t in many(kernel=TrustRegion(CHAIN, R), n=100)]))
    plain, guided = (many(reward, k, n=30, nfe=800) for k in (kernel, TrustRegion(kernel, reward)))
    off = [np.median([abs(task.log_z - exact) for task in tasks]) for tasks in (plain, guided)]
    assert off[1] < 0.5 * off[0]


@pytest.mark.parametrize("name", ["masked", "discrete"])
def test_z_is_unbiased_on_chains_that_can_be_enumerated(name):
    reward, log_z = laws.exact_bed(BEDS[name])
    schedule = None if name != "masked" else (3, 2, 1, 0)
    tasks = many(reward, BEDS[name], ts.TreeSampling(schedule=schedule), n=120, nfe=80 * BEDS[name].num_steps)
    near_one(np.exp([task.log_z - log_z for task in tasks]))


def test_values_that_saw_their_own_wave_would_be_found_out(monkeypatch):
    """The tests above can fail: weights that look at the rewards of their own wave bias it by far."""
    step = ts.methods.tree_sampling.SplittingTree.step

    def peeking(self, level, reward, log_w, uniforms):
        ancestors = step(self, level, reward, log_w, uniforms)
        if level == len(self.twists):
            self.log_w = self.log_w + 0.5 * (self.reward > np.median(self.reward))
        return ancestors

    monkeypatch.setattr(ts.methods.tree_sampling.SplittingTree, "step", peeking)
    gap, se = laws.error(np.exp([task.log_z - LOG_Z for task in many(n=100)]))
    assert abs(gap) > 10 * se


# How good it is.


def test_intervals_of_log_z_cover():
    tasks = many(n=150, nfe=1_000)
    inside = [abs(task.log_z - LOG_Z) < 1.96 * task.log_z_se for task in tasks]
    narrow = [abs(task.log_z - LOG_Z) < 0.8 * task.log_z_se for task in tasks]
    assert 0.88 <= np.mean(inside) <= 0.995
    assert np.mean(narrow) < 0.85


def test_its_error_is_no_larger_than_that_of_independent_rollouts():
    tasks = many(n=200)
    own = np.std(np.exp([task.log_z - LOG_Z for task in tasks]))
    plain = np.std(np.exp([t.log_z - LOG_Z for t in many(method=ts.BestOfN(), n=200)]))
    assert own < 1.15 * plain  # measured on 400 trees: .95


def test_it_holds_where_importance_sampling_and_soft_values_collapse():
    """r = 4 c·x in 8-D: importance sampling has an ESS fraction of exp(-λ² s²) = 4·10⁻⁵."""
    kernel, reward = LinearGaussian(num_steps=20, dim=8), linear((4 / 8**0.5,) * 8)
    exact = kernel.tilted(Tilt(c=(4 / 8**0.5,) * 8), 1.0).log_z

    def off(method):
        return np.median([abs(task.log_z - exact) for task in many(reward, kernel, method, n=12, nfe=20_000)])

    own = off(METHOD)
    assert own < 0.25
    assert off(ts.BestOfN()) > 3 * own
    assert off(ts.DiffusionTreeSampling()) > 3 * own


def test_draws_have_the_moments_of_the_target():
    draws = torch.cat([task.draw(500)[:, 0] for task in many(n=10, nfe=5_000)])
    assert draws.mean() == pytest.approx(0.3 + 1.2 * 0.64, abs=0.06)  # 3.5 standard errors
    assert draws.std() == pytest.approx(0.8, abs=0.06)


# What a wave does.


def test_a_sixteenth_then_three_times_all_before():
    assert run(nfe=5 * 640).diagnostics["waves"] == [40, 120, 480]
    assert run(nfe=5 * 63).diagnostics["waves"] == [63]
    assert sum(run(nfe=5 * 1_000).diagnostics["waves"]) == 1_000
    assert run(nfe=5 * 1_000 + 4).cost.nfe == 5_000


def test_a_larger_budget_goes_on_with_what_was_learnt(tmp_path):
    first = run(nfe=5 * 640, store=tmp_path / "run")
    grown = ts.resume(tmp_path / "run", CHAIN, R, budget=ts.Budget(nfe=5 * 4_000))
    assert grown.diagnostics["waves"] == [40, 120, 480, 3_360]
    np.testing.assert_array_equal(grown.rewards[:640], first.rewards)
    assert grown.log_z == pytest.approx(LOG_Z, abs=0.15)


def test_waves_are_weighed_by_the_square_root_rule():
    result = run(nfe=5 * 640)
    per_wave = result.diagnostics["log_z_waves"]
    alpha = np.diff(np.array([0, 40, 160, 640]) ** 1.5)
    assert result.log_z == pytest.approx(math.log(alpha @ np.exp(per_wave) / alpha.sum()))
    assert log_mean(result.log_weights.numpy()) == pytest.approx(result.log_z)
    mass = np.exp(result.log_weights.numpy())
    parts = [part.sum() for part in np.split(mass, [40, 160])]
    np.testing.assert_allclose(np.array(parts) / sum(parts), alpha * np.exp(per_wave) / (alpha @ np.exp(per_wave)))


def test_twists_come_from_earlier_waves_alone(monkeypatch):
    seen, fit = [], values.fit

    def watched(u, *rest):
        seen.append(len(u))
        return fit(u, *rest)

    monkeypatch.setattr(values, "fit", watched)
    run(nfe=5 * 640)
    assert sorted(set(seen)) == [40, 160]


def test_the_first_wave_is_a_population_with_the_prior_slopes():
    """One wave of 63 by hand: the levels' twists are κ_t r̂, and without a split weights telescope to λ r."""
    mild = run(linear(0.2), nfe=5 * 63)
    assert (np.bincount(mild.tree.parent[1:])[1:] <= 1).all()
    torch.testing.assert_close(mild.log_weights, 0.2 * mild.samples[:, 0])
    result = run(nfe=5 * 63)
    slopes = result.diagnostics["slopes"]
    assert slopes == {t: pytest.approx((1 - t / 5) ** 2) for t in (4, 3, 2, 1)}
    tree, leaf = result.tree, result.leaves[7]
    path = [leaf]
    while tree.parent[path[-1]] > 0:
        path.append(tree.parent[path[-1]])
    assert tree.t[path[::-1]].tolist() == [4, 3, 2, 1, 0]


# Limits.


def test_lambda_zero_is_the_base_sampler():
    found = run(method=ts.TreeSampling(lam=0.0), nfe=5 * 100)
    assert torch.equal(found.samples, CHAIN.decode(bare_chain(CHAIN, 100)[-1]))
    assert found.log_z == 0
    for wave in found.log_weights.split(found.diagnostics["waves"]):
        assert (wave == wave[0]).all()


def test_a_constant_reward_is_a_constant_in_log_z():
    assert run(constant(3.0)).log_z == pytest.approx(3.0)
    plain, moved = run(), run(lambda x: R(x) + 40.0)
    assert moved.log_z == pytest.approx(plain.log_z + 40, abs=1e-9)
    np.testing.assert_array_equal(moved.tree.parent, plain.tree.parent)


def test_forbidden_samples_carry_no_weight():
    def forbid(x):
        return torch.where(x[:, 0] > 0, 0.8 * x[:, 0].double(), -math.inf)

    result = run(forbid, nfe=5 * 2_000)
    exact = _half_space(0.8)
    assert result.log_z == pytest.approx(exact, abs=0.1)
    assert (result.draw(500) > 0).all()
    none = run(lambda x: torch.full((len(x),), -math.inf))
    assert none.log_z == -math.inf
    assert none.log_z_se is None


def _half_space(c):
    """log E[exp(c x); x > 0] for x ~ N(.3, .64)."""
    tilt = c * 0.3 + c * c * 0.64 / 2
    return tilt + math.log(0.5 * math.erfc(-(0.3 + c * 0.64) / (0.8 * 2**0.5)))


def test_extreme_rewards_make_no_nan():
    for scale in (1e-12, 1e4, 1e9):
        result = run(quadratic(scale, (1.0,)), nfe=5 * 300)
        assert math.isfinite(result.log_z)
        assert torch.isfinite(result.log_weights).any()
        assert not torch.isnan(result.log_weights).any()


@pytest.mark.parametrize("kernel", [CHAIN, LinearGaussian(num_steps=8, dim=2)], ids=["five steps", "eight"])
def test_it_obeys_the_laws_of_methods(kernel):
    check_method(METHOD, kernel, linear(1.2 if kernel is CHAIN else (0.6, 0.8)))


def test_budgets_of_other_kinds():
    assert len(run(budget=ts.Budget(iterations=90)).leaves) == 90
    assert run(budget=ts.Budget(reward_calls=500)).cost.reward_calls == 500
    timed = run(budget=ts.Budget(seconds=0.3))
    assert timed.diagnostics["waves"][0] == 1  # by which the pace is measured
    assert max(timed.diagnostics["waves"]) <= 2 * 1_024  # one in place of two, where no more seem to fit


def test_settings_are_checked():
    with pytest.raises(ValueError, match="lacks 0"):
        ts.TreeSampling(schedule=(3, 1))
    with pytest.raises(ValueError, match="lam is -1"):
        ts.TreeSampling(lam=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHOD.lam = 2.0
    assert ts.TreeSampling(schedule=(4, 2, 0)).schedule == (4, 2, 0)


# What its intervals are worth.


def test_an_interval_is_relied_on_where_lineages_are_many():
    easy = [task.certificate().log_z for task in many(n=60, nfe=2_000)]
    assert np.mean([found.standing == "ok" for found in easy]) > 0.9
    few = many(n=60, nfe=5 * 24)
    assert all(task.certificate().log_z.standing != "ok" for task in few)
    steep, exact = [task.certificate().log_z for task in many(linear(5.0), n=60, nfe=500)], 5 * 0.3 + 25 * 0.32
    assert np.mean([found.standing == "ok" for found in steep]) < 0.5
    assert any("effective lineages" in found.reason for found in steep)
    ok = [found.low <= exact <= found.high for found in steep if found.standing == "ok"]
    assert np.mean(ok or [True]) >= 0.8


def test_equal_weights_are_known_exactly():
    for found in (run(constant(3.0), nfe=5 * 640), run(method=ts.TreeSampling(lam=0.0), nfe=5 * 640)):
        known = found.certificate().log_z
        assert (known.standing, known.se) == ("ok", pytest.approx(0.0, abs=1e-6))


# Golden.


def test_constants_are_the_ones_that_were_measured():
    """The same noise leads to the same tree: another threshold, floor, growth or number of bins does not."""
    found = run(linear(2.0), nfe=2_000)
    assert found.diagnostics["waves"] == [25, 75, 300]
    offspring = np.bincount(found.tree.parent[1:], minlength=len(found.tree))[1:]
    split = [int((offspring[found.tree.t[1:] == t] > 1).sum()) for t in (4, 3, 2, 1)]
    assert split == [0, 0, 54, 80]
    assert found.log_z == pytest.approx(1.839221273474469, abs=1e-9)
    assert list(found.diagnostics["slopes"].values()) == pytest.approx(
        [0.3552499184887502, 0.819826683057183, 0.7717295042131003, 0.8832959113510181], abs=1e-9
    )


def test_an_endpoint_that_is_forbidden_is_no_verdict():
    """It keeps the value of the level above, whatever the others' are."""
    values = [Value.guess(0.5), Value.guess(1.0)]
    wave = SplittingTree(1.0, values, np.zeros(4), Genealogy.of(4), np.zeros(4))
    wave.step(0, np.array([0.2, -0.2, 0.1, 0.1]), np.zeros(4), lambda: np.zeros(5))
    wave.step(1, np.array([0.3, -np.inf, 0.2, 0.0]), np.zeros(4), lambda: np.zeros(5))
    np.testing.assert_allclose(wave.log_w, [0.3, -0.1, 0.2, 0.0])
    wave.step(2, np.array([0.4, 0.5, 0.0, 0.1]), np.zeros(4), lambda: np.zeros(5))
    np.testing.assert_allclose(wave.log_w, [0.4, 0.5, 0.0, 0.1])
