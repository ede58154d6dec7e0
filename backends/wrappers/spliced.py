"""Spliced: the last steps of a chain as one jump of a student.

    x_T -> ... -> x_at  by the kernel,      x_at -> x_0 = x̂_0 of the student      T - at + 1 steps in all

Rollouts cost T - at + 1 evaluations in place of T. Their x_0 have the law of another chain, which no weight leads back
to the kernel's: `departs` says so. The jump draws nothing, so that what a search could still choose below x_at is gone:
it pays where the reward is decided above.

Source: Rectified Diffusion (Wang et al., 2024), students; splicing is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, fingerprint, optional
from treesearch.backends.wrappers.completed import refuse_other_levels
from treesearch.rewards.numeric import is_whole


@final
@dataclass(frozen=True, eq=False)
class Spliced(Wrapper):
    """A kernel whose last steps are one jump of a student.

    Args:
        kernel: of Gaussian steps on a `Chain`.
        student: of the same states and levels, as `student(..., num_steps=T)` makes it.
        at: the level that it jumps from, 2..T; 1 would be no shorter.

    Raises:
        TypeError: a kernel without such a chain.
        ValueError: a student of other states or levels, that knows other entries, or a level out of range.
    """

    student: Any
    at: int

    withheld: ClassVar[frozenset[str]] = frozenset({"chain", "renoise"})  # of another number of levels
    undrafted: ClassVar[str] = "levels of a spliced chain are not those of one chain"

    def __post_init__(self) -> None:
        refuse_other_levels(self.kernel, self.student)
        if not is_whole(self.at, 2, self._spec.num_steps):
            raise ValueError(f"at is {self.at!r}, expected a level in 2..{self._spec.num_steps}")

    def to(self, device: str | torch.device) -> Spliced:
        """The same on a device."""
        return replace(super().to(device), student=self.student.to(device))

    @property
    def num_steps(self) -> int:
        return self._spec.num_steps - self.at + 1

    @property
    def departs(self) -> str:
        """The last step is the student's."""
        return f"the last {self.at} steps are one jump of a student, whose law is not the model's"

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the kernel, and nothing in the jump."""
        return (self._spec.stochastic[0], False, *self._spec.stochastic[self.at + 1 :])

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Network rows of an evaluation at each t."""
        jump = describe(self.student, identify=False).rows_per_nfe[self.at]
        return self._by_level("rows_per_nfe", jump)

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        """Backward passes of an evaluation at each t."""
        return self._by_level("backward_per_nfe", 0)

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return self._by_level("rewards_per_nfe", 0)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The kernel's step, or the jump.

        Raises:
            TypeError: no Gaussian step.
        """
        jumps = t == 1
        if jumps.all():
            return self._jump(x, t, cond)
        law = self.kernel.transition(x, torch.where(jumps, self.at, t + self.at - 1), cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"splicing needs a kernel of Gaussian steps, got {type(law).__name__}")
        return self._with(law, self._jump(x, t, cond), expand(jumps, x)) if jumps.any() else law

    def diagnose(self, t: Tensor) -> str:
        """What the kernel says of the levels that it knows these as."""
        hint = optional(self.kernel, "diagnose")
        return "" if hint is None else hint(t + self.at - 1)

    def _jump(self, x: Tensor, t: Tensor, cond: Cond) -> Gaussian:
        """The student's x̂_0, certain."""
        end = self.student.transition(x, torch.full_like(t, self.at), cond).endpoint
        return Gaussian(end, expand(torch.zeros_like(t), x).to(x.dtype), end)

    def _with(self, law: Gaussian, jump: Gaussian, rows: Tensor) -> Gaussian:
        """A law whose rows (n, 1, ...) are those of the jump."""
        pairs = ((jump.mean, law.mean), (jump.std, law.std), (jump.endpoint, law.endpoint))
        mean, std, endpoint = (torch.where(rows, theirs, ours) for theirs, ours in pairs)
        base = None if law.base_mean is None else torch.where(rows, jump.mean, law.base_mean)
        known = None if law.rewards is None else torch.where(rows.flatten(), torch.nan, law.rewards)
        return Gaussian(mean, std, endpoint, base, known)

    def _by_level(self, name: str, jump: int) -> tuple[int, ...]:
        each = getattr(self._spec, name)
        return (each[0], jump, *each[self.at + 1 :])

    def _settings(self) -> str | None:
        theirs = optional(self.student, "fingerprint")
        return None if theirs is None else fingerprint.of([theirs, self.at])

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)
