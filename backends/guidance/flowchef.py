"""FlowChef: the state follows the gradient of the predicted endpoint, with the velocity held still.

    x̂_0 <- x̂_0 + s ∇r(x̂_0),  M times                v is constant, so x_t and x_s move as x̂_0 does
    mean <- mean + (x̂_0 after - x̂_0 before)

No network takes part in the gradient: no backward pass, whatever the model. Where paths are straight ∂x̂_0/∂x_t is the
identity and the move is the gradient's own; elsewhere it is the "skipped" gradient, a direction like any other.

On a chain with noise (η > 0) the move is a proposal whose steps carry log p/q, and the target stays. On the Euler chain
of the paper (η = 0) a step has no density, the move is not weighed, and the result is a law of its own: it departs.

Source: FlowChef (Patel et al., 2025), algorithm 1; M is its optimisation steps a timestep, s its learning rate, and its
loss is -r.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Transition, optional
from treesearch.backends.guidance.base import RewardGuided, loose
from treesearch.backends.guidance.prompts import unpack
from treesearch.rewards.numeric import is_number, is_whole


@final
@dataclass(frozen=True)
class FlowChef(RewardGuided):
    """Endpoints follow the gradient of a reward, and the step with them.

    Args:
        kernel: the base kernel p; its steps must be `Gaussian`.
        reward: differentiable in the samples that the endpoint decodes to, higher is better.
        scale: s >= 0; 0 is the base kernel.
        steps: M, gradient steps an evaluation.

    Raises:
        TypeError: the kernel is guided by a gradient already.
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    scale: float = 0.1
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.scale, 0) and self.scale < math.inf):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        if not is_whole(self.steps):
            raise ValueError(f"steps is {self.steps!r}, expected 1 or more")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The base step, moved in the rows that are guided.

        Raises:
            TypeError: no Gaussian step, or no gradient between the endpoint and the reward.
            ValueError: the gradient is not finite.
        """
        inner, prompts = unpack(cond)
        law = self.kernel.transition(x, t, inner)
        if not isinstance(law, Gaussian):
            raise TypeError(f"gradients guide Gaussian steps, got {type(law).__name__} from the kernel")
        rows = self._levels.to(t.device)[t].nonzero().flatten()
        if not len(rows):
            return law
        prompts = None if prompts is None else [prompts[i] for i in rows.tolist()]
        move, known = torch.zeros_like(law.mean), torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
        climb, known[rows] = self._climbed(law.endpoint[rows], t[rows], prompts, self.steps, self.scale)
        move[rows] = climb.to(move.dtype)
        move = loose(self.kernel, move, inner)
        if self._still:
            return replace(law, mean=law.mean + move, base_mean=None, rewards=known)
        base = law.mean if law.base_mean is None else law.base_mean
        return replace(law, mean=law.mean + torch.where(law.std > 0, move, 0.0), base_mean=base, rewards=known)

    @property
    def departs(self) -> str | None:
        """Why its chain is another law than the kernel's."""
        published = "FlowChef on a chain without noise, as published: its moves have no weights"
        return published if self._still and self.scale > 0 else optional(self.kernel, "departs")

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return tuple((self.steps * self._levels.int()).tolist())

    @cached_property
    def _levels(self) -> Tensor:
        """Whether x_t is guided, (T + 1,): where a step has noise, or everywhere on a chain that has none."""
        guided = [t > 0 and self.scale > 0 and (s or self._still) for t, s in enumerate(self._spec.stochastic)]
        return torch.tensor(guided, device="cpu")
