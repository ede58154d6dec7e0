"""The over-optimisation alarm: a reward that is held out falls while the optimised one rises.

    the better half of the samples by r, at most 512 of them spread evenly over its ranks
    ρ = rank correlation (Spearman) of r and the held-out h among them
    p = (1 + #{permutations of h with ρ' <= ρ}) / (1 + 999)
    it fires where ρ < 0 and p <= .01

A reward is a proxy: past some point more of it costs what it stood for, and only a measure that is not optimised can
tell. The better half, because that is where a search goes; ranks, because rewards have no unit. Samples of one lineage
are alike, so that p is too small where lineages are few: read it beside their number.

Source: Scaling Laws for Reward Model Overoptimization (Gao, Schulman and Hilton, 2023), proxy against held-out reward;
the test is Spearman's, by permutation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treesearch.core.weights import F64

LEAST, MOST = 20, 512
PERMUTATIONS, LEVEL = 999, 0.01
RULE = f"Spearman's ρ < 0 with p <= {LEVEL:g} among the better half of the samples"


@dataclass(frozen=True)
class Alarm:
    """What the test says.

    Args:
        fires: None where it could not be made.
        reason: the finding, or what was missing.
        rho: Spearman's ρ.
        p: one-sided p-value of the permutation test.
        samples: how many were compared.
    """

    fires: bool | None
    reason: str
    rho: float | None = None
    p: float | None = None
    samples: int = 0


UNKNOWN = Alarm(None, "unknown: no held-out reward")


def alarm(reward: F64, held_out: Callable[[NDArray[np.int64]], F64], name: str) -> Alarm:
    """Test samples with rewards (n,); `held_out` scores those at the given positions."""
    rows = better_half(reward)
    if len(rows) < LEAST:
        return Alarm(None, f"unknown: {len(rows)} samples in the better half, the test needs {LEAST}")
    h = held_out(rows)
    if np.ptp(reward[rows]) == 0 or np.all(h == h[0]):
        return Alarm(None, f"unknown: the reward or {name} is the same for all of them", samples=len(rows))
    rho, p = spearman(reward[rows], h)
    fires = rho < 0 and p <= LEVEL
    verb = "falls" if fires else "does not fall"
    reason = f"{name} {verb} as the reward rises (ρ = {rho:.2f}, p = {p:.3f}, {len(rows)} samples; rule: {RULE})"
    return Alarm(bool(fires), reason, rho, p, len(rows))


def better_half(reward: F64) -> NDArray[np.int64]:
    """Positions of the better half of the finite rewards, ascending, at most `MOST` at equal distances of rank."""
    order = np.argsort(reward, kind="stable")
    order = order[np.isfinite(reward[order])]
    half = order[len(order) // 2 :]
    return half[np.linspace(0, len(half) - 1, min(len(half), MOST)).round().astype(np.int64)] if len(half) else half


def spearman(x: F64, y: F64) -> tuple[float, float]:
    """ρ and the share of permutations at or below it."""
    a, b = _standardised(x), _standardised(y)
    shuffled = np.random.default_rng(0).permuted(np.tile(b, (PERMUTATIONS, 1)), axis=1)
    rho = float(a @ b)
    below = int(np.count_nonzero(shuffled @ a <= rho + 1e-12))
    return rho, (1 + below) / (1 + PERMUTATIONS)


def _standardised(x: F64) -> F64:
    """Ranks, means of them among equals, centred and of length one."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    centred = ranks - ranks.mean()
    return centred / math.sqrt(float(centred @ centred))
