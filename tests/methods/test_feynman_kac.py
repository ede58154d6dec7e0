import math

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from tests.support.beds import BEDS
from tests.support.laws import ShiftedPrior, exact_bed, populations, unbiased
from treesearch.backends.base import Guided, shift_mean
from treesearch.backends.exact.enumerable import DiscreteChain, MaskedChain
from treesearch.backends.exact.gaussian import Tilt
from treesearch.core.weights import log_mean
from treesearch.results.result import ALL_ZERO
from treesearch.rewards.analytic import constant, linear, quadratic
from treesearch.testing import bare_chain

POTENTIALS = ["difference", "max", "sum", "immediate"]
R, TILT = linear(0.8), Tilt(c=0.8)
FK = ts.FeynmanKac


def run(kernel, reward, method, budget=None, **options):
    return ts.search(kernel, reward, method, budget=budget or ts.Budget(nfe=400), batch_size=laws.WIDE, **options)


def forbid_negative(x):
    """r = x where x > 0, else -inf."""
    return torch.where(x[:, 0] > 0, 0.8 * x[:, 0], -math.inf)


# 1. Potentials telescope along every surviving lineage.


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize(
    "options",
    [
        {"ess_threshold": 1.0},
        {"ess_threshold": 0.9},
        {"ess_threshold": 1.0, "schedule": (5, 2, 0), "resampling": "multinomial"},
        {"ess_threshold": 1.0, "tempering": (0.1, 0.3, 0.5, 0.8, 1.0), "resampling": "ssp"},
    ],
    ids=["always", "adaptive", "subset", "tempered"],
)
def test_potentials_telescope_to_the_reward_of_each_surviving_lineage(monkeypatch, gaussian, potential, options):
    method = FK(num_particles=16, lam=1.0, potential=potential, **options)
    happened = laws.potentials_follow_lineages(monkeypatch, gaussian, linear(1.2), method, ts.Budget(iterations=8))
    assert happened > 5


def test_a_schedule_without_the_terminal_step_is_refused():
    with pytest.raises(ValueError, match="lacks 0"):
        FK(schedule=(5, 3))


# 2. E[Ẑ] = Z.

CELLS = [
    ("difference", 0.0, "systematic", None),
    ("difference", 0.8, "multinomial", None),
    ("difference", 0.8, "systematic", (5, 3, 0)),
    ("difference", 1.0, "ssp", None),
    ("max", 0.8, "stratified", None),
    ("max", 1.0, "residual", (4, 1, 0)),
    ("immediate", 0.8, "residual", None),
    ("immediate", 1.0, "systematic", (5, 0)),
    ("sum", 0.8, "ssp", None),
    ("sum", 1.0, "multinomial", (5, 3, 0)),
]


@pytest.mark.parametrize(("potential", "threshold", "scheme", "schedule"), CELLS)
def test_z_is_unbiased(gaussian, potential, threshold, scheme, schedule):
    lam = 0.3 if potential == "sum" else 1.0  # heavy-tailed otherwise
    method = FK(
        num_particles=8, lam=lam, potential=potential, ess_threshold=threshold, resampling=scheme, schedule=schedule
    )
    unbiased(populations(gaussian, R, method, gaussian.tilted(TILT, lam).log_z, 1200))


@pytest.mark.parametrize(
    ("k", "scheme", "n"), [(1, "systematic", 2000), (2, "multinomial", 1200), (2, "systematic", 1200), (2, "ssp", 1200)]
)
def test_z_is_unbiased_for_one_and_two_particles(gaussian, k, scheme, n):
    method = FK(num_particles=k, ess_threshold=1.0, resampling=scheme)
    unbiased(populations(gaussian, linear(0.5), method, gaussian.tilted(Tilt(c=0.5)).log_z, n))


