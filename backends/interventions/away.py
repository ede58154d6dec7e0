"""Away from a weak model: guidance by the difference to a kernel that is the same but worse.

    mean <- mean + w (mean - weak mean),     x̂_0 likewise;  std stays

On one chain means are linear in ε̂, so that this is ε̂ + w (ε̂ - ε̂_weak) of the papers, except where x̂_0 is clipped. The
weak kernel is the same network with its attention perturbed (PAG, SEG, SoftPAG), or a smaller or younger one
(autoguidance). It is evaluated where a row of the batch leads away from it: not outside of `levels`, nor where it is
the kernel itself with its interventions off. The kernel that results has a law of its own, as under classifier-free
guidance; `Proposal` keeps p.

Sources: Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance (Ahn et al., 2024), eq. 13. Guiding a
Diffusion Model with a Bad Version of Itself (Karras et al., 2024), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, optional
from treesearch.backends.interventions.base import Intervened, law_of, window, within
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class Away(Wrapper):
    """A kernel that steps away from a weak one.

    Args:
        kernel: of Gaussian steps.
        weak: of the same states and levels, with noise in the same steps. Where both have interventions, the weak
            kernel's begin with the kernel's own, so that an action means the same to both.
        scale: w >= 0; 0 is the kernel itself.
        levels: (low, high), t at which it leads away, both included; None are all.

    Raises:
        ValueError: other states or levels, other interventions to begin with, or a scale or levels out of range.
    """

    weak: Any
    scale: float
    _: KW_ONLY
    levels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.scale, 0) or self.scale == math.inf:
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        ours, theirs = self._spec, describe(self.weak, identify=False)
        for name in ("num_steps", "state_shape", "noise_shape"):
            if (mine := getattr(ours, name)) != (other := getattr(theirs, name)):
                raise ValueError(f"{name} is {mine}, and {other} of the weak kernel: both must be of one chain")
        if ours.stochastic != theirs.stochastic:
            at = next(t for t, (a, b) in enumerate(zip(ours.stochastic, theirs.stochastic, strict=True)) if a != b)
            raise ValueError(f"one of the kernels has noise at t = {at} and the other has none: give both the same eta")
        object.__setattr__(self, "levels", window(self.levels, ours.num_steps))
        self._check_choices()

    @property
    def base_law(self) -> str:
        """Whose law p is."""
        return f"{law_of(self.kernel)} away from {law_of(self.weak)}"

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """Those of the weak kernel, which begin with the kernel's own; those where it has none."""
        return _choices(self.weak) or _choices(self.kernel)

    @property
    def untouched(self) -> Any:
        """The kernel without interventions."""
        return optional(self.kernel, "untouched", self.kernel)

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Rows of both networks where it leads away."""
        theirs = describe(self.weak, identify=False).rows_per_nfe
        both = zip(self._spec.rows_per_nfe, theirs, strict=True)
        return tuple(a + (b if self._leads(t) else 0) for t, (a, b) in enumerate(both))

    def to(self, device: str | torch.device) -> Away:
        """The same on a device."""
        move = optional(self.weak, "to") if self._layers is None else None
        made = super().to(device)
        return made if move is None else replace(made, weak=move(device))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The step away.

        Raises:
            TypeError: steps that are not Gaussian, or that carry weights.
        """
        law, on = _gaussian(self.kernel.transition(x, t, cond)), self._on(t, cond)
        if not on.any():
            return law
        weak, on = _gaussian(self.weak.transition(x, t, cond)), expand(on, x)
        mean, endpoint = (
            torch.where(on, ours + self.scale * (ours - theirs), ours)
            for ours, theirs in ((law.mean, weak.mean), (law.endpoint, weak.endpoint))
        )
        return replace(law, mean=mean, endpoint=endpoint)

    def _on(self, t: Tensor, cond: Cond) -> Tensor:
        """Which rows lead away (n,)."""
        on = within(self.levels, t) & (self.scale > 0)
        if self._layers is None:
            return on
        changed = [layer.setting(t, cond) > 0 for layer in self._layers]
        return on & torch.stack([torch.zeros_like(on), *changed]).any(0)

    def _leads(self, t: int) -> bool:
        """Whether rows at a level may."""
        layers = self._layers
        changed = layers is None or any(within(layer.levels, t) for layer in layers)
        return self.scale > 0 and within(self.levels, t) and changed

    @property
    def _layers(self) -> Sequence[Intervened] | None:
        """Interventions that make the weak kernel of this one, outermost first; None where it is another kernel."""
        weak, layers = self.weak, list[Intervened]()
        while weak is not self.kernel:
            if not isinstance(weak, Intervened):
                return None
            layers.append(weak)
            weak = weak.kernel
        return layers

    def _around(self, kernel: Any, method: str) -> Away:
        """Around another kernel, and so a weak one that is made of it."""
        if self._layers is None:
            return super()._around(kernel, method)
        weak = kernel
        for layer in reversed(self._layers):
            weak = layer._around(weak, method)
        return replace(self, kernel=kernel, weak=weak)

    def _check_choices(self) -> None:
        own, theirs = _choices(self.kernel), _choices(self.weak)
        if own and theirs and (theirs[: len(own)] != own or _made(self.weak)[: len(own)] != _made(self.kernel)):
            raise ValueError(
                f"the kernel has the settings {own} and the weak one {theirs}: an action would mean two things; make "
                "the weak kernel around this one, or give interventions to one of them"
            )

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _settings(self) -> str | None:
        theirs = optional(self.weak, "fingerprint")
        return None if theirs is None else f"{theirs}, {self.scale!r}, {self.levels}"


def _gaussian(law: Any) -> Gaussian:
    if not isinstance(law, Gaussian) or law.base_mean is not None:
        raise TypeError("steps must be Gaussian and without weights: guide by a reward outside of it, not within")
    return law


def _choices(kernel: Any) -> tuple[tuple[str, ...], ...]:
    return optional(kernel, "choices", ())


def _made(kernel: Any) -> list[str | None]:
    """What tells the interventions of a kernel from others, in the order of its choices."""
    if isinstance(kernel, Away):
        return _made(kernel.weak if _choices(kernel.weak) else kernel.kernel)
    if not isinstance(kernel, Wrapper):
        return []
    own = [kernel._settings()] if isinstance(kernel, Intervened) else []
    return [*_made(kernel.kernel), *own]
