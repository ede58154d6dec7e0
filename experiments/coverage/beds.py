"""The beds of `experiments.coverage.evidence`: chains whose log E_p[exp(λ r)] is known to many digits.

    gaussian     x_0 ~ N(m, diag v), exact reverse kernel; r of one or two projections, jointly Gaussian: quadrature
    mixture      exact mixture kernel, x_0 the mixture itself: closed forms, or quadrature over one or two dimensions
    denoised     DDIM (η = 1) on the exact endpoints of a one-dimensional mixture: its steps are Gaussian, so that
                 guides apply, and its law is carried down a grid, step by step
    enumerable   discrete and masked chains: backward recursion

Beds of the first group were looked at while the rules of the certificate were made; those of the second (`HELD_OUT`)
only once they were fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.mixtures.beds import Denoiser
from treesearch.backends.base import Cond, Gaussian
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.enumerable import DiscreteChain, MaskedChain
from treesearch.backends.exact.gaussian import GaussianMixture, Tilt, cosine_bar
from treesearch.rewards.base import Reward

F64 = torch.float64
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A chain, a reward and the truth.

    Args:
        kernel, reward, lam: what is searched.
        log_z: log E_p[exp(λ r)].
        gradient: whether guides by the gradient apply.
        r_max: upper bound of the reward, None where it has none.
    """

    kernel: Any
    reward: Reward
    log_z: float
    lam: float = 1.0
    gradient: bool = False
    r_max: float | None = None


@dataclass(frozen=True)
class Diagonal:
    """The exact reverse chain of N(mean, diag variances) data.

    Args:
        variances: of each dimension.
        num_steps: T.
        mean: of every dimension.
    """

    variances: tuple[float, ...]
    num_steps: int
    mean: float = 0.0

    dtype = F64

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (len(self.variances),)

    @property
    def fingerprint(self) -> str:
        return repr(self)

    @cached_property
    def _chain(self) -> tuple[Tensor, ...]:
        """α_t = √ᾱ_t (T + 1,); variances, gains and stds of the steps (T + 1, D)."""
        bar, data = cosine_bar(self.num_steps)[:, None], torch.tensor(self.variances, dtype=F64)
        var = bar * data + 1 - bar
        cov = (bar[1:] / bar[:-1]).sqrt() * var[:-1]
        gain = torch.cat([torch.zeros_like(var[:1]), cov / var[1:]])
        std = torch.cat([torch.zeros_like(var[:1]), (var[:-1] - cov**2 / var[1:]).clamp_min(0).sqrt()])
        return bar.sqrt(), var, gain, std

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        root, var, _, _ = self._chain
        return self.mean * root[-1] + var[-1].sqrt() * noise.double()

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        root, var, gain, std = self._chain
        gap, data = x - self.mean * root[t], torch.tensor(self.variances, dtype=F64)
        endpoint = self.mean + root[t] * data / var[t] * gap
        return Gaussian(self.mean * root[t - 1] + gain[t] * gap, std[t], endpoint)

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def per_row(fn: Function, name: str) -> Reward:
    """A reward of vectors (n, D) that prompts do not matter to."""
    return Reward(lambda x, _: fn(x.double().flatten(1)), name)


def quadrature(fn: Function, densities: Sequence[tuple[Tensor, Tensor]], lam: float = 1.0) -> float:
    """log ∫ p exp(λ r) over a product of one-dimensional laws, each a grid (G,) and its log-masses (G,)."""
    grids, masses = zip(*densities, strict=True)
    points = torch.stack([g.flatten() for g in torch.meshgrid(*grids, indexing="ij")], 1)
    log_p = sum(m.flatten() for m in torch.meshgrid(*masses, indexing="ij"))
    return float(torch.logsumexp(log_p + lam * fn(points), 0))


def normal(mean: float, std: float, points: int = 4001, width: float = 12.0) -> tuple[Tensor, Tensor]:
    """A grid over a normal law, and its log-masses."""
    grid = mean + std * torch.linspace(-width, width, points, dtype=F64)
    return grid, (-0.5 * ((grid - mean) / std) ** 2).log_softmax(0)


