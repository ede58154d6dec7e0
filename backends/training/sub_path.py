"""Sub-path linear approximation (SPLAM): consistency distillation on points between two levels of the grid.

    x_t = α_t x_0 + σ_t ε,    x_s the teacher's deterministic step from it,    γ ~ U(0, 1)
    x_γ = γ x_t + (1 - γ) (α_t/α_s) x_s                                          signal α_t at every γ
    x̂_0^θ(x_γ, t, γ) = (x_γ - σ_γ ε̂^θ)/α_t                                       likewise of v, x_0 and flows
    loss = pseudo-Huber(x̂_0^θ(x_γ, t, γ) - stop-gradient x̂_0^θ⁻(x_s, s))

    σ_γ  = γ σ_t + (1 - γ) σ_s α_t/α_s                                           "linear"
    σ_γ² = (σ_s α_t/α_s)² + γ² (1 - (α_t/α_s)²)                                   "official", α² + σ² = 1

A deterministic step leaves ε as it is, so that x_γ has the linear noise. The official form is the spread of an x_t that
was noised anew from x_s; with a deterministic teacher it makes ε̂ depend on γ by what 1/α_t then enlarges, and diverges
where α_T is small. γ = 1 is consistency distillation bit for bit.

Students are told γ by the time, which lies between those of t and s as γ says, and see x_γ divided by c, which makes it
a state of the process: c² = (α_t² + σ_γ²)/(α_t² + σ_t²), or c = (α_t + σ_γ)/(α_t + σ_t) of a flow, 1 at γ = 1. Not
divided, two kinds of states would be told one time, and training diverges. The paper has an embedding of γ, which few
networks have room for. That sub-paths are better than consistency distillation was not found on our beds.

Source: Accelerating Image Generation with Sub-Path Linear Approximation Model (Xu et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from treesearch.backends.base import Kernel, expand
from treesearch.backends.chains.diffusion import Chain, to_endpoint
from treesearch.backends.chains.inversion import still
from treesearch.backends.chains.schedules import Prediction
from treesearch.backends.training.distil import Pairs, Student, any_level, levels, noised, normal, pseudo_huber
from treesearch.backends.training.rectified import check_c
from treesearch.rewards.numeric import is_number

Sigma = Literal["linear", "official"]


@final
@dataclass(frozen=True, kw_only=True)
class SubPath:
    """The student's own x̂_0 one step of the teacher on, from a point on the way there.

    Args:
        sigma_gamma: the noise that such points are taken to have.
        gamma: (low, high) that γ is drawn from, 1 the point at the level above.
        c: where the loss turns from squared to absolute.

    Raises:
        ValueError: a setting out of range.
    """

    sigma_gamma: Sigma = "linear"
    gamma: tuple[float, float] = (0.0, 1.0)
    c: float = 0.001

    def __post_init__(self) -> None:
        check_c(self.c)
        if self.sigma_gamma not in ("linear", "official"):
            raise ValueError(f"sigma_gamma is {self.sigma_gamma!r}, choose linear or official")
        if not all(is_number(each, 0, 1) for each in self.gamma) or self.gamma[0] > self.gamma[1]:
            raise ValueError(f"gamma is {self.gamma!r}, expected (low, high) within 0..1")

    def loss(self, teacher: Kernel, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        chain = student.chain
        t = any_level(chain, rows.x0, rng)
        x = noised(chain, rows.x0, t, normal(rows.x0, rng))
        with torch.no_grad():
            below = still(teacher, x, t, rows.told).to(x.dtype)
            target = average.endpoint(below, t - 1, rows.told)
        gamma = self._drawn(x, rng)
        return pseudo_huber(self._endpoint(student, x, below, t, gamma, rows), target, self.c)

    def _drawn(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """γ (n,); where it is fixed nothing is drawn."""
        low, high = self.gamma
        if low == high:
            return x.new_full((len(x),), low)
        return (low + (high - low) * torch.rand(len(x), generator=rng, device=rng.device, dtype=torch.float32)).to(x)

    def _endpoint(self, student: Student, x: Tensor, below: Tensor, t: Tensor, gamma: Tensor, rows: Pairs) -> Tensor:
        """x̂_0 of points between x_t and x_s."""
        chain = student.chain
        alpha, sigma = levels(chain, t, x)
        if (alpha == 0).any():
            raise ValueError(
                "α_T = 0: points on the way from there are noise, scaled; choose Consistency, or another grid"
            )
        between, spread = expand(gamma, x), sub_path_sigma(chain, t, gamma, x, self.sigma_gamma)
        point = between * x + (1 - between) * (alpha / levels(chain, t - 1, x)[0]) * below
        here, there = chain.timestep[t].to(gamma), chain.timestep[t - 1].to(gamma)
        told = here - (1 - gamma) * (here - there)
        c = _norm(chain.schedule.prediction, alpha, spread) / _norm(chain.schedule.prediction, alpha, sigma)
        output = student.called(point / c, told, rows.told)
        endpoint, _ = to_endpoint(chain.schedule.prediction, output, point / c, alpha / c, spread / c)
        return endpoint


def _norm(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What α and σ of a state are divided by to be those of the process."""
    return alpha + sigma if prediction == "flow" else (alpha**2 + sigma**2).sqrt()


def sub_path_sigma(chain: Chain, t: Tensor, gamma: Tensor, like: Tensor, form: Sigma) -> Tensor:
    """σ_γ of levels t and shares γ (n,), broadcastable to states."""
    (alpha, sigma), (alpha_s, sigma_s) = levels(chain, t, like), levels(chain, t - 1, like)
    ratio, share = alpha / alpha_s, expand(gamma, like)
    if form == "linear":
        return share * sigma + (1 - share) * sigma_s * ratio
    return ((sigma_s * ratio) ** 2 + share**2 * (1 - ratio**2)).sqrt()
