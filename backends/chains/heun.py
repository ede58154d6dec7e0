"""Heun's method on the probability-flow ODE as a chain of half steps: one network call a level, 2T - 1 levels.

    y = x/α, r = σ/α, dy/dr = ε̂                                        the flow, without noise
    level 2t - 1, t > 1    x' = the kernel's step from x_t to s;  m = α_s (x_t/α_t + x'/α_s)/2
    level 2t - 2           x_s = m + α_s (r_s - r_t)/2 ε̂(x', s)         a state (x', m) before it, (x_s, 0) after it
    level 1                the kernel's own step, to σ_0
    x is x - μ throughout where the chain is around an offset μ

ε̂(x', s) is read from the kernel's own step from x', y_u - y_s = (r_u - r_s) ε̂, so that clipping is as in the kernel.
Level 2t - 1 is x_t; between two of them stands a prediction, which is the sample's prediction too (`endpoint`).

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, expand, optional
from treesearch.backends.chains.packed import Packed

BY_LEVEL = frozenset({"rows_per_nfe", "backward_per_nfe", "rewards_per_nfe"})


@final
@dataclass(frozen=True, eq=False)
class Heun(Packed):
    """A kernel's flow at order two.

    Args:
        kernel: one on a `Chain` with η = 0 and α_T > 0.

    Raises:
        TypeError: a kernel without such a chain.
        ValueError: a chain with noise, or one whose prior has no signal.
    """

    # Levels of the chain are not those of the half steps.
    withheld: ClassVar[frozenset[str]] = frozenset({"chain", "renoise"})

    def __post_init__(self) -> None:
        super().__post_init__()
        chain = self.kernel.chain
        if chain.stochastic[1:].any():
            raise ValueError(f"the chain has eta={chain.eta}, expected 0: Heun's method solves the flow")
        if not (chain.schedule.alpha > 0).all():
            raise ValueError("the schedule ends with alpha = 0, where Heun's sigma/alpha is infinite: use SecondOrder")

    @property
    def memory(self) -> int:
        return 1

    @property
    def num_steps(self) -> int:
        return 2 * self._spec.num_steps - 1

    @property
    def stochastic(self) -> tuple[bool, ...]:
        return (self._spec.stochastic[0], *[False] * self.num_steps)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        (now, kept), grid = x.unbind(1), (t + 1) // 2
        law, offset = self._step(now, grid, cond), optional(self.kernel, "offset")
        around = 0.0 if offset is None else offset(now, cond)
        predicts, last = expand(t % 2 == 1, now), expand(t == 1, now)
        half = self._half(now - around, law.mean - around, grid)
        turned = self._turned(now - around, law.mean - around, grid)
        mean = torch.where(predicts, law.mean, around + kept + turned)
        return self._law(law, mean, torch.where(predicts & ~last, half, 0.0))

    def diagnose(self, t: Tensor) -> str:
        """What the kernel says of the levels that it knows these as."""
        hint = optional(self.kernel, "diagnose")
        return "" if hint is None else hint((t + 1) // 2)

    def _half(self, x: Tensor, mean: Tensor, t: Tensor) -> Tensor:
        """m = α_s (y_t + y_s)/2, half of the step by the slope where it begins."""
        alpha = self._table(self.kernel.chain.schedule.alpha, x)
        return 0.5 * (mean + alpha[t - 1] / alpha[t] * x)

    def _turned(self, x: Tensor, mean: Tensor, s: Tensor) -> Tensor:
        """α_s (r_s - r_t) ε̂(x, s)/2, the other half by the slope where it ends; x_t is the level above x_s."""
        alpha, ratio = self._table(self.kernel.chain.schedule.alpha, x), self._table(self._ratio, x)
        above = (s + 1).clamp_max(len(self._ratio) - 1)
        slope = (mean / alpha[s - 1] - x / alpha[s]) / (ratio[s - 1] - ratio[s])
        return 0.5 * alpha[s] * (ratio[s] - ratio[above]) * slope

    @cached_property
    def _ratio(self) -> Tensor:
        """r = σ/α of x_0..x_T."""
        schedule = self.kernel.chain.schedule
        return schedule.sigma / schedule.alpha

    def _table(self, values: Tensor, like: Tensor) -> Tensor:
        """Values by level, ready to be gathered against states."""
        table = values.to(like.device, like.dtype)
        return table.reshape(len(table), *(1,) * (like.ndim - table.ndim), *table.shape[1:])

    def _passed(self, name: str, value: Any) -> Any:
        if name not in BY_LEVEL or isinstance(value, int):
            return super()._passed(name, value)
        return (value[0], *(value[(level + 1) // 2] for level in range(1, self.num_steps + 1)))