@pytest.mark.parametrize("threshold", [0.9, 1.0])
@pytest.mark.parametrize(
    "kernel", [DiscreteChain.random(), MaskedChain.random(num_steps=4)], ids=["discrete", "masked"]
)
def test_z_is_unbiased_on_enumerable_chains(kernel, threshold):
    reward, log_z = exact_bed(kernel, lam=0.6)
    method = FK(num_particles=8, lam=0.6, ess_threshold=threshold)
    unbiased(populations(kernel, reward, method, log_z, 1200))


def test_z_is_unbiased_with_a_quadratic_reward_on_a_mixture():
    kernel = BEDS["mixture"]
    method = FK(num_particles=8, ess_threshold=0.8)
    log_z = kernel.tilted(Tilt(k=1.0, y=1.0)).log_z
    unbiased(populations(kernel, quadratic(1.0, 1.0), method, log_z, 1500))


@pytest.mark.parametrize("potential", ["difference", "immediate"])
def test_a_wrong_proposal_is_corrected_by_its_weights(gaussian, drifting, potential):
    method = FK(num_particles=8, potential=potential, ess_threshold=0.8)
    reward, log_z = linear(0.5), gaussian.tilted(Tilt(c=0.5)).log_z
    ratios = populations(drifting, reward, method, log_z, 1800)
    unbiased(ratios)
    uncorrected = populations(_Unweighted(drifting), reward, method, log_z, 200)
    gap, se = laws.error(uncorrected)
    assert gap > 10 * se


class _Unweighted:
    """Guidance without log p/q."""

    def __init__(self, kernel):
        self.kernel = kernel

    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t, cond)
        return type(law)(law.mean, law.std, law.endpoint)

    def __getattr__(self, name):
        if name == "kernel":
            raise AttributeError(name)
        return getattr(self.kernel, name)


def test_the_optimal_proposal_has_no_variance(gaussian):
    """Steps to N(A x + B + λ c a_{t-1} S², S²): with the prior's weight too, every weight is Z."""
    c = 0.8
    to_data = torch.cat([torch.ones(1), torch.cumprod(gaussian.reverse.gain[1:, 0], 0)])

    class Prior(ShiftedPrior):
        def __init__(self, kernel):
            super().__init__(kernel)
            mean, var = kernel.reverse.mu[-1, 0], kernel.reverse.var[-1, 0]
            self.q = torch.distributions.Normal(mean + c * to_data[-1] * var, var.sqrt())

    guide = shift_mean(lambda x, t, base, cond: c * to_data[t - 1][:, None] * base.std**2)
    result = run(Guided(Prior(gaussian), guide), linear(c), FK(num_particles=80, ess_threshold=0.0))
    exact = gaussian.tilted(Tilt(c=c)).log_z
    np.testing.assert_allclose(result.log_weights, exact, atol=1e-9)


def test_a_prior_proposal_is_corrected_by_its_weight(gaussian):
    kernel, reward, log_z = ShiftedPrior(gaussian), linear(0.5), gaussian.tilted(Tilt(c=0.5)).log_z
    unbiased(populations(kernel, reward, FK(num_particles=8, ess_threshold=0.8), log_z, 1200))


def test_fixed_tempering_keeps_z_unbiased(gaussian):
    method = FK(num_particles=8, ess_threshold=1.0, tempering=(0.1, 0.3, 0.5, 0.8, 1.0))
    unbiased(populations(gaussian, R, method, gaussian.tilted(TILT).log_z, 1500))


def test_a_forbidding_reward_at_the_end_keeps_z_unbiased(gaussian):
    m, s, c = 0.3, 0.8, 0.8
    exact = gaussian.tilted(TILT).log_z + math.log(0.5 * math.erfc(-(m + c * s**2) / s / 2**0.5))
    method = FK(num_particles=8, schedule=(0,))
    unbiased(populations(gaussian, forbid_negative, method, exact, 1500))


