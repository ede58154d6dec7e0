"""DPS: each step moves along the gradient of the endpoint's reward, by a length that is set by hand.

    g = ∇_{x_t} r(x̂_0(x_t)),   q(x_s | x_t) = N(mean + shift, std²)
    shift = ζ g                       "none"
            ζ g / √(-r)               "residual": r = -|y - A(x)|², the published step ζ' / |y - A(x̂_0)|
            ζ std √d g / |g|          "gradient": ζ times the length of the noise, whatever the scale of r

Published as a sampler without weights, whose law is not p exp(λ r); as a proposal it is exact. The first two take no
account of std: where the noise of a step is small against the shift the weights spread, so prefer "gradient",
`max_shift`, or TDS.

Sources: Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023), algorithm 1.
    Guidance with Spherical Gaussian Constraint for Conditional Diffusion (Yang et al., 2024), for the length √d std.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from treesearch.backends.base import expand
from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.rewards.numeric import is_number
from treesearch.rewards.values import flat

Normalise = Literal["none", "residual", "gradient"]


@final
@dataclass(frozen=True)
class DPS(GradientGuided):
    """Diffusion posterior sampling as a proposal.

    Args:
        scale: ζ >= 0; 0 is the base kernel.
        normalise: none, residual (the reward is minus a squared residual, never positive) or gradient.
        kernel, reward, window, max_shift, through_network, value: as in `GradientGuided`.

    Raises:
        ValueError: a setting out of range; later, a positive reward under "residual".
    """

    _: KW_ONLY
    scale: float = 1.0
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.scale, 0) and self.scale < math.inf):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        if self.normalise not in get_args(Normalise):
            raise ValueError(f"unknown normalise {self.normalise!r}: choose none, residual or gradient")

    def shift(self, step: Step) -> Tensor:
        gradient, rewards = step.gradient, step.rewards
        if self.normalise == "none":
            return self.scale * gradient
        if self.normalise == "gradient":
            norm = flat(gradient.double()).norm(dim=1)
            unit = torch.where(expand(norm, gradient) > 0, gradient / expand(norm, gradient), 0.0)
            return self.scale * step.law.std * gradient[0].numel() ** 0.5 * unit
        if (rewards > 0).any():
            raise ValueError(
                f"normalise='residual' needs rewards that are minus a squared residual, {self.reward.name!r} gave "
                f"{float(rewards.max()):.4g}: use normalise='gradient' or 'none'"
            )
        # A residual of zero has gradient zero too.
        return self.scale * torch.where(
            expand(rewards, gradient) < 0, gradient / expand((-rewards).sqrt(), gradient), 0.0
        )
