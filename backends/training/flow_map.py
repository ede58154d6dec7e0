"""Flow maps: a student of two times, that leads from x_t to x_s on the teacher's deterministic path in one step.

    Ψ^θ(x_t; t, s) = α_s x̂_0 + σ_s ε̂    of the network told t and s;   Ψ(x; t, t) = x by construction
    x_r = the teacher's step from x_t,  r = t - 1,    s ∈ 0..r
    loss = pseudo-Huber(Ψ^θ(x_t; t, s) - stop-gradient Ψ^θ⁻(x_r; r, s))

At s = 0 it is consistency distillation, at s = t - 1 the step itself. The optimum composes: Ψ(Ψ(x; t, r); r, s) is
Ψ(x; t, s), so that more steps never do harm, where a consistency student has to noise its x̂_0 anew.

The network is called as network(x, timestep of t, timestep of s), conditions after these; at s = 0 it is told -1.

Sources: Consistency Trajectory Models (Kim et al., 2024), without its adversarial part. The Principles of
Diffusion Models (Lai et al., 2025), flow maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Kernel, expand
from treesearch.backends.chains.diffusion import to_endpoint
from treesearch.backends.chains.inversion import still
from treesearch.backends.training.distil import Pairs, Student, any_level, levels, noised, normal, pseudo_huber
from treesearch.backends.training.rectified import check_c

AT_ZERO = -1  # what the network is told of s = 0


@final
@dataclass(frozen=True, kw_only=True)
class FlowMap:
    """The student's own state at s by way of a step of the teacher.

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
        s = _below(t, rng)
        with torch.no_grad():
            stepped = still(teacher, x, t, rows.told).to(x.dtype)
            target = mapped(average, stepped, t - 1, s, rows.told)
        return pseudo_huber(mapped(student, x, t, s, rows.told), target, self.c)


def mapped(student: Student, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
    """Ψ(x; t, s) (n, *state) from levels t to levels s <= t (n,)."""
    chain, above = student.chain, t.clamp_min(1)
    told = torch.where(s > 0, chain.timestep[s], AT_ZERO)
    output = student.called(x, chain.timestep[above], cond, told)
    x0, eps = to_endpoint(chain.schedule.prediction, output, x, *levels(chain, above, x))
    alpha, sigma = levels(chain, s, x)
    return torch.where(expand(s == t, x), x, alpha * x0 + sigma * eps)


def composition_error(student: Student, rows: Pairs, rng: torch.Generator) -> float:
    """Mean squared difference of Ψ(Ψ(x; t, r); r, s) and Ψ(x; t, s), over random s <= r < t."""
    t = any_level(student.chain, rows.x0, rng)
    x = noised(student.chain, rows.x0, t, normal(rows.x0, rng))
    r = _below(t, rng)
    s = (torch.rand(len(r), generator=rng, device=rng.device, dtype=torch.float32).to(x.device) * (r + 1)).long()
    with torch.no_grad():
        by_way = mapped(student, mapped(student, x, t, r, rows.told), r, s, rows.told)
        return float((by_way - mapped(student, x, t, s, rows.told)).double().square().mean())


def _below(t: Tensor, rng: torch.Generator) -> Tensor:
    """Levels 0..t - 1 (n,) at random."""
    return (torch.rand(len(t), generator=rng, device=rng.device, dtype=torch.float32).to(t.device) * t).long()
