"""Known entries as observations: the conditional law of the chain, by weights, and trajectory kernels."""

from __future__ import annotations

import math

import pytest
import torch

import treesearch as ts
from tests.support.laws import populations, unbiased
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import Spread, Steered
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.trajectory import TrajectoryKernel
from treesearch.backends.models.unet1d import TrajectoryNetwork
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels, known
from treesearch.rewards.observation import masked, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
TOLERANCE = 0.5


def matrix(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=F64)


BASE = GaussianTrajectories.of_system(
    matrix(0.9), matrix(0.7), matrix(-0.5), horizon=3, start=1.0, noise=0.5, behaviour=0.6, num_steps=8
)
MASK = torch.tensor([[True, False], [False, False], [True, False]])
VALUES = torch.tensor([1.0, -0.4], dtype=F64)


def seen(tolerance: float = TOLERANCE) -> Reward:
    return measurement(masked(MASK), VALUES, tolerance=tolerance)


def conditional(tolerance: float = TOLERANCE) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean, covariance and log density of the chain's law given the values up to the tolerance."""
    mean, cov = BASE.law
    at = MASK.flatten()
    noisy = cov[at][:, at] + tolerance**2 * torch.eye(2, dtype=F64)
    gain, gap = cov[:, at] @ torch.linalg.inv(noisy), VALUES - mean[at]
    log_p = -0.5 * (gap @ torch.linalg.solve(noisy, gap) + torch.logdet(noisy) + 2 * math.log(2 * math.pi))
    return mean + gain @ gap, cov - gain @ cov[at], float(log_p)


REWARD = seen()
KERNEL = Steered(BASE, REWARD)
EVERY = {"potential": "difference", "schedule": (7, 6, 5, 4, 3, 2, 0)}
METHODS = {
    "importance sampling": ts.BestOfN(),
    "feynman-kac": ts.FeynmanKac(num_particles=8000, ess_threshold=0.5, **EVERY),
    "trees": ts.TreeSampling(),
}


@pytest.mark.parametrize("name", METHODS)
def test_draws_have_the_mean_and_covariance_of_the_conditional_law(name):
    """Importance weights of 8,000 rollouts with an effective size in the thousands: errors of a few hundredths."""
    rollouts = 2000 if name == "trees" else 8000
    found = ts.search(KERNEL, REWARD, METHODS[name], budget=ts.Budget(nfe=8 * rollouts), batch_size=8192)
    weight = torch.softmax(torch.as_tensor(found.log_weights), 0)
    x, (mean, cov, _) = found.samples.flatten(1), conditional()
    size = float(1 / (weight**2).sum())
    assert size > 500
    gap = weight @ x - mean
    assert (gap.abs() < 5 * (cov.diagonal() / size).sqrt()).all()
    spread = (x - weight @ x).T @ ((x - weight @ x) * weight[:, None])
    assert (spread - cov).norm() < 5 * float(cov.trace()) / math.sqrt(size)


def test_without_weights_the_same_proposal_is_off():
    found = ts.search(KERNEL, REWARD, ts.BestOfN(n=8000), batch_size=8192)
    assert (found.samples.flatten(1).mean(0) - conditional()[0]).abs().max() > 0.1


def test_the_density_of_the_values_has_no_bias():
    method = ts.FeynmanKac(num_particles=100, ess_threshold=0.5, **EVERY)
    unbiased(populations(KERNEL, REWARD, method, conditional()[2], 80))


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
def test_populations_live_at_small_tolerances(tolerance):
    """A pull alone, weighed step by step and credited at the end, leaves one to ten of 1,024 in the worst of seeds."""
    reward = seen(tolerance)
    method = ts.FeynmanKac(num_particles=1024, ess_threshold=0.5, **EVERY)
    found = ts.search(Steered(BASE, reward), reward, method, budget=ts.Budget(nfe=8 * 1024), batch_size=1024)
    assert found.diagnostics["ess"] > 30
    assert abs(found.log_z - conditional(tolerance)[2]) < 0.5


@pytest.fixture(scope="module")
def planner() -> TrajectoryKernel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TrajectoryNetwork(3, (8, 16))
    return TrajectoryKernel(
        network,
        channels=Channels(2, 1),
        normalisation=Normalisation((1.0, 0.0, 0.0), (2.0, 1.0, 1.0)),
        horizon=8,
        schedule=Schedule.variance_preserving(torch.linspace(0.99, 0.01, 100), 3, prediction="sample"),
    )


def test_a_way_point_beside_the_start_that_the_model_knows(planner):
    mask = torch.zeros(8, 3, dtype=torch.bool)
    mask[4, :2] = True
    reward = measurement(masked(mask), torch.full((2,), 0.5), tolerance=0.2)
    kernel = Steered(planner, reward, pilot=8)
    prompts = [known([3.0, 1.0]), known([-3.0, 0.0], [2.0, 2.0])]
    check_kernel(kernel, prompts=prompts, proposal=True, rows=6, atol=1e-4)
    result = ts.search(kernel, reward, ts.BestOfN(n=8), prompts=prompts)
    for task, prompt in zip(result.tasks, prompts, strict=True):
        torch.testing.assert_close(task.samples[:, 0, :2], torch.tensor(prompt["start"]).expand(8, 2))
        assert torch.isfinite(task.log_weights).all()


def test_entries_that_the_model_knows_are_not_moved(planner):
    mask = torch.zeros(8, 3, dtype=torch.bool)
    mask[0, :2] = True
    cond = planner.encode([known([3.0, 1.0])] * 4)
    kernel = Steered(planner, measurement(masked(mask), torch.full((2,), 9.0), tolerance=0.1), spread=(0.5,) * 4)
    x = kernel.prior(torch.randn(4, 8, 3), cond)
    for t in (3, 1):
        law = kernel.transition(x, torch.full((4,), t), cond)
        assert not law.log_weight(law.sample(torch.randn(4, 8, 3))).any()


def test_masks_values_and_tolerances_are_part_of_the_fingerprint():
    kernels = [
        KERNEL,
        Steered(BASE, seen(0.2)),
        Steered(BASE, measurement(masked(MASK), VALUES + 1, tolerance=TOLERANCE)),
        Steered(BASE, measurement(masked(~MASK), torch.zeros(4), tolerance=TOLERANCE)),
        Steered(BASE, REWARD, spread=Spread((0.1,) * 9, (), "another")),
    ]
    assert len({kernel.fingerprint for kernel in kernels}) == len(kernels)
    assert Steered(BASE, seen()).fingerprint == KERNEL.fingerprint
    assert seen() == REWARD != seen(0.2)
