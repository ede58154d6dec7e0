"""Rectified Diffusion: the student learns the teacher's own pairs of noise and sample, as first-order paths.

    x_t = α_t x̂_0 + σ_t ε,     (ε, x̂_0) a pair of the teacher
    loss = pseudo-Huber(x̂_0^θ(x_t, t) - x̂_0)                          `Rectified`, t uniform

A path on which ε_θ(x_t, t) does not change is first-order: DDIM is exact on it in any number of steps, though x_t is
curved. Ordinary diffusion training with the paired noise has such paths as its optimum, with the prediction and the
schedule of the teacher. The loss is in x̂_0: in ε it forgives at t ≈ T what 1/α_t makes large in x̂_0.

    phases T = t_0 > t_1 > ... > t_K = 0,   x_s the teacher's state at s = t_{k+1} from x_t at t = t_k
    (x̄_0, ε̄) by x_t = α_t x̄_0 + σ_t ε̄ and x_s = α_s x̄_0 + σ_s ε̄
    x_u = α_u x̄_0 + σ_u ε̄,   s < u <= t
    loss = pseudo-Huber(α_s x̂_0^θ(x_u, u) + σ_s ε̂^θ(x_u, u) - x_s)      `Phased`: straight within each phase alone

A phased student is sampled by K deterministic steps that end where phases do; its x̂_0 is none of a sample above the
last phase. The optimum of either is reached only where the teacher's map from noise to samples is learnt.

Source: Rectified Diffusion: Straightness Is Not Your Need in Rectified Flow (Wang et al., 2024). The linear solution
for (x̄_0, ε̄), which stays finite at α_t = 0, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Kernel, expand
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.inversion import still
from treesearch.backends.training.distil import (
    Pairs,
    Student,
    any_level,
    chain_of,
    levels,
    noised,
    normal,
    pseudo_huber,
)
from treesearch.rewards.numeric import is_positive, is_whole


@final
@dataclass(frozen=True, kw_only=True)
class Rectified:
    """The teacher's sample from the same noise.

    Args:
        c: where the loss turns from squared to absolute.

    Raises:
        ValueError: c out of range.
    """

    c: float = 0.001

    def __post_init__(self) -> None:
        check_c(self.c)

    def loss(self, teacher: Kernel, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        t = any_level(student.chain, rows.x0, rng)
        x = noised(student.chain, rows.x0, t, rows.noise)
        return pseudo_huber(student.endpoint(x, t, rows.told), rows.x0, self.c)


@final
@dataclass(frozen=True, kw_only=True)
class Phased:
    """The teacher's state where a phase ends, from a state where it begins; T/K evaluations of the teacher a row.

    Args:
        phases: K.
        c: where the loss turns from squared to absolute.

    Raises:
        ValueError: a setting out of range.
    """

    phases: int = 4
    c: float = 0.001

    def __post_init__(self) -> None:
        check_c(self.c)
        if not is_whole(self.phases):
            raise ValueError(f"phases is {self.phases!r}, expected 1 or more")

    def loss(self, teacher: Kernel, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        chain, n = chain_of(teacher), len(rows.x0)
        ends = boundaries(chain.schedule.num_steps, self.phases).to(rows.x0.device)
        k = torch.randint(self.phases, (n,), generator=rng, device=rng.device).to(ends.device)
        s, t = ends[k], ends[k + 1]
        x_t = noised(chain, rows.x0, t, normal(rows.x0, rng))
        x_s = _walked(teacher, x_t, t, s, rows.told)
        u = (
            s
            + 1
            + (torch.rand(n, generator=rng, device=rng.device, dtype=torch.float32).to(ends.device) * (t - s)).long()
        )
        x_u = between(chain, (x_t, t), (x_s, s), u)
        return pseudo_huber(jump(student, x_u, u, s, rows.told), x_s, self.c)


def boundaries(steps: int, phases: int) -> Tensor:
    """Levels 0 = t_K < ... < t_0 = T where phases end, (K + 1,).

    Raises:
        ValueError: more phases than steps.
    """
    if phases > steps:
        raise ValueError(f"phases is {phases}, expected at most the {steps} steps of the teacher")
    return (torch.arange(phases + 1, dtype=torch.float64, device="cpu") * steps / phases).round().long()


def between(chain: Chain, upper: tuple[Tensor, Tensor], lower: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
    """x_u on the first-order path through x_t and x_s, each given with its levels (n,)."""
    (x_t, t), (x_s, s) = upper, lower
    (a_t, s_t), (a_s, s_s), (a_u, s_u) = (levels(chain, at, x_t) for at in (t, s, u))
    gap = a_t * s_s - a_s * s_t
    return a_u * (s_s * x_t - s_t * x_s) / gap + s_u * (a_t * x_s - a_s * x_t) / gap


def jump(student: Student, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """The deterministic step from x at levels t to levels s, α_s x̂_0 + σ_s ε̂ (n, *state)."""
    x0, eps = student.predicted(x, t, cond)
    alpha, sigma = levels(student.chain, s, x)
    return alpha * x0 + sigma * eps


def _walked(teacher: Kernel, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """x_s by the teacher's steps at η = 0; rows that have arrived wait."""
    with torch.no_grad():
        for _ in range(int((t - s).max())):
            on = t > s
            stepped = still(teacher, x, t.clamp_min(1), cond).to(x.dtype)
            x, t = torch.where(expand(on, x), stepped, x), t - on.to(t.dtype)
    return x


def check_c(c: float) -> None:
    if not is_positive(c):
        raise ValueError(f"c is {c!r}, expected a positive number")
