"""Shortest paths: the geodesic and its length, the chain on it, and what exact denoisers reach in few steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import Chain, DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.shortest_path import (
    fisher_length,
    levels,
    power_law,
    shortest_path,
)
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.rewards.cosines import cosine_transform
from treesearch.testing import check_kernel

T, K = 20, 1000
EPS = 2.0**-52
CIFAR = power_law((16, 16))
LENGTH = 36.1409  # √(½ Σ_f log² Σ_0) of it


def marginals(schedule: Schedule, spectrum: Tensor) -> Tensor:
    """Variances of x_0..x_T, (T + 1, *state)."""
    alpha, sigma = (v.reshape(len(v), *([1] * spectrum.ndim)) if v.ndim == 1 else v
                    for v in (schedule.alpha, schedule.sigma))  # fmt: skip
    return alpha**2 * spectrum + sigma**2


def test_marginals_are_on_the_geodesic():
    tau = torch.linspace(0, 1, T + 1, dtype=torch.float64)[:, None, None]
    geodesic = CIFAR ** (1 - tau)
    gap = (marginals(shortest_path(CIFAR, T), CIFAR) - geodesic).abs() / geodesic
    assert gap.max() <= 32 * math.log(1e5) * EPS  # a power of numbers up to 2e4, and a few operations on it


def test_ends_and_monotone():
    path = shortest_path(CIFAR, T)
    assert (path.alpha[0] == 1).all()
    assert (path.sigma[0] == 0).all()
    assert (path.alpha[-1] == 0).all()
    assert (path.sigma[-1] == 1).all()
    assert (path.alpha.diff(dim=0) < 0).all()
    assert (path.sigma.diff(dim=0) > 0).all()
    assert path.timestep.tolist() == pytest.approx([50.0 * t for t in range(1, T + 1)])


def test_both_halves_keep_their_digits():
    """1 - ᾱ where ᾱ is nearly 1, ᾱ where it is nearly 0, and the limit 1 - τ where Σ_0 is 1."""
    spectrum = torch.tensor([1e-12, 1e12, 1.0, 1 + 1e-7], dtype=torch.float64)
    kept, lost = levels(spectrum, torch.tensor([0.25]))
    assert lost[0, 0] == pytest.approx(1e-9, rel=2e-3)
    assert kept[0, 1] == pytest.approx(1e-3, rel=2e-3)
    assert kept[0, 2] == 0.75
    assert lost[0, 2] == 0.25
    assert kept[0, 3] == pytest.approx(0.75, abs=1e-7)
    assert (kept + lost - 1).abs().max() <= 4 * EPS


def test_length_of_the_path():
    closed = math.sqrt(0.5 * float(CIFAR.log().square().sum()))
    assert round(closed, 4) == LENGTH
    for steps in (1, 7, 100):
        assert fisher_length(marginals(shortest_path(CIFAR, steps), CIFAR)) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize(("path", "longer"), [("cosine", 1.125), ("linear", 1.113)])
def test_scalar_paths_are_longer(path, longer):
    k = torch.arange(K + 1, dtype=torch.float64)
    angle = ((k / K + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    linear = torch.cat([torch.ones(1), torch.cumprod(1 - torch.linspace(1e-4, 0.02, K), 0)]).double()
    bar = (angle / angle[0] if path == "cosine" else linear)[:, None, None]
    assert round(fisher_length(bar * CIFAR + 1 - bar) / LENGTH, 3) == longer


def test_one_spectrum_everywhere_is_a_scalar_chain():
    steps = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    bar = (1 - 0.3 ** (1 - steps)) / 0.7
    scalar = Chain(Schedule(1000 * steps[1:], bar.sqrt(), (1 - bar).sqrt(), "v"))
    entries = Chain(shortest_path(torch.full((2, 3), 0.3, dtype=torch.float64), T))
    gen = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=gen)
    t = torch.tensor([1, 9, T])
    for name in ("mean", "std", "endpoint"):
        one, other = (getattr(chain.law(x, t, v), name).expand(3, 2, 3) for chain in (scalar, entries))
        assert (one - other).abs().max() <= 64 * EPS, name  # a dozen operations, on √ᾱ of which ᾱ is near 0


def final_variance(schedule: Schedule, spectrum: Tensor, eta: float = 1.0) -> Tensor:
    """Of x_0, from N(0, I) by the chain with x̂_0 = E[x_0 | x_t] under N(0, Σ_0): each step is linear in x."""
    chain = Chain(schedule, eta=eta)
    variance = torch.ones_like(spectrum)[None]
    of = marginals(schedule, spectrum)
    for t in range(schedule.num_steps, 0, -1):
        level = torch.tensor([t])
        alpha = chain.at("alpha", level, variance)
        law = chain.law(torch.ones_like(variance), level, alpha * spectrum / of[t])
        variance = law.mean**2 * variance + law.std**2
    return variance[0]


def divergence(variance: Tensor, spectrum: Tensor) -> float:
    """KL(N(0, variance) || N(0, Σ_0))."""
    ratio = variance / spectrum
    return 0.5 * float((ratio - 1 - ratio.log()).sum())


@pytest.mark.parametrize(("eta", "ours", "theirs"), [(0.0, 3.97, 7.22), (1.0, 6.99, 15.77)])
def test_an_exact_denoiser_comes_nearer_in_few_steps(eta, ours, theirs):
    """KL of the law of x_0 to the data at T = 20, in closed form: the path's beside the cosine schedule's."""
    cosine = Schedule.variance_preserving(cosine_alphas_cumprod(K), T, prediction="sample")
    found = [divergence(final_variance(s, CIFAR, eta), CIFAR) for s in (shortest_path(CIFAR, T, "sample"), cosine)]
    assert found == pytest.approx([ours, theirs], abs=0.005)


def test_coordinates_are_orthonormal():
    matrix = cosine_transform(28)
    assert (matrix @ matrix.T - torch.eye(28)).abs().max() <= 28 * EPS
    wave = torch.cos(math.pi / 28 * 3 * (torch.arange(28, dtype=torch.float64) + 0.5))
    assert (matrix @ wave).abs().argmax() == 3


def test_a_kernel_on_a_shortest_path_obeys_the_laws():
    spectrum = torch.tensor([0.01, 1.0, 30.0])
    check_kernel(DiffusionKernel(lambda x, t: 0.5 * x, state_shape=(3,), schedule=shortest_path(spectrum, 4)))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_spectra_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="not above 0 and finite"):
        shortest_path(torch.tensor([1.0, bad]), T)


def test_noise_cannot_be_what_the_network_predicts():
    with pytest.raises(ValueError, match="must predict v or sample"):
        shortest_path(CIFAR, T, "epsilon")


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4", None, float("nan")])
def test_steps_are_a_whole_number(steps):
    with pytest.raises(ValueError, match=r"num_steps is .*, expected at least 1"):
        shortest_path(torch.ones(2, 2), steps)


def test_a_velocity_of_another_path_is_refused():
    with pytest.raises(ValueError, match="predict v or the sample"):
        shortest_path(torch.full((2, 2), 0.5), 4, "flow")
