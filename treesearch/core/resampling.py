"""Resampling schemes: ancestors (K,) from weights W (K,) that sum to one.

All share one signature, scheme(W, u) -> ancestors in increasing order, and satisfy E[offspring_i] = K W_i, which is
all that an unbiased Ẑ needs. `u` holds K + 1 uniforms, of which a scheme uses what it needs.

    multinomial   independent draws; the reference, highest variance
    residual      floor(K W_i) copies, the rest multinomial
    stratified    one draw in each interval [k/K, (k+1)/K)
    systematic    the same offset in each; offspring in {floor, ceil} of K W_i; the default
    ssp           Srinivasan sampling process: offspring in {floor, ceil}, negatively associated, consistent

Loops over particles are compiled: the inverse of a CDF at sorted points is one merge, K steps for all of them.

References:
    An Introduction to Sequential Monte Carlo (Chopin and Papaspiliopoulos, 2020), chapter 9.
    Negative association, ordering and convergence of resampling methods (Gerber, Chopin and Whiteley, 2019).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from treesearch.core.compiled import compiled

F64 = NDArray[np.float64]
Ancestors = NDArray[np.int64]
Scheme = Callable[[F64, F64], Ancestors]


@compiled
def _merge(cdf: F64, points: F64) -> Ancestors:
    """The first position whose cdf (K,) exceeds each increasing point, all of them below cdf[-1]."""
    found = np.empty(len(points), np.int64)
    at = 0
    for i in range(len(points)):
        while at < len(cdf) - 1 and cdf[at] <= points[i]:
            at += 1
        found[i] = at
    return found


def _invert(w: F64, points: F64) -> Ancestors:
    """Inverse CDF at increasing points in [0, 1); weightless particles are never picked."""
    cdf = np.cumsum(w)
    points = points * cdf[-1]
    return _merge(cdf, np.minimum(points, np.nextafter(cdf[-1], 0), out=points))


@compiled
def _strata(cdf: F64, u: F64) -> Ancestors:
    """Inverse CDF (K,) at (i + u_i) / K."""
    k = len(cdf)
    found, at, last = np.empty(k, np.int64), 0, np.nextafter(cdf[-1], 0)
    for i in range(k):
        point = min((i + u[i]) / k * cdf[-1], last)
        while at < k - 1 and cdf[at] <= point:
            at += 1
        found[i] = at
    return found


def multinomial(w: F64, u: F64) -> Ancestors:
    """K independent draws."""
    return _invert(w, np.sort(u[: len(w)]))


def stratified(w: F64, u: F64) -> Ancestors:
    """One draw in each of K equal intervals."""
    return _strata(np.cumsum(w), u[: len(w)])


def systematic(w: F64, u: F64) -> Ancestors:
    """One offset for all K intervals."""
    return _strata(np.cumsum(w), np.broadcast_to(u[0], len(w)))


def residual(w: F64, u: F64) -> Ancestors:
    """floor(K W) copies for certain, the remainder multinomial."""
    k = len(w)
    copies = np.floor(k * w + 1e-12).astype(np.int64)
    rest = k - int(copies.sum())
    certain = np.repeat(np.arange(k), copies)
    if rest == 0:
        return certain.astype(np.int64)
    left = np.maximum(k * w - copies, 0)
    drawn = _invert(left / left.sum(), np.sort(u[:rest]))
    return np.sort(np.concatenate([certain, drawn])).astype(np.int64)


def ssp(w: F64, u: F64) -> Ancestors:
    """Round K W to whole numbers pair by pair, keeping each expectation."""
    return np.repeat(np.arange(len(w), dtype=np.int64), _rounded(len(w) * w, u))


@compiled
def _rounded(wanted: F64, u: F64) -> Ancestors:
    """Whole numbers (K,) with the expectations `wanted`, which sum to K."""
    k = len(wanted)
    copies = np.floor(wanted).astype(np.int64)
    left = wanted - copies
    i = 0
    for j in range(1, k):
        if left[i] + left[j] < 1:
            # One of the two gives all of its fraction to the other.
            total = left[i] + left[j]
            keep = total == 0 or u[j] * total < left[i]
            winner, loser = (i, j) if keep else (j, i)
            left[winner], left[loser] = total, 0.0
            i = winner
        else:
            # One is rounded up, the other keeps what is over.
            over = left[i] + left[j] - 1
            up = over >= 1 or u[j] * (1 - over) < 1 - left[j]
            winner, loser = (i, j) if up else (j, i)
            copies[winner] += 1
            left[winner], left[loser] = 0.0, over
            i = loser
    copies[i] += max(0, k - copies.sum())  # what is left sums to 0 or 1 up to rounding
    return copies


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
    "ssp": ssp,
}
