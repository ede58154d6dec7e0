"""Gaussian data of any covariance: the chain's own law, and what observations say, against dense algebra."""

import math

import pytest
import torch

from treesearch.backends.exact.gaussian_states import GaussianStates, carried
from treesearch.testing import check_kernel

F64 = torch.float64
ROOT = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
MEAN = torch.linspace(-1, 1, 6, dtype=F64).reshape(1, 2, 3)
COV = ROOT @ ROOT.T / 6 + 0.1 * torch.eye(6, dtype=F64)
KERNEL = GaussianStates(MEAN, COV, num_steps=8)
ROWS = torch.randn(2, 6, dtype=F64, generator=torch.Generator().manual_seed(2))


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_the_endpoint_is_the_conditional_mean():
    x, t = noise(3, 1, 2, 3), torch.tensor([1, 4, 8])
    alpha, sigma = (v[t][:, None, None] for v in (KERNEL.chain.schedule.alpha, KERNEL.chain.schedule.sigma))
    noisy = alpha**2 * COV + sigma**2 * torch.eye(6, dtype=F64)
    gap = (x.flatten(1) - alpha[:, 0] * MEAN.flatten())[..., None]
    want = MEAN.flatten() + (alpha * COV @ torch.linalg.solve(noisy, gap))[..., 0]
    assert (KERNEL.transition(x, t).endpoint.flatten(1) - want).abs().max() < 1e-12


def test_the_law_of_the_chain_is_that_of_its_draws_and_nears_the_data_s():
    x = KERNEL.prior(noise(40_000, 1, 2, 3))
    for t in range(8, 0, -1):
        x = KERNEL.transition(x, torch.full((40_000,), t)).sample(noise(40_000, 1, 2, 3, seed=t))
    mean, cov = KERNEL.law
    gap, among = x.flatten(1).mean(0) - mean, torch.cov(x.flatten(1).T) - cov
    assert (gap.abs() < 5 * (cov.diagonal() / 40_000).sqrt()).all()
    deviation = ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / 40_000).sqrt()
    assert (among.abs() < 5 * deviation).all()
    few, many = ((GaussianStates(MEAN, COV, num_steps=n).law[1] - COV).norm() for n in (8, 800))
    assert many < 0.02 * few


def test_without_noise_a_chain_is_affine_too():
    still = GaussianStates(MEAN, COV, num_steps=8, eta=0.0)
    z = noise(5, 1, 2, 3)
    x = still.prior(z)
    for t in range(8, 0, -1):
        x = still.transition(x, torch.full((5,), t)).mean
    mean, cov = carried(still)
    assert (torch.linalg.eigvalsh(cov) > 0).all()
    axes = still._axes  # the map is the same along each of them: √ of the variance
    gain = (axes.T @ cov @ axes).diagonal().sqrt()
    assert (x.flatten(1) - (mean + (z.flatten(1) @ axes * gain) @ axes.T)).abs().max() < 1e-10


def test_the_posterior_is_that_of_the_joint_gaussian():
    y, std = noise(2, seed=3), 0.3
    found, (mean, cov) = KERNEL.given(ROWS, y, std), KERNEL.law
    precision = torch.linalg.inv(cov) + ROWS.T @ ROWS / std**2
    want = torch.linalg.inv(precision)
    assert (found.cov - want).abs().max() < 1e-12
    assert (found.mean - want @ (torch.linalg.solve(cov, mean) + ROWS.T @ y / std**2)).abs().max() < 1e-11
    seen = torch.distributions.MultivariateNormal(ROWS @ mean, ROWS @ cov @ ROWS.T + std**2 * torch.eye(2, dtype=F64))
    assert math.isclose(found.log_evidence, float(seen.log_prob(y)), abs_tol=1e-11)
    exact = KERNEL.given(ROWS, y, 0.0)
    assert (ROWS @ exact.mean - y).abs().max() < 1e-11


def test_its_steps_obey_the_laws():
    check_kernel(KERNEL, rows=6)


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        (torch.eye(5), r"expected \(6, 6\)"),
        (torch.eye(6) - 1.0, "is no covariance"),
        (torch.eye(6) + torch.ones(6, 6).triu(1), "is no covariance"),
    ],
)
def test_what_is_no_covariance_is_refused(cov, message):
    with pytest.raises(ValueError, match=message):
        GaussianStates(MEAN, cov)
