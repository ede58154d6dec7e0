"""What a search may spend, and what it has spent.

NFE counts network evaluations of one state; under classifier-free guidance that is one NFE and two rows. A budget is
of the whole search, split evenly over its tasks, floor(total / tasks) each; the first limit reached stops it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

INFINITE = 2**62
ROUNDING = 1e-6  # of a unit: sums of seconds are not exact


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a search.

    Args:
        nfe: network evaluations.
        seconds: wall clock. A wave is as large as what is left of it pays for, at the pace of the wave before; the
            first, by which that is measured, is a single unit of the method.
        reward_calls: samples scored.
        iterations: units of the method: samples of best-of-N and beams, populations of FK steering, tree iterations.

    Raises:
        ValueError: a limit that is not positive.
    """

    nfe: int | None = None
    seconds: float | None = None
    reward_calls: int | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is None:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float, np.integer, np.floating))
                or not value > 0
                or math.isnan(value)
            ):
                raise ValueError(f"Budget({limit.name}={value!r}): expected a positive number")
            if limit.name != "seconds" and (math.isinf(value) or int(value) != value):
                raise ValueError(f"Budget({limit.name}={value!r}): expected a whole number, or None for no limit")
            object.__setattr__(self, limit.name, float(value) if limit.name == "seconds" else int(value))

    @property
    def empty(self) -> bool:
        """Whether no limit is set."""
        return all(value is None for value in asdict(self).values())

    def share(self, tasks: int) -> Share:
        """The limits of one of `tasks` tasks; seconds are the session's and stay whole."""
        limits = (self.nfe, self.reward_calls, self.iterations)
        return Share(*(INFINITE if v is None else v // tasks for v in limits), timed=self.seconds is not None)


class Pace(NamedTuple):
    """Seconds of the wall clock that an evaluation and a reward take.

    Args:
        nfe: of one network evaluation.
        reward_call: of decoding and scoring one sample.
    """

    nfe: float
    reward_call: float

    def of(self, nfe: float, reward_calls: float) -> float:
        """Seconds of so many of both."""
        return self.nfe * nfe + self.reward_call * reward_calls


@dataclass(frozen=True)
class Share:
    """Whole-number limits of one task, INFINITE where there is none.

    Args:
        nfe, reward_calls, iterations: the limits.
        timed: whether the session also has a clock.
        seconds: what all of it may take at `pace`, which is None until it is measured.
    """

    nfe: int = INFINITE
    reward_calls: int = INFINITE
    iterations: int = INFINITE
    timed: bool = False
    seconds: float = math.inf
    pace: Pace | None = None

    def units(self, nfe: int, reward_calls: int, iterations: int = 1) -> int:
        """How many units of the given cost fit."""
        fits = min(self.nfe // nfe, self.reward_calls // max(reward_calls, 1), self.iterations // iterations)
        return max(0, min(fits, self.in_time(nfe, reward_calls)))

    def in_time(self, nfe: int, reward_calls: int) -> int:
        """How many units of the given cost the clock leaves time for."""
        each = 0.0 if self.pace is None else self.pace.of(nfe, reward_calls)
        return INFINITE if each <= 0.0 else max(0, min(INFINITE, math.floor(self.seconds / each + ROUNDING)))

    def less(self, nfe: int, reward_calls: int, iterations: int) -> Share:
        """What is left after spending."""
        return replace(
            self,
            nfe=self.nfe - nfe,
            reward_calls=self.reward_calls - reward_calls,
            iterations=self.iterations - iterations,
            seconds=self.seconds - (0.0 if self.pace is None else self.pace.of(nfe, reward_calls)),
        )


@dataclass
class Cost:
    """What ran, measured in the loop.

    Args:
        nfe: network evaluations of one state, drafts as they are charged.
        draft_nfe: the part of `nfe` that went into drafts, each charged as so many evaluations of the kernel, rounded
            up, as its evaluations cost.
        rows: rows that went through the network (guidance doubles them, padding adds to them).
        backward_nfe: backward passes of one state.
        reward_calls: samples scored; cache hits are not calls.
        decodes: states decoded for a reward.
        seconds: wall clock of the session, summed over resumptions.
        model_seconds: in evaluations and draws, drafts included; of all workers together.
        reward_seconds: in rewards and in decoding what they see; of all workers together.
        repeated_nfe: evaluations done again (dropped states, interrupted waves); not part of `nfe`.
    """

    nfe: int = 0
    rows: int = 0
    backward_nfe: int = 0
    reward_calls: int = 0
    decodes: int = 0
    seconds: float = 0.0
    repeated_nfe: int = 0
    draft_nfe: int = 0
    model_seconds: float = 0.0
    reward_seconds: float = 0.0

    def add(self, other: Cost) -> None:
        """Enter what a part of the search cost."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def copy(self) -> Cost:
        """An independent copy."""
        return Cost(**asdict(self))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    out = Cost()
    for cost in costs:
        out.add(cost)
    return out