@pytest.mark.slow
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize(("threshold", "runs"), [(0.0, 2), (0.5, 5), (1.0, 2)])
def test_z_is_unbiased_over_many_populations_of_four(gaussian, potential, threshold, runs):
    lam = 0.3 if potential == "sum" else 1.0
    method = FK(num_particles=4, lam=lam, potential=potential, ess_threshold=threshold)
    log_z = gaussian.tilted(Tilt(c=1.2), lam).log_z
    ratios = [populations(gaussian, linear(1.2), method, log_z, 20_000, seed) for seed in range(runs)]
    unbiased(np.concatenate(ratios))


# 3. λ = 0, constants.


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_lambda_zero_and_constant_rewards_are_the_base_sampler(gaussian, potential, threshold):
    bare = bare_chain(gaussian, 80)[-1]
    for reward, lam, log_z in ((linear(1.2), 0.0, 0.0), (constant(0.7), 2.0, 1.4)):
        result = run(gaussian, reward, FK(num_particles=16, lam=lam, potential=potential, ess_threshold=threshold))
        assert torch.equal(result.samples, bare)
        assert result.diagnostics["resamplings"] == [0] * 5
        assert result.log_z == pytest.approx(log_z, abs=1e-12)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_constant_added_to_the_reward_shifts_log_z_and_changes_no_ancestor(gaussian, potential):
    method = FK(num_particles=20, potential=potential, lam=0.5, ess_threshold=1.0)
    one, other = (run(gaussian, linear(0.8) + shift, method) for shift in (0.0, 3.0))
    np.testing.assert_array_equal(one.tree.parent, other.tree.parent)
    assert torch.equal(one.samples, other.samples)
    assert other.log_z - one.log_z == pytest.approx(1.5, abs=1e-9)


# 4. Limits.


def test_one_particle_is_the_base_sampler(gaussian):
    result = run(gaussian, R, FK(num_particles=1, ess_threshold=1.0))
    assert torch.equal(result.samples, bare_chain(gaussian, 80)[-1])
    np.testing.assert_allclose(result.log_weights, R(result.samples), atol=1e-12)


def test_the_terminal_schedule_is_importance_sampling(gaussian):
    fk, bon = run(gaussian, R, FK(schedule=(0,))), run(gaussian, R, ts.BestOfN())
    assert torch.equal(fk.samples, bon.samples)
    torch.testing.assert_close(fk.log_weights, bon.log_weights)
    assert fk.log_z == pytest.approx(bon.log_z)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_resampling_every_potential_is_best_of_k(gaussian, potential):
    fk = run(gaussian, R, FK(num_particles=80, potential=potential, ess_threshold=0.0))
    bon = run(gaussian, R, ts.BestOfN())
    assert torch.equal(fk.samples, bon.samples)
    torch.testing.assert_close(fk.log_weights, bon.log_weights)
    assert torch.equal(fk.best(1)[0], bon.best(1)[0])


# 5. Log space.


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_rewards_give_numbers(gaussian, potential, scale):
    result = run(gaussian, linear(1.0) * 1e3 + scale, FK(num_particles=16, potential=potential, ess_threshold=1.0))
    assert math.isfinite(result.log_z)
    assert not result.log_weights.isnan().any()
    assert 1 <= result.diagnostics["ess"] <= 80
    assert all(1 - 1e-9 <= e <= 16 + 1e-9 for levels in result.diagnostics["ess_levels"] for e in levels)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_all_weights_zero_is_reported(gaussian, potential, threshold):
    result = run(gaussian, constant(-math.inf), FK(num_particles=16, potential=potential, ess_threshold=threshold))
    assert result.log_z == -math.inf
    assert result.log_z_se is None
    assert ALL_ZERO in result.diagnostics["warnings"]
    with pytest.raises(ts.ZeroWeights):
        result.draw(1)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_forbidden_endpoint_is_no_verdict_and_keeps_z_unbiased(gaussian, potential):
    """A zero potential above x_0 would lose the mass of what is still allowed: E[Ẑ]/Z = .80 for difference."""
    method = FK(num_particles=8, potential=potential, ess_threshold=0.6, lam=0.3 if potential == "sum" else 1.0)
    m, s, c = 0.3, 0.8, 0.8 * method.lam
    exact = gaussian.tilted(Tilt(c=c)).log_z + math.log(0.5 * math.erfc(-(m + c * s**2) / s / 2**0.5))
    unbiased(populations(gaussian, forbid_negative, method, exact, 2500))


