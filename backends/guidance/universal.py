"""Universal guidance: ε̂ moves along the gradient at the clean endpoint, and the endpoint to where the reward is higher.

    forward     ε̂' = ε̂ - s σ_t ∇_{x_t} r(x̂_0(x_t))                                       through the network
    backward    x̂_0' = x̂_0 + Δ,   Δ by M steps of length κ along ∇_{x̂_0} r                none; ε̂' = ε̂ - (α_t/σ_t) Δ
    mean'       that of the step from x_t with ε̂' of both

In a step that is linear in ε̂ the two are shifts of its mean, by -s σ_t ∂mean/∂ε̂ g and by lever · Δ:

    ∂mean/∂ε̂ = √(σ_s² - s̃²) - α_s σ_t/α_t,      lever = α_s - √(σ_s² - s̃²) α_t/σ_t

As published a sampler without weights; as a proposal whose steps carry log p/q its target is p exp(λ r), and without
noise in a step there is nothing to weigh. Its loops at each level noise x_s up again: a `Cycle` around it does so
between two levels. What the others move, r the same, lengths apart:

    Universal(scale=s)          the mean along the gradient through the network, by s σ_t (α_s σ_t/α_t - √(σ_s² - s̃²))
    TDS                         along the same, by λ s̃², which vanishes with the noise of the step
    DPS                         along the same, by ζ, or a length of its own
    Universal(0, steps=M)       by lever · Δ, which no network takes part in
    FlowChef(steps=M)           by Δ
    Steered                     by lever · r_t² ∇_{x̂_0} v, v the evidence of a measurement in place of r
    TDS(value=r of x_t)         "naive" guidance: a reward of clean samples is asked about noisy ones

Source: Universal Guidance for Diffusion Models (Bansal et al., 2023), eqs. 6-9 and algorithm 1; its loss is -r.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import final

from torch import Tensor

from treesearch.backends.base import optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.rewards.numeric import is_number, is_whole


@final
@dataclass(frozen=True)
class Universal(GradientGuided):
    """Forward and backward universal guidance as a proposal.

    Args:
        scale: s >= 0 of the forward rule; 0 leaves it out, and with it the backward pass through the network.
        steps: M of the backward rule; 0 leaves it out.
        length: κ > 0 of its steps.
        kernel: on a `treesearch.backends.chains.diffusion.Chain`; its steps must be `Gaussian`.
        reward, window, max_shift: as in `GradientGuided`.

    Raises:
        TypeError: the kernel has no such chain.
        ValueError: a setting out of range, a chain without noise, a forward rule where α_T = 0 or that is not to go
            through the network.
    """

    _: KW_ONLY
    scale: float = 1.0
    steps: int = 0
    length: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is not None:
            raise ValueError("value is given: this guide asks the reward of clean endpoints, TDS takes values")
        if not isinstance(optional(self.kernel, "chain"), Chain):
            raise TypeError(f"{type(self.kernel).__name__} is no kernel on a backends.chains.diffusion.Chain")
        if not (is_number(self.scale, 0) and self.scale < math.inf):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        if not is_whole(self.steps, 0):
            raise ValueError(f"steps is {self.steps!r}, expected a number of steps, 0 or more")
        if not (is_number(self.length, 0) and 0 < self.length < math.inf):
            raise ValueError(f"length is {self.length!r}, expected a positive number")
        if self.scale > 0 and not (self.kernel.chain.alpha[1:] > 0).all():
            raise ValueError("the forward rule divides by α_t, which is 0 at x_T: use scale=0 and steps, or TDS")
        if self.scale > 0 and not self.through_network:
            raise ValueError("through_network is False: the forward rule goes through it; scale=0 leaves that rule out")
        object.__setattr__(self, "through_network", self.scale > 0)
        self._refuse_still()

    def shift(self, step: Step) -> Tensor:
        at, x = self.kernel.chain.at, step.x
        alpha, sigma, alpha_s, direction = (at(name, step.t, x) for name in ("alpha", "sigma", "alpha_s", "direction"))
        move = 0.0 * step.gradient
        if self.scale > 0:
            move = self.scale * sigma * (alpha_s * sigma / alpha - direction) * step.gradient
        if self.steps:
            climb, _ = self._climbed(step.law.endpoint, step.t, step.prompts, self.steps, self.length)
            move = move + (alpha_s - direction * alpha / sigma) * climb
        return move

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return tuple((1 + self.steps) * n for n in super().rewards_per_nfe)
