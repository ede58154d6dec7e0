"""The beds of `experiments.mixtures.evidence`: chains over mixtures of Gaussians, with rewards that leave the target
known.

All run DDIM with eta = 1 on the grid of `backends.exact.gaussian`, with the exact endpoint of the mixture as their
network:

    E[x_0 | x_t] = Σ_j γ_j(x_t) (m_j + √ᾱ_t s²/v_t (x_t - √ᾱ_t m_j)),   v_t = ᾱ_t s² + 1 - ᾱ_t
    γ_j(x_t) ∝ w_j N(x_t; √ᾱ_t m_j, v_t I)

Steps of a mixture are not Gaussian, so the chain's p(x_0) is close to the mixture, not equal to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import GaussianMixture, Tilt, cosine_bar
from treesearch.rewards.analytic import linear, log_mixture, quadratic
from treesearch.rewards.base import Reward

NUM_STEPS = 100
ROWS = 50_000  # compared with the means at a time


class Denoiser:
    """E[x_0 | x_t] of a mixture of Gaussians of one width, as a network that predicts samples."""

    def __init__(self, mixture: GaussianMixture) -> None:
        if len(set(mixture.stds)) > 1:
            raise ValueError("the components of a bed have one std")
        self.mean, self.var = torch.tensor(mixture.means, dtype=torch.float64), mixture.stds[0] ** 2
        self.log_mix, self.square = mixture.log_mix, (self.mean**2).sum(1)
        self.bar = cosine_bar(mixture.num_steps)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        z, bar = x.double(), self.bar[t][:, None]
        var = bar * self.var + 1 - bar
        gamma = (self.log_mix + (bar.sqrt() * z @ self.mean.T - 0.5 * bar * self.square) / var).softmax(1)
        centre = gamma @ self.mean
        return (centre + bar.sqrt() * self.var / var * (z - bar.sqrt() * centre)).to(x.dtype)


def chain(mixture: GaussianMixture) -> DiffusionKernel:
    """DDIM with eta = 1 on the exact endpoints of a mixture."""
    bar, dim = cosine_bar(NUM_STEPS), len(mixture.means[0])
    schedule = Schedule(torch.arange(1, NUM_STEPS + 1), bar.sqrt(), (1 - bar).sqrt(), "sample")
    return DiffusionKernel(Denoiser(mixture), state_shape=(dim,), schedule=schedule, name="mixture")


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A chain, a reward and what is known of the target.

    Args:
        mixture: the data.
        labels: mode of each component.
        reward, lam: r and λ.
        r_max: upper bound of the reward, None where it has none.
        tilt: the reward in the family of closed forms, None where it is not.
        pool: rollouts that the reference is taken from.
    """

    name: str
    mixture: GaussianMixture
    labels: tuple[int, ...]
    reward: Reward
    lam: float = 1.0
    r_max: float | None = None
    tilt: Tilt | None = None
    pool: int = 10**6

    def kernel(self) -> DiffusionKernel:
        """The chain."""
        return chain(self.mixture)

    def modes(self, x: Tensor) -> Tensor:
        """Mode of each sample: that of the nearest component."""
        means = torch.tensor(self.mixture.means, dtype=torch.float64)
        parts = [torch.cdist(part.double(), means).argmin(1) for part in x.split(ROWS)]
        return torch.tensor(self.labels)[torch.cat(parts)]

    def masses(self, x: Tensor, weights: Tensor | None = None) -> np.ndarray:
        """Share of each mode."""
        found = torch.bincount(self.modes(x), weights, minlength=max(self.labels) + 1).double()
        return (found / found.sum()).numpy()


def ring() -> Bed:
    mixture = GaussianMixture.ring(NUM_STEPS)
    weights = [math.exp(1.5 * i) for i in range(1, 9)]
    reward = log_mixture(mixture.means, weights, 0.3)
    return Bed(name="ring", mixture=mixture, labels=tuple(range(8)), reward=reward, r_max=12 + 1e-6, pool=200_000)


