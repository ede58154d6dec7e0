"""Diffuser's value guide: each step moves along the gradient of the return J, scaled by the covariance of the step.

    μ, Σ = mean and variance of p(x_{t-1} | x_t)
    "mean"     n times: μ <- μ + α Σ ∇J(μ);   x_{t-1} ~ N(μ, Σ)                          algorithm 1, with n = 1
    "state"    n times: x_t <- x_t + α Σ ∇J(x_t), known entries put back;   x_{t-1} ~ p(· | x_t)     the released code

Published as a heuristic, without weights, and with a J that is trained on noisy trajectories. Here J is any reward, and
is asked about μ or x_t as if that were a sample: at high noise it knows little of it, so guide the low levels only, or
ask at the endpoint instead (`TDS`, `DPS`). "mean" knows the mean of p as well, so its steps carry log p/q and methods
that weigh keep their target; the raw samples of best-of-N are the published ones. "state" is a law of its own
(`departs`). Steps without noise are not guided.

Source: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), algorithm 1; the released code
plans locomotion with α = .1, n = 2 and no guide in the last two steps.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Transition, optional
from treesearch.backends.guidance.base import RewardGuided, clamped, loose
from treesearch.backends.guidance.prompts import unpack
from treesearch.rewards.numeric import is_number, is_whole

At = Literal["mean", "state"]


@final
@dataclass(frozen=True)
class Diffuser(RewardGuided):
    """The value-guided sampler.

    A guided evaluation costs n_guide_steps reward calls and no backward pass through the network.

    Args:
        kernel: the base kernel p; its steps must be `Gaussian`, and for "state" it has `chain.std`.
        reward: J, differentiable.
        scale: α >= 0; 0 is the base kernel.
        at: where J is asked.
        n_guide_steps: n, steps along the gradient for each of the chain.
        t_stopgrad: the last steps, t <= t_stopgrad, are not guided.

    Raises:
        TypeError: the kernel is guided already, or lacks `chain.std` under "state".
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    scale: float = 0.1
    at: At = "mean"
    n_guide_steps: int = 1
    t_stopgrad: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.scale, 0) and self.scale < math.inf):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        if self.at not in get_args(At):
            raise ValueError(f"unknown at {self.at!r}: choose mean or state")
        if not is_whole(self.n_guide_steps):
            raise ValueError(f"n_guide_steps is {self.n_guide_steps!r}, expected at least 1")
        if not is_whole(self.t_stopgrad, 0, self._spec.num_steps - 1):
            raise ValueError(f"t_stopgrad is {self.t_stopgrad!r}, expected 0..T - 1 = {self._spec.num_steps - 1}")
        if self.at == "state" and not isinstance(getattr(optional(self.kernel, "chain"), "std", None), Tensor):
            raise TypeError(f"{type(self.kernel).__name__} has no `chain.std`: guide at='mean'")

    @property
    def departs(self) -> str | None:
        """Why the chain is no proposal for p; None where it is one."""
        moved = "value guidance at x_t: its steps move x_t without weights"
        return moved if self.at == "state" else self._spec.departs

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The moved step.

        Raises:
            TypeError: no Gaussian step, or no gradient reaches the state.
            ValueError: the gradient is not finite.
        """
        inner, prompts = unpack(cond)
        rows = self._levels.to(t.device)[t].nonzero().flatten()
        if self.at == "state" and len(rows):
            std = self.kernel.chain.at("std", t, x)
            return self.kernel.transition(self._climb(x, std, t, rows, inner, prompts), t, inner)
        law = self.kernel.transition(x, t, inner)
        if not len(rows):
            return law
        if not isinstance(law, Gaussian):
            raise TypeError(f"the value guide moves Gaussian steps, got {type(law).__name__} from the kernel")
        mean = self._climb(law.mean, law.std, t, rows, None, prompts)
        return replace(law, mean=mean, base_mean=law.mean if law.base_mean is None else law.base_mean)

    def _climb(self, x: Tensor, std: Tensor, t: Tensor, rows: Tensor, cond: Cond, prompts: list[Any] | None) -> Tensor:
        """x after n steps α std² ∇J in the given rows; known entries stay where they are known."""
        asked = None if prompts is None else [prompts[i] for i in rows.tolist()]
        variance = std.square()[rows]
        for _ in range(self.n_guide_steps):
            move = torch.zeros_like(x)
            move[rows] = (self.scale * variance * self._slope(x[rows], t[rows], asked)).to(x.dtype)
            x = clamped(self.kernel, x + loose(self.kernel, move, cond), cond)
        return x

    @cached_property
    def _levels(self) -> Tensor:
        """Whether x_t is guided, (T + 1,): a noisy step above the last t_stopgrad."""
        noisy = enumerate(self._spec.stochastic)
        return torch.tensor([t > self.t_stopgrad and s and self.scale > 0 for t, s in noisy], device="cpu")

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return tuple((self.n_guide_steps * self._levels.int()).tolist())
