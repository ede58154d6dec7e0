"""Away from a weak model: guidance by the difference to a kernel that is the same but worse.

    mean <- mean + w (mean - weak mean),     x̂_0 likewise;  std stays

On one chain means are linear in ε̂, so that this is ε̂ + w (ε̂ - ε̂_weak) of the papers, except where x̂_0 is clipped. The
weak kernel is the same network with its attention perturbed (PAG, SEG, SoftPAG), or a smaller or younger one
(autoguidance). The kernel that results has a law of its own, as under classifier-free guidance; `Proposal` keeps p.

Sources: Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance (Ahn et al., 2024), eq. 13. Guiding a
Diffusion Model with a Bad Version of Itself (Karras et al., 2024), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, optional
from treesearch.backends.interventions.base import law_of
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class Away(Wrapper):
    """A kernel that steps away from a weak one.

    Args:
        kernel: of Gaussian steps.
        weak: of the same states and levels, and the same spread in every step.
        scale: w >= 0; 0 is the kernel itself.

    Raises:
        ValueError: other states or levels, or a scale out of range.
    """

    weak: Any
    scale: float

    def __post_init__(self) -> None:
        if not is_number(self.scale, 0) or self.scale == math.inf:
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        ours, theirs = self._spec, describe(self.weak, identify=False)
        for name in ("num_steps", "state_shape", "noise_shape"):
            if (mine := getattr(ours, name)) != (other := getattr(theirs, name)):
                raise ValueError(f"{name} is {mine}, and {other} of the weak kernel: both must be of one chain")

    @property
    def base_law(self) -> str:
        """Whose law p is."""
        return f"{law_of(self.kernel)} away from {law_of(self.weak)}"

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """Those of the weak kernel, which begin with the kernel's own."""
        return optional(self.weak, "choices", ())

    @property
    def untouched(self) -> Any:
        """The kernel without interventions."""
        return optional(self.kernel, "untouched", self.kernel)

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Rows of both networks."""
        theirs = describe(self.weak, identify=False).rows_per_nfe
        return tuple(a + b for a, b in zip(self._spec.rows_per_nfe, theirs, strict=True))

    def to(self, device: str | torch.device) -> Away:
        """The same on a device."""
        move = optional(self.weak, "to")
        return replace(super().to(device), weak=self.weak if move is None else move(device))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The step away.

        Raises:
            TypeError: steps that are not Gaussian, or that carry weights.
        """
        law, weak = (kernel.transition(x, t, cond) for kernel in (self.kernel, self.weak))
        for each in (law, weak):
            if not isinstance(each, Gaussian) or each.base_mean is not None:
                raise TypeError(
                    "steps must be Gaussian and without weights: guide by a reward outside of it, not within"
                )
        mean = law.mean + self.scale * (law.mean - weak.mean)
        return replace(law, mean=mean, endpoint=law.endpoint + self.scale * (law.endpoint - weak.endpoint))

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _settings(self) -> str | None:
        theirs = optional(self.weak, "fingerprint")
        return None if theirs is None else f"{theirs}, {self.scale!r}"