def checkerboard() -> Bed:
    squares = [(i, j) for i, j in product(range(4), repeat=2) if (i + j) % 2 == 0]
    means = [
        (2 * i - 3 + 2 * a / 3, 2 * j - 3 + 2 * b / 3) for i, j in squares for a, b in product((-1, 0, 1), repeat=2)
    ]
    mixture = GaussianMixture(num_steps=NUM_STEPS, weights=(1.0,) * 72, means=tuple(means), stds=(0.25,) * 72)
    labels = tuple(i // 9 for i in range(72))
    return Bed(
        name="checkerboard",
        mixture=mixture,
        labels=labels,
        reward=quadratic(),
        r_max=0.0,
        tilt=Tilt(k=1.0),
        pool=200_000,
    )


def twelve(dim: int, fraction: float, suffix: str) -> Bed:
    """Twelve Gaussians in `dim` dimensions under the tilt at which importance sampling has this ESS fraction."""
    means, aim = layout(dim)
    weights, point = weights_of(means, aim), tuple(aim.tolist())
    mixture = GaussianMixture(
        num_steps=NUM_STEPS, weights=weights, means=tuple(map(tuple, means.tolist())), stds=(0.3,) * 12
    )
    tilt = Tilt(c=point) if dim == 16 else Tilt(k=1.0, y=point)
    return Bed(
        name=f"mix{dim}_{suffix}",
        mixture=mixture,
        labels=tuple(range(12)),
        reward=linear(point) if dim == 16 else quadratic(1.0, point),
        lam=solve(mixture, tilt, fraction),
        r_max=None if dim == 16 else 0.0,
        tilt=tilt,
    )


def weights_of(means: Tensor, aim: Tensor) -> tuple[float, ...]:
    """One rare component in 2-D; in 16-D the rarer the better; equal in 64-D."""
    if means.shape[1] == 2:
        return (0.01, *(0.09,) * 11)
    return tuple((-(means @ aim)).softmax(0).tolist()) if means.shape[1] == 16 else (1.0,) * 12


def layout(dim: int) -> tuple[Tensor, Tensor]:
    """Component means, and the direction or centre of the reward."""
    chance = torch.Generator().manual_seed(dim)
    aim = torch.nn.functional.normalize(torch.randn(dim, generator=chance, dtype=torch.float64), dim=0)
    if dim == 2:  # a sunflower: evenly spread; the rare one is the fourth from the middle
        i = torch.arange(12, dtype=torch.float64)
        means = 4 * ((i + 0.5) / 12).sqrt()[:, None] * torch.stack([(2.4 * i).cos(), (2.4 * i).sin()], 1)
        means = means[[3, 0, 1, 2, *range(4, 12)]]
        return means, means[0] + 0.2 * aim
    means = torch.nn.functional.normalize(torch.randn(12, dim, generator=chance, dtype=torch.float64), dim=1)
    return dim**0.5 * means, aim if dim == 16 else 2 * aim


def ess_fraction(mixture: GaussianMixture, tilt: Tilt, lam: float) -> float:
    """E[w]²/E[w²] of w = exp(λ r), in closed form."""
    return math.exp(2 * mixture.tilted(tilt, lam).log_z - mixture.tilted(tilt, 2 * lam).log_z)


def solve(mixture: GaussianMixture, tilt: Tilt, fraction: float) -> float:
    """The λ at which importance sampling has this ESS fraction."""
    low = high = 1e-3
    while ess_fraction(mixture, tilt, high) > fraction:
        low, high = high, 1.3 * high
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ess_fraction(mixture, tilt, middle) > fraction else (low, middle)
    return low


BEDS: dict[str, Callable[[], Bed]] = {"ring": ring, "checkerboard": checkerboard} | {
    f"mix{dim}_{suffix}": partial(twelve, dim, fraction, suffix)
    for dim, (suffix, fraction) in product((2, 16, 64), (("mild", 0.15), ("hard", 0.005)))
}