# 6. - 8. One large population.


@pytest.mark.parametrize("potential", ["difference", "max", "immediate"])
def test_one_population_reaches_the_target(gaussian, potential):
    """The published code returns .302 here: it drops weights where it does not resample."""
    exact = float(gaussian.tilted(Tilt(c=1.2)).mean)
    method = FK(num_particles=20_000, potential=potential)
    laws.steered_to(gaussian, linear(1.2), method, exact, 0.04, ts.Budget(nfe=100_000))


def test_two_thousand_particles_reach_the_target(gaussian):
    laws.steered_to(gaussian, linear(1.2), FK(num_particles=2000), 1.068, 0.06, ts.Budget(nfe=10_000))


def test_temperatures_from_the_particles_are_consistent_and_say_so(gaussian):
    tilted = gaussian.tilted(Tilt(c=1.2))
    method = FK(num_particles=20_000, tempering="ess", ess_threshold=0.6)
    result = run(gaussian, linear(1.2), method, ts.Budget(nfe=100_000))
    assert abs(result.log_z - tilted.log_z) < 0.03
    assert abs(laws.posterior_mean(result) - float(tilted.mean)) < 0.04
    assert any("consistent, not unbiased" in warning for warning in result.diagnostics["warnings"])


def test_tempering_by_ess_starts_at_the_target_ess(gaussian):
    method = FK(num_particles=200, lam=20.0, tempering="ess", ess_threshold=0.6, ess_target=0.5)
    result = run(gaussian, linear(1.2), method, ts.Budget(nfe=1000))
    assert result.diagnostics["ess_levels"][0][0] == pytest.approx(100, rel=1e-6)
    assert result.diagnostics["resamplings"][0] > 0


# Merging and standard errors.


def test_unequal_populations_merge_by_k_times_z(gaussian):
    result = run(gaussian, R, FK(num_particles=8, ess_threshold=0.8), ts.Budget(nfe=5 * 19))
    sizes = result.diagnostics["populations"]
    assert sizes == [8, 8, 3]
    each = [log_mean(w.numpy()) for w in result.log_weights.split(sizes)]
    assert result.log_z == pytest.approx(math.log(np.average(np.exp(each), weights=sizes)))


def test_merging_unequal_populations_keeps_z_unbiased(gaussian):
    n, log_z = 500, gaussian.tilted(TILT).log_z
    method, budget = FK(num_particles=8, ess_threshold=0.8), ts.Budget(nfe=5 * 19 * n)
    unbiased(np.exp([t.log_z - log_z for t in run(gaussian, R, method, budget, prompts=list(range(n))).tasks]))


def test_the_standard_error_between_populations_is_calibrated(gaussian):
    n, k, many = 200, 8, 20
    method = FK(num_particles=k, ess_threshold=0.8)
    result = run(gaussian, R, method, ts.Budget(iterations=n * many), prompts=list(range(n)))
    exact = gaussian.tilted(TILT).log_z
    z = np.array([(task.log_z - exact) / task.log_z_se for task in result.tasks])
    assert 0.85 < z.std() < 1.25, z.std()
    assert abs(z.mean()) < 0.5


