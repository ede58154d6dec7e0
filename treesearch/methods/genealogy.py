"""How sure a population is of its Ẑ, from the ancestors of its particles.

    V = 1 - (K/(K-1))^{n+1} (1 - Σ_e (Σ_{i: eve i = e} W_i)²)          relative variance after n multinomial resamplings

is unbiased (Lee and Whiteley, 2018). Schemes of lower variance lose fewer lineages than the n factors allow for; with
n = 0 in their place V is an over-estimate as a rule (measured on the Gaussian chain, K = 100, resampling at every
level: 1.6 times the variance for systematic, 1.7 ssp, 2.0 stratified, 3.1 residual). Where fewer than ten lineages
survive it says nothing. Lineages are what is independent, so that their totals tell whether V can be relied on: where
few of them carry the weight, or the tail of the totals is heavy (`treesearch.pareto`), what was not reached is missing
from Ẑ and V alike.

Source: Variance estimation in the particle filter (Lee and Whiteley, 2018), eq. 9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treesearch import pareto
from treesearch.methods.claims import Interval, Standing
from treesearch.weights import F64, ess, normalise

FEWEST = 10  # surviving lineages
ENOUGH = 25.0  # effective lineages, below which an interval is not relied on
ROUNDING = 1e-9
KNOWN = 0.9  # share of Ẑ that must have a variance
SOURCE = "genealogy of the particles (Lee and Whiteley, 2018)"


def lineage_variance(log_w: F64, eve: NDArray[np.int64], multinomial: int = 0) -> float | None:
    """Relative variance of one population's Ẑ.

    Args:
        log_w: at x_0, (K,), not all of them -inf.
        eve: the particle of the first level each descends from, (K,).
        multinomial: resamplings by the multinomial scheme; those by others do not count.
    """
    k, share = len(log_w), np.bincount(eve, weights=normalise(log_w), minlength=len(log_w))
    if k < 2 or (share > 0).sum() < FEWEST:
        return None
    variance = 1 - math.exp((multinomial + 1) * math.log(k / (k - 1))) * (1 - float((share**2).sum()))
    if variance < -ROUNDING:
        return None
    return max(variance, 0.0)


def joint_se(shares: F64, variances: Sequence[float | None]) -> float | None:
    """Relative standard error of Σ Ẑ_i from the relative variances of its independent parts.

    None where parts without a variance hold more than a tenth of it.

    Args:
        shares: Ẑ_i / Σ Ẑ_i.
        variances: of each part.
    """
    known = np.array([v is not None for v in variances])
    if shares[known].sum() < KNOWN:
        return None
    squares = [s**2 * v for s, v in zip(shares, variances, strict=True) if v is not None]
    return math.sqrt(sum(squares)) / float(shares[known].sum())


def totals(log_w: F64, eve: NDArray[np.int64]) -> F64:
    """Log of the share of weight that descends from each particle of the first level, (K,)."""
    with np.errstate(divide="ignore"):
        return np.log(np.bincount(eve, weights=normalise(log_w), minlength=len(log_w)))


def thin(lineages: F64) -> str:
    """Why totals of independent lineages are too few or too uneven to rely on; empty where they are not."""
    effective = ess(lineages)
    if effective < ENOUGH:
        return f"{effective:.1f} effective lineages, fewer than {ENOUGH:g}: regions without any are missed by Ẑ and se"
    return pareto.too_heavy(lineages, pareto.k_hat(lineages))


def by_lineage(se: float | None, advice: str, lineages: F64 | None = None) -> Interval:
    """For the certificate.

    Args:
        se: relative standard error, None where there is none.
        advice: what to do then.
        lineages: `totals` of the population that decides; None where they are not looked at.
    """
    if se is None:
        reason = f"no standard error: fewer than {FEWEST} lineages survive in too large a part of Ẑ; {advice}"
        return Interval(source="genealogy", standing=Standing.NONE, reason=reason)
    reason = "" if lineages is None else thin(lineages)
    return Interval(source=SOURCE, se=se, standing=Standing.UNRELIABLE if reason else Standing.OK, reason=reason)
