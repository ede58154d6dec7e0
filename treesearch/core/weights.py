"""Log-weights: all arithmetic on weights stays on the log scale.

All weights -inf is a state of its own: `log_mean` is -inf, `normalise` raises `ZeroWeights`, `ess` is 0. Nothing is
clamped and NaN never becomes a number: a read-out that holds one is `WeightOverflow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from treesearch.errors import TreeSearchError

F64 = NDArray[np.float64]


class ZeroWeights(TreeSearchError, ArithmeticError):
    """Every weight is zero: nothing to normalise, resample or draw from."""

    def __init__(self) -> None:
        super().__init__(
            "all weights are zero (every reward is -inf, or lam times the rewards underflows every potential): "
            "there is no sample of the target among these leaves; spend more, lower lam or soften the reward"
        )


LARGEST = 1e302  # |λ r|, so that sums and differences of log-weights stay numbers


class WeightOverflow(TreeSearchError, ArithmeticError):
    """λ r is too large for log-weights, or one of them or log Z came out as no number."""

    def __init__(self) -> None:
        super().__init__(
            "log-weights beyond what floats can hold (differences of lam times rewards near 1.8e308): expected "
            "|lam r| <= 1e302; scale the reward, clip it, or lower lam"
        )


def log_sum(log_w: F64) -> float:
    """log Σ exp(log_w); -inf where all are."""
    top = float(np.max(log_w)) if len(log_w) else -math.inf
    if math.isinf(top):
        return top
    return top + math.log(float(np.exp(log_w - top).sum()))


def log_mean(log_w: F64) -> float:
    """log of the mean weight."""
    return log_sum(log_w) - math.log(len(log_w)) if len(log_w) else -math.inf


def normalise(log_w: F64) -> F64:
    """Weights that sum to one.

    Raises:
        ZeroWeights: all are -inf.
    """
    top = float(np.max(log_w)) if len(log_w) else -math.inf
    if top == -math.inf:
        raise ZeroWeights
    w = np.exp(log_w - top)
    return w / w.sum()


def ess(log_w: F64) -> float:
    """Effective sample size 1/ΣW² in [1, K]; 0 where all weights are zero."""
    if not len(log_w) or np.max(log_w) == -math.inf:
        return 0.0
    return float(1.0 / np.square(normalise(log_w)).sum())


def log_mean_se(log_w: F64) -> float | None:
    """Standard error of `log_mean` for independent weights (delta method); None below two draws or at zero weight."""
    n = len(log_w)
    if n < 2 or np.max(log_w) == -math.inf:
        return None
    share = normalise(log_w) * n
    return float(np.std(share, ddof=1) / math.sqrt(n))


def temper(log_w: Callable[[float], F64], low: float, high: float, target: float) -> float:
    """Largest λ in [low, high] whose weights log_w(λ) keep an ESS of `target`, by bisection; `low` where none does.

    A temperature chosen from the particles makes estimates consistent, not unbiased.
    """
    if ess(log_w(high)) >= target:
        return high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ess(log_w(middle)) >= target else (low, middle)
    return low


def scaled(lam: float, reward: F64) -> F64:
    """λ r with 0 · (-inf) = 0: at λ = 0 no reward counts, not even a forbidding one.

    Raises:
        WeightOverflow: |λ r| > 1e302 for a finite r.
    """
    if lam == 0:
        return np.zeros_like(reward)
    most = np.abs(reward[np.isfinite(reward)]).max(initial=0.0)
    if math.isfinite(lam) and most > LARGEST / lam:
        raise WeightOverflow
    return lam * reward