def mixed(weights: Sequence[float], means: Sequence[float], stds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A grid over a mixture of normals, and its log-masses."""
    m, s = torch.tensor(means, dtype=F64), torch.tensor(stds, dtype=F64)
    grid = torch.linspace(float((m - 10 * s).min()), float((m + 10 * s).max()), 20_001, dtype=F64)
    parts = torch.tensor(weights, dtype=F64).log() - s.log() - 0.5 * ((grid[:, None] - m) / s) ** 2
    return grid, parts.logsumexp(1).log_softmax(0)


def one_d(
    fn: Function, name: str, *, steps: int, std: float = 1.0, mean: float = 0.0, lam: float = 1.0, **known: Any
) -> Bed:
    """A reward of one Gaussian number."""
    log_z = quadrature(lambda x: fn(x), [normal(mean, std, 40_001)], lam)
    kernel = Diagonal((std**2,), steps, mean)
    return Bed(kernel=kernel, reward=per_row(fn, name), log_z=log_z, lam=lam, **known)


def projected(
    fn: Function, name: str, variances: Sequence[float], axes: Tensor, *, steps: int, lam: float = 1.0
) -> Bed:
    """A reward of two projections (D, 2) of a Gaussian vector, which are jointly Gaussian."""
    cov = axes.T @ torch.diag(torch.tensor(list(variances), dtype=F64)) @ axes
    root = torch.linalg.cholesky(cov)
    log_z = quadrature(lambda z: fn(z @ root.T), [normal(0, 1, 1201, 9.0)] * 2, lam)
    reward = per_row(lambda x: fn(x @ axes), name)
    return Bed(kernel=Diagonal(tuple(variances), steps), reward=reward, log_z=log_z, lam=lam, gradient=True)


def axes(dim: int, seed: int) -> Tensor:
    """Two random unit vectors (D, 2)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(dim, 2, generator=draw, dtype=F64), dim=0)


def denoised(
    fn: Function,
    name: str,
    weights: Sequence[float],
    means: Sequence[float],
    std: float,
    *,
    steps: int,
    lam: float = 1.0,
) -> Bed:
    """DDIM on a one-dimensional mixture; its law by quadrature down the chain."""
    mixture = GaussianMixture(
        num_steps=steps, weights=tuple(weights), means=tuple((m,) for m in means), stds=(std,) * len(weights)
    )
    bar = cosine_bar(steps)
    schedule = Schedule(torch.arange(1, steps + 1), bar.sqrt(), (1 - bar).sqrt(), "sample")
    kernel = DiffusionKernel(Denoiser(mixture), state_shape=(1,), schedule=schedule, name=f"denoised {name}")
    return Bed(kernel=kernel, reward=per_row(fn, name), log_z=carried(kernel, fn, lam), lam=lam, gradient=True)


def carried(kernel: Any, fn: Function, lam: float, points: int = 6001, width: float = 9.0) -> float:
    """log E[exp(λ r(x_0))] of a one-dimensional chain of Gaussian steps: V_t = log E[exp V_{t-1}] on a grid."""
    grid = torch.linspace(-width, width, points, dtype=F64)
    value = lam * fn(grid[:, None])
    for t in range(1, kernel.num_steps + 1):
        law = kernel.transition(grid[:, None].float(), torch.full((points,), t))
        mean, std = law.mean.double(), law.std.double().expand(points, 1)
        if float(std.max()) == 0:  # the last step has no noise
            value = torch.from_numpy(np.interp(mean[:, 0].numpy(), grid.numpy(), value.numpy()))
            continue
        parts = []
        for a, s in zip(mean.split(500), std.split(500), strict=True):
            parts.append(((-0.5 * ((grid - a) / s) ** 2).log_softmax(1) + value).logsumexp(1))
        value = torch.cat(parts)
    return quadrature(
        lambda x: torch.from_numpy(np.interp(x[:, 0].numpy(), grid.numpy(), value.numpy())), [normal(0, 1)]
    )


