"""A kernel that counts what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from treesearch.backends.base import Transition, Wrapper, optional


@dataclass
class Tally:
    """Network evaluations: of one state each, and in how many calls."""

    rows: int = 0
    calls: int = 0


@dataclass(frozen=True, eq=False)
class Counting(Wrapper):
    """A kernel that counts its own network evaluations and has a fingerprint."""

    seen: Tally = field(default_factory=Tally)

    @property
    def fingerprint(self) -> str:
        return optional(self.kernel, "fingerprint") or "conformance"

    @property
    def rows(self) -> int:
        return self.seen.rows

    @property
    def calls(self) -> int:
        return self.seen.calls

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Transition:
        self.seen.rows += len(x)
        self.seen.calls += 1
        return self.kernel.transition(x, t, cond)
