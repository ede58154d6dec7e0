"""Consistency distillation: the student's x̂_0 is the same all along a deterministic path of the teacher.

    x_t = α_t x_0 + σ_t ε,    x_s = f(x_t) the teacher's deterministic step,  s = t - 1
    loss = pseudo-Huber(x̂_0^θ(x_t, t) - stop-gradient x̂_0^θ⁻(x_s, s)),     x̂_0(x, 0) = x

θ⁻ is the mean of the weights. On a grid the boundary x̂_0(x, 0) = x holds by definition, without the paper's c_skip and
c_out. The optimum is the end of the teacher's path from x_t, in the steps of its own grid.

Sampling is by full renoising: x_s = α_s x̂_0 + σ_s z. Its law is its own and no longer the teacher's.

Sources: Consistency Models (Song et al., 2023), algorithm 2. Latent Consistency Models (Luo et al., 2023), steps of the
teacher's solver on a grid, the pseudo-Huber loss. The Principles of Diffusion Models (Lai et al., 2025), flow maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import Kernel
from treesearch.backends.chains.inversion import still
from treesearch.backends.training.distil import Pairs, Student, any_level, noised, normal, pseudo_huber
from treesearch.backends.training.rectified import check_c


@final
@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The student's own x̂_0 one step of the teacher on.

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
        x = noised(student.chain, rows.x0, t, normal(rows.x0, rng))
        target = one_step_on(teacher, average, x, t, rows)
        return pseudo_huber(student.endpoint(x, t, rows.told), target, self.c)


def one_step_on(teacher: Kernel, average: Student, x: Tensor, t: Tensor, rows: Pairs) -> Tensor:
    """x̂_0 (n, *state) of the state that the teacher's deterministic step leads to."""
    with torch.no_grad():
        stepped = still(teacher, x, t, rows.told).to(x.dtype)
        return average.endpoint(stepped, t - 1, rows.told)


def self_consistency(teacher: Kernel, student: Student, rows: Pairs, rng: torch.Generator) -> float:
    """Mean squared difference of x̂_0 from a state and from the state a step of the teacher on, over all levels."""
    t = any_level(student.chain, rows.x0, rng)
    x = noised(student.chain, rows.x0, t, normal(rows.x0, rng))
    with torch.no_grad():
        gap = student.endpoint(x, t, rows.told) - one_step_on(teacher, student, x, t, rows)
    return float(gap.double().square().mean())