def mixture(
    fn: Function,
    name: str,
    weights: Sequence[float],
    means: Sequence[tuple[float, ...]],
    stds: Sequence[float],
    *,
    steps: int,
    log_z: float,
    lam: float = 1.0,
    **known: Any,
) -> Bed:
    """The exact mixture kernel."""
    kernel = GaussianMixture(num_steps=steps, weights=tuple(weights), means=tuple(means), stds=tuple(stds))
    return Bed(kernel=kernel, reward=per_row(fn, name), log_z=log_z, lam=lam, **known)


def ring(
    modes: int, heights: Sequence[float], *, steps: int, std: float = 0.3, width: float = 0.3, lam: float = 1.0
) -> Bed:
    """Gaussians on a circle of radius 3 under rewards log Σ h_j N(x; m_j, width²): both in closed form."""
    kernel = GaussianMixture.ring(steps, modes, 3.0, std)
    m, h = torch.tensor(kernel.means, dtype=F64), torch.tensor(list(heights), dtype=F64)

    def fn(x: Tensor) -> Tensor:
        return (h - ((x[:, None] - m) ** 2).sum(2) / (2 * width**2)).logsumexp(1)

    cross = ((m[:, None] - m) ** 2).sum(2) / (2 * (std**2 + width**2))
    log_z = float((h - cross - math.log(1 + std**2 / width**2)).flatten().logsumexp(0)) - math.log(modes)
    if lam != 1:
        raise ValueError("closed at λ = 1 alone")
    return Bed(kernel=kernel, reward=per_row(fn, "ring"), log_z=log_z)


def enumerable(kernel: Any, values: Tensor, lam: float = 1.0) -> Bed:
    """A table over the states of a discrete or masked chain."""
    index = kernel.index if hasattr(kernel, "index") else (lambda x: x[:, 0])
    reward = Reward(lambda x, _: values[index(x)], "table")
    r_max = float(values.max())
    return Bed(kernel=kernel, reward=reward, log_z=kernel.tilted(values, lam).log_z, lam=lam, r_max=r_max)


def peaks(x: Tensor, height: float = 6.0, width: float = 0.15, at: Sequence[float] = (-1.5, 0.4, 1.2)) -> Tensor:
    """Bumps on a line."""
    centres = torch.tensor(list(at), dtype=F64)
    return height * torch.exp(-0.5 * ((x[:, :1] - centres) / width) ** 2).sum(1)


def gaussian_24() -> Bed:
    """24 dimensions, a narrow ridge with ripples across it."""
    variances = torch.linspace(math.log(0.05), math.log(2), 24, dtype=F64).exp().tolist()
    return projected(
        lambda u: -((u[:, 0] - 2.6) ** 2) + torch.cos(3 * u[:, 1]), "ridge", variances, axes(24, 24), steps=30, lam=1.7
    )


def gated(x: Tensor, slope: float = 1.0, above: float = 0.5) -> Tensor:
    """Linear, forbidden below a threshold."""
    return torch.where(x[:, 0] > above, slope * x[:, 0], -math.inf)


def random_table(size: int, seed: int, spread: float) -> Tensor:
    """Normal rewards of states."""
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rare(weight: float, gain: float) -> Bed:
    """A mode of small mass far off, worth exp(gain) times the other one."""
    means, stds = ((-1.0,), (2.5,)), (0.5, 0.3)

    def fn(x: Tensor) -> Tensor:
        return gain * torch.sigmoid(6 * (x[:, 0] - 1.2))

    log_z = quadrature(fn, [mixed((1 - weight, weight), (-1.0, 2.5), stds)])
    return mixture(fn, "rare", (1 - weight, weight), means, stds, steps=12, log_z=log_z, r_max=gain)


def linear_mixture(dim: int, modes: int, slope: float, seed: int, *, steps: int) -> Bed:
    """A linear reward over a mixture in many dimensions."""
    draw = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(modes, dim, generator=draw, dtype=F64)
    c = slope * torch.nn.functional.normalize(torch.randn(dim, generator=draw, dtype=F64), dim=0)
    kernel = GaussianMixture(
        num_steps=steps, weights=(1.0,) * modes, means=tuple(map(tuple, means.tolist())), stds=(0.5,) * modes
    )
    log_z = kernel.tilted(Tilt(c=tuple(c.tolist()))).log_z
    return Bed(kernel=kernel, reward=per_row(lambda x: x @ c, "linear"), log_z=log_z)