@pytest.mark.parametrize(
    ("scheme", "c", "threshold", "low", "high"),
    [
        ("multinomial", 1.2, 0.9, 0.8, 1.3),
        ("systematic", 1.2, 0.5, 0.8, 1.5),
        ("systematic", 1.2, 1.0, 1.0, 2.0),
        ("ssp", 2.5, 0.9, 0.8, 1.5),
    ],
)
def test_the_standard_error_of_one_population_comes_from_its_genealogy(gaussian, scheme, c, threshold, low, high):
    """Unbiased for multinomial resampling; an over-estimate, as a rule, for the others. Reported/true variance."""
    n, method = 400, FK(num_particles=100, ess_threshold=threshold, resampling=scheme)
    result = run(gaussian, linear(c), method, ts.Budget(iterations=n), prompts=list(range(n)))
    exact = gaussian.tilted(Tilt(c=c)).log_z
    z = np.exp([task.log_z - exact for task in result.tasks])
    se = np.array([task.log_z_se or np.nan for task in result.tasks])
    assert np.isnan(se).mean() < 0.1
    ratio = np.nanmean((se * z) ** 2) / z.var()
    assert low < ratio < high, ratio


@pytest.mark.parametrize(("size", "iterations", "rest"), [(16, 12, 3), (200, 1, 4)])
def test_the_standard_error_of_unequal_populations(gaussian, size, iterations, rest):
    """Reported over true variance; a last small population must not make a large one look precise."""
    n, nfe = 250, 5 * (size * iterations + rest)
    result = run(gaussian, R, FK(num_particles=size), ts.Budget(nfe=nfe * n), prompts=list(range(n)))
    assert result.tasks[0].diagnostics["populations"] == [size] * iterations + [rest]
    z = np.exp([task.log_z - gaussian.tilted(TILT).log_z for task in result.tasks])
    se = np.array([task.log_z_se for task in result.tasks], float)
    assert 0.75 < np.mean((se * z) ** 2) / z.var() < 1.9


def test_resampling_happens_below_the_threshold_and_only_there(gaussian):
    method, k = FK(num_particles=64, ess_threshold=0.7), 64
    result = run(gaussian, linear(1.2), method, ts.Budget(nfe=5 * k * 12))
    tree = result.tree
    for population, levels in enumerate(result.diagnostics["ess_levels"]):
        group, place = divmod(population, 256 // k)
        for j, effective in enumerate(levels[:-1]):
            start = 1 + (group * 5 + j + 1) * 256 + place * k
            parents = tree.parent[start : start + k]
            assert (len(np.unique(parents)) < k) == (effective < 0.7 * k)


def test_tempering_resamples_until_lambda_is_reached(gaussian):
    hard = FK(num_particles=2000, lam=5.0, tempering="ess")
    result = run(gaussian, linear(1.2), hard, ts.Budget(nfe=10_000))
    assert result.diagnostics["resamplings"][0] >= 3
    assert result.log_z == pytest.approx(gaussian.tilted(Tilt(c=1.2), 5.0).log_z, abs=0.7)


def test_one_lineage_has_no_standard_error(gaussian):
    result = run(gaussian, linear(30.0), FK(num_particles=80, ess_threshold=1.0))
    assert result.diagnostics["surviving_roots"] < 10
    assert result.log_z_se is None


# 7. Clones, cost.


def test_a_deterministic_kernel_is_refused_for_its_clones_could_never_part(gaussian):
    class Deterministic(_Unweighted):
        stochastic = (True, False, False, False, False, False)

    with pytest.raises(ValueError, match="deterministic"):
        run(Deterministic(gaussian), R, FK(num_particles=8))


def test_a_population_costs_k_times_t(gaussian):
    for threshold in (0.0, 1.0):
        result = run(gaussian, R, FK(num_particles=16, ess_threshold=threshold), ts.Budget(iterations=3))
        assert (result.cost.nfe, result.cost.reward_calls) == (3 * 16 * 5, 3 * 16 * 5)


def test_offspring_of_one_particle_draw_apart(gaussian):
    result = run(gaussian, linear(3.0), FK(num_particles=80, ess_threshold=1.0))
    assert result.diagnostics["surviving_roots"] < 40
    assert len(result.samples.unique()) == 80
