"""What a method may say about its numbers: declared by its configuration, before anything has run.

A method has an attribute `claims`; its search may add an `Interval` to its read-out. `treesearch.results.certificate`
joins them with what it can see for itself: the weights, the kernel, the budget, how the search ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

Z95 = 1.959964  # normal quantile of 95 % intervals


class Bias(StrEnum):
    """Names of the flags."""

    GREEDY = "greedy"
    STEERED = "steered"
    SOFT_VALUE = "soft_value"
    CHOSEN_TEMPERATURES = "chosen_temperatures"
    SELF_NORMALISED = "self_normalised"
    RESAMPLED = "resampled"
    SHARED_ANCESTORS = "shared_ancestors"
    NOISE_NEIGHBOURS = "noise_neighbours"
    UNDECLARED = "undeclared"
    DETERMINISTIC_STEPS = "deterministic_steps"
    UNWEIGHTED_GUIDE = "unweighted_guide"
    DEPARTS = "departs"
    PREVIEWED = "previewed"
    ASYNCHRONOUS = "asynchronous"
    OUT_OF_TIME = "out_of_time"
    UNFINISHED = "unfinished"


class Flag(NamedTuple):
    """One way in which the numbers may be off, and why."""

    name: Bias
    reason: str


class Standing(StrEnum):
    """How far an interval of log Z can be relied on."""

    OK = "ok"
    UNRELIABLE = "unreliable"
    NOT_POSITIVE = "not positive"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What a search itself knows about the error of the log Z in its read-out.

    The 95 % interval is log Ẑ ± t·se, t the quantile of `dof` degrees of freedom, unless `low` and `high` are given.

    Args:
        source: where it comes from.
        se: relative standard error of Ẑ, None where there is none.
        dof: degrees of freedom of `se`.
        low, high: bounds of log Z that are no multiples of `se`.
        standing: `NOT_POSITIVE` says that Ẑ <= 0, so that there is no log Z; `NONE` that there is no interval.
        reason: of every standing but `OK`.
        k_hat: Pareto k̂ of the totals that it comes from.

    Raises:
        ValueError: a standing without a reason.
    """

    source: str
    se: float | None = None
    dof: float = math.inf
    low: float | None = None
    high: float | None = None
    standing: Standing = Standing.OK
    reason: str = ""
    k_hat: float | None = None

    def __post_init__(self) -> None:
        if self.standing != Standing.OK and not self.reason:
            raise ValueError(f"Interval(standing={str(self.standing)!r}): expected a reason")


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What holds for every search with a configuration.

    Args:
        flags: biases that follow from it.
        iid: its samples are independent draws of one law and Ẑ is their mean weight.
        weighs: log p/q of a guide's steps enters its weights; where not, a guide changes the law of its samples.
        no_interval: why log Z has no interval, where the read-out brings none.
    """

    flags: tuple[Flag, ...] = ()
    iid: bool = False
    weighs: bool = True
    no_interval: str = "the method gives no standard error"

    @property
    def greedy(self) -> bool:
        """Whether it looks for high rewards alone: its samples have no weights towards π."""
        return any(flag.name == Bias.GREEDY for flag in self.flags)


GREEDY = Flag(Bias.GREEDY, "it looks for high rewards: its samples are no draws of π, and no Z is estimated")
SHARED = Flag(Bias.SHARED_ANCESTORS, "samples share ancestors: they are not independent, and fewer than they look")
SELF_NORMALISED = Flag(
    Bias.SELF_NORMALISED,
    "draws come from normalised weights, with replacement: means over them are biased by O(1/ESS)",
)
RESAMPLED = Flag(
    Bias.RESAMPLED,
    "where it resampled, particles share ancestors: they are alike, which the ESS of their weights does not see",
)
SOFT_VALUE = Flag(
    Bias.SOFT_VALUE,
    "λ·v_root is biased low, E[exp(λ v_root)] < Z: lucky children are visited again, unlucky ones never corrected",
)
GREEDY_TREE = Claims(flags=(GREEDY, SHARED), weighs=False, no_interval="greedy: no Z is estimated")


def t95(dof: float) -> float:
    """Quantile .975 of Student's t, by its expansion in 1/dof (within 1 % from two degrees of freedom on).

    Source: Handbook of Mathematical Functions (Abramowitz and Stegun, 1964), 26.7.5.
    """
    z, n = Z95, dof
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (i + 1) for i, term in enumerate(terms))
