"""Predictions converted into each other, and the SDE family whose discretisation `Chain` is, on closed forms."""

import itertools
import math

import pytest
import torch

from tests.support.flows import (
    F64,
    THREE,
    GaussianFlow,
    affine,
    between,
    diagonal,
    draws,
    law_of,
    log_snr,
    run,
    spectrum,
)
from treesearch.backends.chains.convert import QUANTITIES, convert, forward_sde, reverse_drift
from treesearch.backends.chains.diffusion import to_endpoint
from treesearch.backends.chains.schedules import Schedule

ANY = (torch.tensor([1.0, 0.7, 0.2, 1.3], dtype=F64)[:, None], torch.tensor([0.1, 0.7, 0.9, 2.0], dtype=F64)[:, None])
RATES = (
    torch.tensor([-0.3, -1.0, -2.0, 0.4], dtype=F64)[:, None],
    torch.tensor([0.5, 1.0, 0.3, 1.5], dtype=F64)[:, None],
)
X, OUTPUT = draws(4, 3), draws(4, 3, seed=2)
PAIRS = list(itertools.permutations(QUANTITIES, 2))
ETAS = (0.0, 0.5, 1.0)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_conversion_goes_there_and_back(one, other):
    there = convert(OUTPUT, one, other, X, *ANY, RATES)
    back = convert(there, other, one, X, *ANY, RATES)
    assert (back - OUTPUT).abs().max() < 1e-10
    for third in QUANTITIES:
        at_once = convert(OUTPUT, one, third, X, *ANY, RATES)
        assert (convert(there, other, third, X, *ANY, RATES) - at_once).abs().max() < 1e-10
    assert torch.equal(convert(OUTPUT, one, one, X, *ANY, RATES), OUTPUT)


def test_quantities_are_what_they_say():
    x0, eps = draws(4, 3, seed=3), draws(4, 3, seed=4)
    alpha, sigma = ANY
    x = alpha * x0 + sigma * eps
    want = {
        "sample": x0,
        "epsilon": eps,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * x0,
        "flow": RATES[0] * x0 + RATES[1] * eps,
    }
    for one, other in PAIRS:
        assert (convert(want[one], one, other, x, alpha, sigma, RATES) - want[other]).abs().max() < 1e-12


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_the_chain_reads_its_network_alike(prediction):
    sigma = torch.tensor([0.1, 0.5, 0.9, 0.3], dtype=F64)[:, None]
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt()  # what the chain takes for granted
    for got, name in zip(to_endpoint(prediction, OUTPUT, X, alpha, sigma), ("sample", "epsilon"), strict=True):
        assert (got - convert(OUTPUT, prediction, name, X, alpha, sigma)).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("from_", "to", "alpha", "sigma", "said"),
    [
        ("noise", "v", 0.5, 0.5, "unknown quantity 'noise': choose epsilon, sample"),
        ("v", "x0", 0.5, 0.5, "unknown quantity 'x0'"),
        ("epsilon", "sample", 0.0, 1.0, "do not give x_0 and ε"),
        ("sample", "epsilon", 1.0, 0.0, "do not give x_0 and ε"),
        ("score", "sample", 1.0, 0.0, "do not give x_0 and ε"),
        ("v", "sample", math.nan, 1.0, "do not give x_0 and ε"),
    ],
)
def test_what_cannot_be_converted_is_told(from_, to, alpha, sigma, said):
    level = (torch.tensor([[v]], dtype=F64) for v in (alpha, sigma))
    with pytest.raises(ValueError, match=said):
        convert(OUTPUT, from_, to, X, *level)


def path(time):
    """α, σ and their derivatives of a smooth path that is not variance preserving."""
    return torch.cos(time), time * (1 + 0.5 * time), (-torch.sin(time), 1 + time)


def test_the_flow_is_the_drift_without_noise():
    alpha, sigma, rates = path(torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=F64)[:, None])
    score = convert(OUTPUT, "v", "score", X, alpha, sigma)
    drift = reverse_drift(X, score, *forward_sde(alpha, sigma, rates), eta=0.0)
    assert (convert(OUTPUT, "v", "flow", X, alpha, sigma, rates) - drift).abs().max() < 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_a_step_of_the_chain_is_the_sde_to_first_order(eta):
    """Of a step of length dt, mean and variance are the drift's and η² g² dt, up to dt²: a quarter each halving."""
    time, gaps = torch.tensor([0.8], dtype=F64), []
    moments = diagonal([0.5, -1.0], [2.0, 0.1])
    for dt in (0.02, 0.01, 0.005):
        times = torch.cat([time - dt, time])
        alpha, sigma, rates = path(times)
        kernel = GaussianFlow(Schedule(torch.ones(1), alpha, sigma, "sample"), moments, eta)
        x = draws(1, 2)
        law = kernel.transition(x, torch.tensor([1]))
        f, g2 = (v[1] for v in forward_sde(alpha, sigma, rates))
        score = convert(law.endpoint, "sample", "score", x, *kernel.level(1))
        mean = x - dt * reverse_drift(x, score, f, g2, eta)
        gaps.append([float((law.mean - mean).norm()), abs(float(law.std**2) - eta**2 * float(g2) * dt)])
    for one, other in itertools.pairwise(gaps):
        assert 3.6 < one[0] / other[0] < 4.4
        assert eta == 0 or 3.6 < one[1] / other[1] < 4.4


