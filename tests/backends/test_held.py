"""Guides leave the entries that a kernel holds, with weights and without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS, Aligned, Diffuser, EluCD, FlowChef, LaCon, PolicyGuided, Steered
from treesearch.backends.models.aligner import Aligner, Plan
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards import edges, masked, measurement
from treesearch.rewards.analytic import quadratic
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.policy import PolicyLikelihood

F64 = torch.float64
STEPS = 4
BOWL = quadratic(1.0, 2.0)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A fixed smooth function with a part to read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        for i, weight in enumerate(self.parameters()):
            weight.data = 0.4 * draws(*weight.shape, seed=i)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x)))


def images(eta: float) -> DiffusionKernel:
    share = torch.cat([torch.zeros(1, dtype=F64), torch.linspace(0.02, 0.98, STEPS, dtype=F64)])
    schedule = Schedule(torch.arange(1, STEPS + 1), (1 - share).sqrt(), share.sqrt())
    return DiffusionKernel(Net(), state_shape=(1, 8, 8), schedule=schedule, eta=eta)


class Plans(GaussianTrajectories):
    """Plans that remember what they were asked about."""

    asked: torch.Tensor

    def transition(self, x, t, cond=None):
        object.__setattr__(self, "asked", x)
        return super().transition(x, t, cond)


def plans(eta: float = 1.0) -> Plans:
    cov = torch.eye(6, dtype=F64) + 0.3
    return Plans(torch.zeros(3, 2, dtype=F64), cov, channels=Channels(1, 1), num_steps=STEPS, eta=eta)


def held(kernel, path: bool) -> Clamp:
    shape = tuple(kernel.state_shape)
    mask = draws(*shape, seed=8) > 0
    return Clamp(kernel, mask, draws(*((STEPS + 1,) if path else ()), *shape, seed=9))


def lacon(kernel: Clamp) -> LaCon:
    plan = Plan(condition="edges(2)", shape=(1, 4, 4), parts=("inner",), channels=(4,), width=6, knots=5)
    aligner = Aligner(plan).eval().requires_grad_(False).double()
    aligner.basis.copy_(torch.eye(16, dtype=F64))
    for i, weight in enumerate(aligner.parameters()):
        weight.data = 0.4 * draws(*weight.shape, seed=i)
    return LaCon(Aligned(kernel, aligner), measurement(edges(2), draws(1, 4, 4), tolerance=0.3))


def steered(kernel: Clamp, rule: str) -> Steered:
    return Steered(
        kernel, measurement(masked(torch.ones(3, 2) > 0), draws(6), tolerance=1.0), spread=(0.5,) * 5, rule=rule
    )


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize(
    ("make", "base"),
    [
        (lacon, images(0.0)),
        (lambda k: FlowChef(k, BOWL), plans(0.0)),
        (lambda k: steered(k, "paper"), plans()),
        (lacon, images(1.0)),
        (lambda k: FlowChef(k, BOWL), plans()),
        (lambda k: steered(k, "calibrated"), plans()),
        (lambda k: TDS(k, BOWL), plans()),
        (lambda k: Diffuser(k, BOWL, n_guide_steps=2), plans()),
    ],
    ids=["lacon, still", "flowchef, still", "steered, paper", "lacon", "flowchef", "steered", "tds", "diffuser"],
)
def test_a_mean_that_is_moved(make, base, path):
    kernel = held(base, path)
    guide, x, t = make(kernel), draws(2, *kernel.state_shape, seed=3), torch.tensor([4, 2])
    law, own = guide.transition(x, t), kernel.transition(x, t)
    assert torch.equal(law.mean[:, kernel.mask], own.mean[:, kernel.mask])
    assert (law.mean != own.mean)[:, ~kernel.mask].all()
    assert (law.base_mean is None) == (guide.departs != kernel.departs)


@pytest.mark.parametrize(
    "make", [lambda k: EluCD(k, BOWL), lambda k: steered(k, "calibrated")], ids=["elucd", "steered"]
)
def test_noise_of_what_is_held_moves_nothing_else(make):
    with pytest.raises(ValueError, match="a chain without noise has no weights"):
        make(held(plans(0.0), False))


@pytest.mark.parametrize(
    "make",
    [
        lambda k: Diffuser(k, BOWL, at="state", n_guide_steps=2),
        lambda k: PolicyGuided(k, PolicyLikelihood(lambda s: 0.4 * s, k.channels)),
    ],
    ids=["diffuser", "policy"],
)
def test_a_state_that_is_moved(make):
    base = plans()
    kernel = held(base, False)
    x, t = draws(2, 3, 2, seed=3), torch.tensor([4, 2])
    make(kernel).transition(x, t)
    assert torch.equal(base.asked[:, kernel.mask], x[:, kernel.mask])
    actions = ~kernel.mask & torch.tensor([False, True])
    assert actions.any()
    assert (base.asked != x)[:, actions].all()
