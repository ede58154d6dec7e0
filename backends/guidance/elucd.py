"""EluCD: classifier guidance by an off-the-shelf classifier on the predicted endpoint, which no network's graph enters.

    g = ∇_{x̂_0} [τ_1 f_y(x̂_0) - log Σ_k exp(τ_2 f_k(x̂_0))]                    the reward, as digit(8, tau2=0.5)
    q(x_s | x_t) = N(mean + s (std² + γ max_t std² sin(π t/T)) g, std²)

The endpoint is clean enough for a classifier that never saw noise, and no backward pass goes through the denoiser. With
τ_2 < τ_1 the gradient does not vanish where the classifier is sure: it keeps pulling, and s must shrink. As a proposal
whose steps carry log p/q every choice of s, γ, τ has the same target; what they move is the effective sample size: it
is what to choose them by.

Source: Elucidating the Design Space of Classifier-Guided Diffusion Generation (Ma et al., 2024), eqs. 8-12, s = 1,
γ = .3, τ_1 = 1, τ_2 = .5 at 250 steps of ImageNet 128 (there max over t of the posterior variance).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import expand, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class EluCD(GradientGuided):
    """A guide by the gradient at the endpoint, with a sine of noise added to its reach.

    Args:
        scale: s >= 0; 0 is the base kernel.
        gamma: γ >= 0, the part of the sine; above 0 the kernel needs a `Chain`.
        kernel, reward, window, max_shift: as in `GradientGuided`.

    Raises:
        TypeError: γ > 0 over a kernel without a chain.
        ValueError: a setting out of range, or a chain without noise.
    """

    _: KW_ONLY
    scale: float = 1.0
    gamma: float = 0.3
    through_network: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_still()
        for name in ("scale", "gamma"):
            if not (is_number(value := getattr(self, name), 0) and value < math.inf):
                raise ValueError(f"{name} is {value!r}, expected a finite number >= 0")
        if self.through_network:
            raise ValueError("through_network is True: this guide stops at the endpoint; TDS goes through")
        if self.gamma > 0 and not isinstance(optional(self.kernel, "chain"), Chain):
            raise TypeError(f"{type(self.kernel).__name__} has no `chain` to take the largest variance of: gamma=0")

    def shift(self, step: Step) -> Tensor:
        sine = torch.sin(math.pi * step.t / self._spec.num_steps).to(step.gradient)
        added = self.gamma * self._largest * expand(sine, step.gradient)
        return self.scale * (step.law.std**2 + added) * step.gradient

    @cached_property
    def _largest(self) -> float:
        """max_t std²."""
        return float(self.kernel.chain.std.max() ** 2) if self.gamma > 0 else 0.0
