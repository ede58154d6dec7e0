"""Means and their intervals: over seeds by Student's t, over prompts or pairs by the percentile bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from treesearch.errors import missing

DRAWS = 2_000  # of a bootstrap
F64 = NDArray[np.float64]
Groups = Sequence[NDArray[np.int64]]
"""Which values go together."""


class Mean(NamedTuple):
    """A mean over seeds and its standard error, NaN for a single one."""

    mean: float
    se: float

    def text(self, scale: float = 1.0) -> str:
        """Such as 0.123 ± 0.004: two digits of the error."""
        mean, se = self.mean * scale, self.se * scale
        if not se > 0:
            return f"{mean:,.4g}" if abs(mean) < 1e4 else f"{mean:,.0f}"
        digits = max(0, min(6, 1 - math.floor(math.log10(se))))
        return f"{mean:,.{digits}f} ± {se:,.{digits}f}"


def mean_se(values: ArrayLike) -> Mean:
    """Mean and standard error over axis 0.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, float)
    if not len(x):
        raise ValueError("a mean needs at least one value")
    return Mean(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan)


class Interval(NamedTuple):
    """A mean with 95 % bounds."""

    mean: float
    low: float
    high: float

    def text(self, scale: float = 100.0) -> str:
        """Such as 54 (48 to 61)."""
        return f"{self.mean * scale:.0f} ({self.low * scale:.0f} to {self.high * scale:.0f})"


@cache
def student(freedom: int) -> float:
    """The .975 quantile of Student's t."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise missing("scipy", "dev") from error
    return float(t.ppf(0.975, freedom))


def over_seeds(values: ArrayLike) -> Interval:
    """Mean of independent values (n,) and its bounds by Student's t, NaN of a single one.

    Raises:
        ValueError: no values.
    """
    mean, se = mean_se(values)
    half = student(len(np.asarray(values)) - 1) * se if se == se else math.nan
    return Interval(mean, mean - half, mean + half)


def resamples(size: int, draws: int = DRAWS) -> NDArray[np.int64]:
    """Draws with replacement out of so many, the same at every call: whatever shares them is compared in pairs."""
    return np.random.default_rng(0).integers(0, size, (draws, size))


def bootstrap(values: F64, groups: Groups | None = None, picks: NDArray[np.int64] | None = None) -> Interval:
    """The mean of values (seeds, n), seeds pooled, with percentile bounds.

    Args:
        values: of each seed and unit.
        groups: which units are drawn together, single ones by default.
        picks: draws of groups, those of `resamples` by default.

    Raises:
        ValueError: no values.
    """
    if not values.size:
        raise ValueError("an interval needs at least one value")
    of_unit = values.mean(0)
    groups = [np.array([i]) for i in range(len(of_unit))] if groups is None else groups
    total, size = (np.array([of(of_unit[rows]) for rows in groups], float) for of in (np.sum, len))
    picks = resamples(len(groups)) if picks is None else picks
    low, high = np.quantile(total[picks].sum(1) / size[picks].sum(1), [0.025, 0.975])
    return Interval(float(of_unit.mean()), float(low), float(high))
