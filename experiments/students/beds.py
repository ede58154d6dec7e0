"""Beds in the plane for students: a ring of Gaussians, a small network, its teacher, how far samples are from the ring.

A teacher is a network trained by ordinary diffusion on draws of the ring; students begin as copies of it. Distances are
sliced W1 to 4,000 draws of the ring, whose own floor, half against half, is .03 or so.
"""

from __future__ import annotations

import copy
import itertools
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shared.distances import Reference
from treesearch.backends.base import Kernel
from treesearch.backends.chains.diffusion import Chain, DiffusionKernel, from_endpoint
from treesearch.backends.chains.inversion import predicted, still_of, walk
from treesearch.backends.chains.schedules import Prediction, Schedule
from treesearch.backends.models.unet2d import positions
from treesearch.backends.training.distil import Pairs, Student, any_level, distil, levels, noised, normal
from treesearch.backends.training.loop import Plan

MODES, RADIUS, STD = 8, 1.5, 0.1
DRAWS = 4000
WIDTH = 96
BETAS = {
    "sd": (0.00085**0.5, 0.012**0.5, 2),
    "ddpm": (1e-4, 0.02, 1),
}  # β of 1,000 steps: ends of a straight line, power


class Planar(nn.Module):
    """(x (n, 2), timestep, condition) -> (n, 2): a network of three layers.

    Args:
        extra: entries that it is told beside the time, 0 for none.
        times: how many times it is told, 2 for a flow map.
    """

    def __init__(self, extra: int = 0, times: int = 1) -> None:
        super().__init__()
        sizes = (2 + 32 * times + extra, WIDTH, WIDTH, WIDTH)
        parts = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body, self.extra = nn.Sequential(*parts, nn.Linear(WIDTH, 2)), extra

    def forward(self, x: Tensor, timestep: Tensor, *told: Tensor) -> Tensor:
        times = [timestep, *told[: len(told) - (self.extra > 0)]]
        seen = [positions(each, 32).to(x.dtype) for each in times]
        return self.body(torch.cat([x, *seen, *(told[-1:] if self.extra else ())], 1))


def ring(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws (n, 2) and their modes (n,)."""
    rng = torch.Generator().manual_seed(seed)
    mode = torch.randint(MODES, (n,), generator=rng)
    angle = 2 * math.pi * mode / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1) + STD * torch.randn(n, 2, generator=rng), mode


def schedule(name: str, num_steps: int, prediction: Prediction = "epsilon") -> Schedule:
    """A grid of T steps on β of Stable Diffusion ("sd", α_T = .068) or of DDPM ("ddpm", α_T = .0064)."""
    first, last, power = BETAS[name]
    betas = torch.linspace(first, last, 1000, dtype=torch.float64) ** power
    return Schedule.variance_preserving((1 - betas).cumprod(0), num_steps, prediction=prediction)


def kernel(network: nn.Module, grid: Schedule) -> DiffusionKernel:
    """A network on a grid."""
    return DiffusionKernel(network, state_shape=(2,), schedule=grid, name="ring")


class Denoising:
    """Ordinary diffusion training: the network's own output against that of noise drawn afresh, or of the pair's."""

    def __init__(self, *, paired: bool = False) -> None:
        self.paired = paired

    def loss(self, teacher: Kernel, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        chain = student.chain
        t, eps = any_level(chain, rows.x0, rng), rows.noise if self.paired else normal(rows.x0, rng)
        x = noised(chain, rows.x0, t, eps)
        wanted = from_endpoint(chain.schedule.prediction, rows.x0, eps, *levels(chain, t, x))
        return (student.called(x, chain.timestep[t], rows.told) - wanted).square().mean()


def plan(steps: int, lr: float = 1e-3, ema: float = 0.95, epochs: int = 1) -> Plan:
    """How weights move, over so many steps in all."""
    each = steps // epochs
    return Plan(epochs=epochs, steps=each, lr=lr, warmup=50, cooldown=0.5, weight_decay=0.0, ema=ema)


def untrained(seed: int, extra: int = 0, times: int = 1) -> Planar:
    """A network as it begins."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Planar(extra, times)


@cache
def teacher(name: str, seed: int, steps: int = 5000) -> nn.Module:
    """A network trained on the ring."""
    draws, _ = ring(50_000, seed)
    network = untrained(seed)
    grid, how = kernel(network, schedule(name, 1000)), plan(steps, 2e-3, 0.999)
    return distil(grid, network, Denoising(), Pairs(draws, draws), how, batch_size=256, seed=seed)


def copied(network: nn.Module) -> nn.Module:
    """A student as it begins."""
    return copy.deepcopy(network).requires_grad_(True)


def two_times(network: Any) -> Planar:
    """The same network with room for another time, which it does not heed yet."""
    made, kept = untrained(0, times=2), network.state_dict()
    first = kept["body.0.weight"]
    kept["body.0.weight"] = torch.cat([first, torch.zeros(len(first), 32)], 1)
    made.load_state_dict(kept)
    return made


@cache
def reference() -> Reference:
    """Draws of the ring."""
    return Reference(ring(DRAWS, 1_000_003)[0])


def deterministic(of: DiffusionKernel, steps: int, seed: int) -> Tensor:
    """Samples (DRAWS, 2) of so many deterministic steps."""
    chain = Chain(of.chain.schedule.coarse(steps), eta=0.0)
    few = of.with_network(of.model, chain, "few")  # pyright: ignore[reportArgumentType]
    return walk(few, noise(seed), steps)


def renoised(of: DiffusionKernel, steps: int, seed: int) -> Tensor:
    """Samples (DRAWS, 2) of a consistency student: x̂_0, noised anew, and so on."""
    chain = Chain(of.chain.schedule.coarse(steps), step="renoise")
    few = of.with_network(of.model, chain, "few")  # pyright: ignore[reportArgumentType]
    x, rng = noise(seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for t in range(steps, 0, -1):
            law = few.transition(x, torch.full((len(x),), t))
            x = law.sample(torch.randn(x.shape, generator=rng))
    return x


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of draws (n, D), unbiased."""
    x, y = x.double(), y.double()
    within = sum(torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - within)


def eps_variance(of: DiffusionKernel, seed: int) -> float:
    """Variance of ε̂ along deterministic paths, a mean over entries: 0 of first-order paths."""
    x, seen = noise(seed), []
    with torch.no_grad():
        for t in range(of.num_steps, 0, -1):
            level = torch.full((len(x),), t)
            law = of.transition(x, level)
            seen.append(predicted(of.chain, law, x, level)[1])
            x = still_of(of.chain, law, x, level)
    return float(torch.stack(seen).var(0, correction=0).mean())


def noise(seed: int) -> Tensor:
    """x_T (DRAWS, 2) of samples."""
    return torch.randn(DRAWS, 2, generator=torch.Generator().manual_seed(2_000_003 + seed))
