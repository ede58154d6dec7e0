import math

import pytest
import torch
from scipy import stats

from tests.support.beds import BEDS
from treesearch.backends.base import log_normal
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian, Tilt
from treesearch.testing import bare_chain

F64 = torch.float64
GRID = torch.linspace(-9, 9, 701, dtype=F64)
LAM = 0.7
TILTS = [Tilt(c=1.2), Tilt(k=1.5, y=1.5)]


def reward_on_grid(tilt):
    return tilt.c * GRID if tilt.k == 0 else -0.5 * tilt.k * (GRID - tilt.y) ** 2


def step_density(kernel, t):
    """q(y | x) on the grid, [x, y]."""
    n = len(GRID)
    law = kernel.transition(GRID[:, None], torch.full((n,), t))
    rows = law.take(torch.arange(n).repeat_interleave(n))
    return rows.log_prob(GRID.repeat(n)[:, None]).exp().reshape(n, n)


def marginal(kernel, t):
    """Closed form of p(x_t) on the grid."""
    chain = kernel.reverse
    mix = getattr(kernel, "log_mix", torch.zeros(1, dtype=F64))
    return torch.logsumexp(mix + log_normal(GRID[:, None, None], chain.mu[t], chain.var[t].sqrt()), 1).exp()


def test_reference_values_of_the_linear_bed(gaussian):
    tilted = gaussian.tilted(Tilt(c=1.2))
    assert tilted.log_z == pytest.approx(0.8208, abs=5e-5)
    assert float(tilted.mean) == pytest.approx(1.068, abs=5e-4)
    assert float(tilted.std) == pytest.approx(0.8)


def test_reference_values_of_the_quadratic_bed(gaussian):
    tilted = gaussian.tilted(Tilt(k=1.5, y=1.5))
    assert tilted.log_z == pytest.approx(-0.8875, abs=5e-5)
    at = torch.tensor([[0.4]], dtype=F64)
    assert float(tilted.value(at, torch.tensor([3]))) == pytest.approx(-0.8017, abs=5e-5)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_marginal_of_the_chain_is_exactly_the_data(steps):
    kernel = LinearGaussian(num_steps=steps)
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    mean = float(kernel.prior(zero))
    var = (float(kernel.prior(one)) - mean) ** 2
    for t in range(steps, 0, -1):
        level = torch.tensor([t])
        shift, end = (float(kernel.transition(x, level).mean) for x in (zero, one))
        law = kernel.transition(zero, level)
        mean, var = shift + (end - shift) * mean, (end - shift) ** 2 * var + float(law.std) ** 2
    assert mean == pytest.approx(0.3, abs=1e-12)
    assert var == pytest.approx(0.64, abs=1e-12)


def test_the_endpoint_is_the_mean_of_the_data_given_the_state(gaussian):
    x = torch.tensor([[0.7]], dtype=F64)
    for t in range(1, 6):
        mean = x
        for s in range(t, 0, -1):
            mean = gaussian.transition(mean, torch.tensor([s])).mean
        torch.testing.assert_close(gaussian.transition(x, torch.tensor([t])).endpoint, mean)


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_every_marginal_of_the_chain_is_the_noised_data(name):
    kernel = BEDS[name]
    density = marginal(kernel, kernel.num_steps)
    for t in range(kernel.num_steps, 0, -1):
        density = torch.trapezoid(density[:, None] * step_density(kernel, t), GRID, dim=0)
        torch.testing.assert_close(density, marginal(kernel, t - 1), atol=1e-8, rtol=0)


@pytest.mark.parametrize("tilt", TILTS, ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_soft_values_obey_their_recursion(name, tilt):
    kernel = BEDS[name]
    tilted = kernel.tilted(tilt, LAM)
    inside = GRID.abs() < 3  # further out, the grid's edge is in reach
    value = reward_on_grid(tilt)
    for t in range(1, kernel.num_steps + 1):
        value = torch.trapezoid(step_density(kernel, t) * (LAM * value).exp(), GRID, dim=1).log() / LAM
        exact = tilted.value(GRID[:, None], torch.full((len(GRID),), t))
        torch.testing.assert_close(value[inside], exact[inside], atol=1e-6, rtol=0)
        value = exact
    whole = torch.trapezoid(marginal(kernel, kernel.num_steps) * (LAM * value).exp(), GRID)
    assert float(whole.log()) == pytest.approx(tilted.log_z, abs=1e-6)


@pytest.mark.parametrize("tilt", TILTS, ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_the_tilted_law_is_the_data_times_exp_of_the_reward(name, tilt):
    kernel = BEDS[name]
    tilted = kernel.tilted(tilt, LAM)
    want = marginal(kernel, 0) * (LAM * reward_on_grid(tilt) - tilted.log_z).exp()
    got = (tilted.weight.log() + log_normal(GRID[:, None, None], tilted.mean, tilted.std)).exp().sum(1)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_samples_of_the_chain_are_the_data(name):
    kernel = BEDS[name]
    samples = bare_chain(kernel, 20_000)[-1][:, 0]
    density = marginal(kernel, 0)
    cdf = torch.cumulative_trapezoid(density, GRID).numpy()
    assert stats.kstest(samples.numpy(), lambda x: interpolate(x, cdf)).pvalue > 1e-3


def interpolate(x, cdf):
    import numpy as np

    return np.interp(x, GRID[1:].numpy(), cdf)


def test_many_dimensions_are_independent_copies(gaussian):
    three = LinearGaussian(dim=3)
    x = torch.tensor([[0.1, -2.0, 0.5]], dtype=F64)
    t = torch.tensor([4])
    together, alone = three.transition(x, t), gaussian.transition(x.T, t.expand(3))
    torch.testing.assert_close(together.mean, alone.mean.T)
    assert three.tilted(Tilt(c=0.5)).log_z == pytest.approx(3 * gaussian.tilted(Tilt(c=0.5)).log_z)
    assert three.tilted(Tilt(k=0.5, y=1.0)).log_z == pytest.approx(3 * gaussian.tilted(Tilt(k=0.5, y=1.0)).log_z)


def test_a_mixture_of_one_is_the_gaussian(gaussian):
    one = GaussianMixture(num_steps=5, weights=(2.0,), means=((0.3,),), stds=(0.8,))
    assert one.tilted(Tilt(c=1.2)).log_z == pytest.approx(gaussian.tilted(Tilt(c=1.2)).log_z)
    x, t = torch.tensor([[0.4]], dtype=F64), torch.tensor([3])
    torch.testing.assert_close(one.transition(x, t).mean[:, 0], gaussian.transition(x, t).mean)


def test_the_ring_has_equal_modes():
    samples = bare_chain(GaussianMixture.ring(50), 4000)[-1]
    angle = torch.atan2(samples[:, 1], samples[:, 0])
    mode = ((angle / (2 * math.pi) * 8).round().long() % 8).bincount(minlength=8)
    assert stats.chisquare(mode.numpy()).pvalue > 1e-3
    assert abs(float(samples.norm(dim=1).mean()) - 4) < 0.05


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"dim": 0}, {"std": -1.0}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected a positive (whole )?number"):
        LinearGaussian(**wrong)