DESIGN: dict[str, Callable[[], Bed]] = {
    "linear, mild": lambda: one_d(lambda x: 1.2 * x[:, 0], "linear", steps=10, std=0.8, mean=0.3, gradient=True),
    "linear, steep": lambda: one_d(lambda x: 3.0 * x[:, 0], "linear", steps=10, std=0.8, mean=0.3, gradient=True),
    "gaussian, 24-D": gaussian_24,
    "peaks": lambda: one_d(peaks, "peaks", steps=12, gradient=True, r_max=6.01),
    "heavy tail": lambda: one_d(lambda x: 0.35 * x[:, 0] ** 2, "heavy", steps=10, gradient=True),
    "gate": lambda: one_d(gated, "gate", steps=10),
    "ring": lambda: ring(8, [0.5 * j for j in range(8)], steps=16),
    "rare mode": lambda: rare(0.04, 4.0),
    "8-D mixture": lambda: linear_mixture(8, 5, 2.0, 3, steps=16),
    "discrete": lambda: enumerable(DiscreteChain.random(6, 8, 1), random_table(8, 1, 2.0)),
    "masked": lambda: enumerable(MaskedChain.random(5, 3, 6, 2), random_table(4**5, 2, 1.5)),
    "denoised": lambda: denoised(
        lambda x: -2.0 * (x[:, 0] - 1.2) ** 2, "narrow", (0.3, 0.5, 0.2), (-2.0, 0.0, 1.5), 0.3, steps=16
    ),
}
HELD_OUT: dict[str, Callable[[], Bed]] = {
    "cosine": lambda: one_d(lambda x: 3 * torch.cos(5 * x[:, 0]) + x[:, 0], "cosine", steps=8, std=1.3, gradient=True),
    "step": lambda: one_d(lambda x: 4.0 * (x[:, 0] > 1.3).double(), "step", steps=14, r_max=4.0),
    "window": lambda: one_d(
        lambda x: torch.where((x[:, 0] - 1.1).abs() < 0.25, 0.0, -math.inf), "window", steps=9, r_max=0.0
    ),
    "12-D, quadratic": lambda: projected(
        lambda u: -1.5 * (u[:, 0] - 1.5) ** 2 - 0.5 * (u[:, 1] + 0.7) ** 2,
        "quadratic",
        torch.linspace(0.2, 1.4, 12).tolist(),
        axes(12, 7),
        steps=20,
    ),
    "40-D, banana": lambda: projected(
        lambda u: -2.0 * (u[:, 1] - u[:, 0] ** 2 + 0.5) ** 2 + 0.8 * u[:, 0],
        "banana",
        torch.logspace(-1, 0.2, 40).tolist(),
        axes(40, 40),
        steps=15,
        lam=1.3,
    ),
    "exponential tail": lambda: one_d(lambda x: 2.2 * x[:, 0].abs(), "laplace", steps=12, std=1.1, gradient=True),
    "five on a ring": lambda: ring(5, [0.0, 3.0, 0.0, 1.0, 2.0], steps=24, std=0.25, width=0.4),
    "rarer mode": lambda: rare(0.02, 5.0),
    "16-D mixture": lambda: linear_mixture(16, 8, 1.5, 11, steps=12),
    "discrete, 20 states": lambda: enumerable(DiscreteChain.random(10, 20, 5), random_table(20, 6, 1.5), 1.5),
    "masked, binary": lambda: enumerable(MaskedChain.random(7, 2, 7, 9), random_table(3**7, 9, 2.0)),
    "denoised, peaks": lambda: denoised(
        partial(peaks, height=4.0, width=0.25, at=(-1.2, 1.6)), "peaks", (0.6, 0.4), (-1.0, 1.4), 0.45, steps=20
    ),
}
BEDS = DESIGN | HELD_OUT
