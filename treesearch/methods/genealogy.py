"""How sure a population is of its Ẑ, from the ancestors of its particles.

    V = 1 - (K/(K-1))^{n+1} (1 - Σ_e (Σ_{i: eve i = e} W_i)²)          relative variance after n multinomial resamplings

is unbiased (Lee and Whiteley, 2018). Schemes of lower variance lose fewer lineages than the n factors allow for; with
n = 0 in their place V is an over-estimate as a rule (measured on the Gaussian chain, K = 100, resampling at every
level: 1.6 times the variance for systematic, 1.7 ssp, 2.0 stratified, 3.1 residual). Where fewer than ten lineages
survive it says nothing.

Source: Variance estimation in the particle filter (Lee and Whiteley, 2018), eq. 9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treesearch.methods.claims import Interval, Standing
from treesearch.weights import F64, normalise

FEWEST = 10  # surviving lineages
KNOWN = 0.9  # share of Ẑ that must have a variance
SOURCE = "genealogy of the particles (Lee and Whiteley, 2018)"


def lineage_variance(log_w: F64, eve: NDArray[np.int64], multinomial: int = 0) -> float | None:
    """Relative variance of one population's Ẑ.

    Args:
        log_w: at x_0, (K,).
        eve: the particle of the first level each descends from, (K,).
        multinomial: resamplings by the multinomial scheme; those by others do not count.
    """
    k, share = len(log_w), np.bincount(eve, weights=normalise(log_w), minlength=len(log_w))
    if k < 2 or (share > 0).sum() < FEWEST:
        return None
    variance = 1 - math.exp((multinomial + 1) * math.log(k / (k - 1))) * (1 - float((share**2).sum()))
    return variance if variance > 0 else None


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


def by_lineage(se: float | None, advice: str) -> Interval:
    """For the certificate."""
    if se is None:
        reason = f"fewer than {FEWEST} lineages survive: no standard error; {advice}"
        return Interval(source="genealogy", standing=Standing.NONE, reason=reason)
    return Interval(source=SOURCE, se=se)
