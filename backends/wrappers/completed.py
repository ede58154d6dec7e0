"""Completed: states are scored by what a student makes of them; the law of the steps stays the kernel's.

    law of x_s | x_t      the kernel's, and so Z, weights and samples
    x̂_0(x_t)              the student's at `levels`, the kernel's own elsewhere

The kernel's x̂_0 is the mean of what may come and looks like no sample where much may; a student's is near one sample,
the end of a deterministic path. Methods that score states above t = 0 (FK, DTS, beams) then read r of that. Endpoints
are no part of any target: with a poor student a search looks in poor places, and its claims hold.

A step at these levels costs the rows of both networks. The x̂_0 of the law is no longer that of the chain's step, so
that whatever reads ε out of it (inversion, coarse walks) asks the kernel inside.

Source: Rectified Diffusion (Wang et al., 2024), students; their use as values is ours, after Diffusion Tree Sampling
(Jain et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, fingerprint, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.wrappers.inpainting import hold_the_same
from treesearch.rewards.numeric import is_whole


@final
@dataclass(frozen=True, eq=False)
class Completed(Wrapper):
    """A kernel whose endpoints are a student's.

    Args:
        kernel: of Gaussian steps on a `Chain`.
        student: of the same states and levels, as `student(..., num_steps=T)` makes it.
        levels: t at which it is asked; None for all.

    Raises:
        TypeError: a kernel without such a chain.
        ValueError: a student of other states or levels, that knows other entries, or levels out of 1..T.
    """

    student: Any
    levels: Sequence[int] | None = None

    withheld: ClassVar[frozenset[str]] = frozenset({"chain"})
    undrafted: ClassVar[str] = "completed endpoints are a student's, not those that the chain leads to"

    def __post_init__(self) -> None:
        refuse_other_levels(self.kernel, self.student)
        steps = self._spec.num_steps
        if self.levels is not None and not (self.levels and all(is_whole(t, 1, steps) for t in self.levels)):
            raise ValueError(f"levels are {self.levels!r}, expected one or more of 1..{steps}")
        object.__setattr__(self, "levels", None if self.levels is None else tuple(sorted(set(self.levels))))

    def to(self, device: str | torch.device) -> Completed:
        """The same on a device."""
        return replace(super().to(device), student=self.student.to(device))

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Rows of both networks where the student is asked."""
        theirs = describe(self.student, identify=False).rows_per_nfe
        both = zip(self._spec.rows_per_nfe, theirs, strict=True)
        return tuple(ours + (rows if self._asks(t) else 0) for t, (ours, rows) in enumerate(both))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The kernel's step, with the student's endpoint.

        Raises:
            TypeError: no Gaussian step, or one whose endpoints a guide has scored.
        """
        law = self.kernel.transition(x, t, cond)
        if not isinstance(law, Gaussian) or law.rewards is not None:
            raise TypeError(f"{type(self.kernel).__name__} has no plain Gaussian steps: complete the kernel inside, "
                            "and put the guide around it")  # fmt: skip
        asked = torch.tensor([self._asks(level) for level in t.tolist()], device=t.device)
        if not asked.any():
            return law
        theirs = self.student.transition(x, t, cond).endpoint
        return replace(law, endpoint=torch.where(expand(asked, x), theirs, law.endpoint))

    def _asks(self, t: int) -> bool:
        return t > 0 and (self.levels is None or t in self.levels)

    def _settings(self) -> str | None:
        theirs = optional(self.student, "fingerprint")
        return None if theirs is None else fingerprint.of([theirs, self.levels])

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)


def refuse_other_levels(kernel: Any, student: Any) -> None:
    """See that a student stands beside a kernel at every level.

    Raises:
        TypeError: one of them has no chain.
        ValueError: other states, other levels or other known entries.
    """
    for each in (kernel, student):
        if not isinstance(optional(each, "chain"), Chain):
            name = type(each).__name__
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
    ours, theirs = (describe(each, identify=False) for each in (kernel, student))
    for name in ("num_steps", "state_shape", "noise_shape"):
        if (mine := getattr(ours, name)) != (other := getattr(theirs, name)):
            raise ValueError(f"{name} is {mine}, and {other} of the student: make it with as many steps as its teacher")
    levels = [(each.chain.schedule.alpha.cpu(), each.chain.schedule.sigma.cpu()) for each in (kernel, student)]
    if not all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*levels, strict=True)):
        raise ValueError("the student's noise levels are others than the kernel's: make it on the grid of its teacher")
    if not hold_the_same(kernel, student):
        raise ValueError("the kernel and the student do not know the same entries, and the student's would end up in "
                         "samples: put the same clamp around both")  # fmt: skip