@pytest.mark.parametrize(("eta", "step"), [*((eta, "ddim") for eta in ETAS), (1.0, "ddpm")])
def test_every_sampler_of_the_family_has_the_moments_of_the_data(eta, step):
    """A linear chain's law is known by recursion: no draws, so 3 % is of discretisation alone."""
    moments = THREE
    kernel = GaussianFlow(log_snr(500), moments, eta, step)
    (top, noise), (end, left) = kernel.level(-1), kernel.level(0)
    mean, cov = law_of(kernel, top * moments.mean, torch.diag(top**2 * moments.eigenvalues + noise**2))
    torch.testing.assert_close(mean, end * moments.mean, atol=0.0, rtol=0.03)
    torch.testing.assert_close(cov.diag(), end**2 * moments.eigenvalues + left**2, atol=0.0, rtol=0.03)
    assert (cov - torch.diag(cov.diag())).abs().max() < 1e-12


@pytest.mark.parametrize("eta", ETAS)
def test_diffusion_and_flow_with_one_log_snr_grid_end_alike(eta):
    """With y = x/α a step knows σ/α alone: the same x_T, noise and grid give the same x_0 up to the scale α."""
    grid, ends = log_snr(40), []
    ratio = torch.cat([torch.zeros(1, dtype=F64), (grid.sigma / grid.alpha)[1:]])
    levels = {"preserving": (1 + ratio**2).rsqrt(), "straight": 1 / (1 + ratio)}
    for alpha in levels.values():
        kernel = GaussianFlow(Schedule(grid.timestep, alpha, ratio * alpha, "sample"), spectrum(), eta)
        x = alpha[-1] * draws(8, 20)
        for t in range(40, 0, -1):
            x = kernel.transition(x, torch.full((8,), t)).sample(draws(8, 20, seed=t))
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() < 1e-6


def test_ddim_is_of_order_one():
    """Published for this spectrum and schedule: .00688 at 250 steps, .00173 at 1,000, of one x_T."""
    errors, x = {}, draws(32, 20)
    for steps in (250, 1000):
        kernel = GaussianFlow(between(steps), spectrum())
        want = kernel.flow(x, steps, 0)
        errors[steps] = float(((run(kernel, x) - want).norm(dim=1) / want.norm(dim=1)).mean())
    assert 3.6 < errors[250] / errors[1000] < 4.4
    assert 0.005 < errors[250] < 0.009


@pytest.mark.parametrize("eta", ETAS)
def test_every_sde_of_the_family_carries_the_same_densities(eta):
    """∂_t p + ∂_x(drift p) + η²/2 g² ∂_x² p = 0, as time runs forward and the drift is that of the way back."""
    x, time = torch.linspace(-8, 8, 1601, dtype=F64), torch.tensor(0.7, dtype=F64)
    data = ((0.3, -2.0, 0.4), (0.7, 1.0, 0.6))

    def density(at):
        alpha, sigma, _ = path(at)
        parts = [(w, alpha * m, (alpha**2 * s**2 + sigma**2).sqrt()) for w, m, s in data]
        return sum(w * torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi)) for w, m, s in parts)

    alpha, sigma, rates = path(time)
    p, dx, dt = density(time), float(x[1] - x[0]), 1e-4
    slope = lambda values: (values[2:] - values[:-2]) / (2 * dx)  # noqa: E731
    score = slope(p.log())
    drift = reverse_drift(x[1:-1], score, *forward_sde(alpha, sigma, rates), eta)
    change = (density(time + dt) - density(time - dt)) / (2 * dt)
    spread = (p[2:] - 2 * p[1:-1] + p[:-2]) / dx**2
    _, g2 = forward_sde(alpha, sigma, rates)
    residual = change[2:-2] + slope(drift * p[1:-1]) + 0.5 * eta**2 * g2 * spread[1:-1]
    assert change.abs().max() > 0.1
    assert residual.abs().max() < 1e-3


def test_a_probe_of_a_linear_chain_finds_its_step():
    """The recursion that other tests lean on."""
    kernel = GaussianFlow(log_snr(5), spectrum(), eta=1.0)
    slope, offset, std = affine(kernel, 3, draws(1, 20))
    x, z = draws(4, 20, seed=5), draws(4, 20, seed=6)
    want = kernel.transition(x, torch.full((4,), 3)).sample(z)
    assert (x @ slope.T + offset + std * z - want).abs().max() < 1e-12
