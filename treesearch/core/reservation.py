"""Which drafts are worth finishing, and when another is: the reservation price of a search with cheap looks.

A candidate can be read at rungs 1 < 2 < ... < R, drafts that cost c_1 < c_2 < ... and say more and more, and be
finished (rung R + 1, at c). With normal scores z of the rewards of each rung, and z* the best finished one,

    z_s | z_r ~ N(a + b z_r, s²)                                               lines through the pairs seen, r < s
    V_{R+1}(z) = (z - z*)⁺,   V_r(z) = max(0, E[V_s(z_s) | z_r = z] - ρ c_s)   s the rung after r in a plan
    ρ:  E[V_s(z_s)] = ρ c_s at the first rung s of the plan, z_s ~ N(0, 1)

ρ is the improvement per price of the best policy that draws candidates without end and drops each as soon as that pays
(Weitzman's reservation price of a box, for boxes of several lids): a draft is read on where V_r(z) > 0, and another
candidate is drawn where none is. Of all plans, subsets of the rungs, the one is followed that gains most over finishing
every candidate, ρ / (E[(Z - z*)⁺] / c) with Z as the plan's own lines have it, for tails are not quite those of normal
scores. Where none gains, candidates are finished without drafts: lines of b = 0 cost and decide nothing. Of n pairs the
best-looking plan gains by chance, so it has to by 2/√n. That is a rule of thumb: two standard errors of a slope at
b = 0, though a gain does not grow as its slope does. Simulated for drafts at a tenth of the price, b = 0 gains by
chance in three quarters of all cases of 16 pairs and by the margin in a quarter, of 256 pairs in a fifth and a
thirtieth; b = .7 passes nearly always. Cheaper drafts slip through more often, and cost less; dear ones have to wait
for pairs.

Lines are Bayesian with a prior of no prediction (b ~ N(0, 1), s² = 1 for two pairs). Selection by z_r leaves them as
they are. Scores: rank among all candidates drawn, each of the read ones standing for those near it that were dropped.

Exact: ρ for the model, the root of a decreasing function. Not exact: the model, and that ρ takes z* as it is, though a
long search will have a higher one.

Sources: Optimal Search for the Best Alternative (Weitzman, 1979). Efficient Global Optimization of Expensive Black-Box
Functions (Jones, Schonlau and Welch, 1998), for E[(Z - z*)⁺]. Successive halving, whose rungs these are: Almost Optimal
Exploration in Multi-Armed Bandits (Karnin, Koren and Somekh, 2013).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core import normal
from treesearch.core.weights import F64

GRID = np.linspace(-5.0, 7.0, 241)  # scores at which values are known
STEPS = 50  # halvings of an interval of ρ
ERRORS = 2.0
PRIOR_PAIRS = 2.0  # pairs that s² = 1 counts for


class Line(NamedTuple):
    """z_s | z_r ~ N(a + b z_r, s²), as so many pairs say."""

    a: float
    b: float
    sd: float
    pairs: float = math.inf


class Plan(NamedTuple):
    """What to do with candidates.

    Args:
        rungs: that are read, in order, the finished sample last.
        gain: ρ over the improvement per price of finishing every candidate.
        values: V less its cost at `GRID`, of each rung but the last.
        doubtful: whether another would gain more, if its lines are what they look like.
    """

    rungs: tuple[int, ...]
    gain: float
    values: tuple[F64, ...]
    doubtful: bool = False

    def worth(self, rung: int, z: F64) -> F64:
        """E[V of the next rung | z] - ρ c of it (n,); drop a candidate where it is not positive."""
        return np.interp(z, GRID, self.values[self.rungs.index(rung)])


def scores(reward: F64, mass: F64) -> F64:
    """Normal scores (n,) of the middles of ranks, each reward with the mass that it stands for; ties share theirs."""
    _, place = np.unique(reward, return_inverse=True)
    tied = np.bincount(place, mass)
    below = np.cumsum(tied) - 0.5 * tied
    return normal.quantile(below / tied.sum())[place]


def spread(z: F64, read: NDArray[np.bool_], mass: F64) -> F64:
    """Mass of those read on (k,): each has that of all between it and the middles to its neighbours in z."""
    order = np.argsort(z, kind="stable")
    at = np.flatnonzero(read[order])
    border = np.append(0, np.append((at[1:] + at[:-1] + 1) // 2, len(z)))
    total = np.append(0.0, np.cumsum(mass[order]))
    out = np.empty(len(z))
    out[order[at]] = np.diff(total[border])
    return out[read]


def line(x: F64, y: F64) -> Line:
    """The line through pairs (n,), n >= 1, with its posterior mean and the spread of a new y."""
    n, mean_x, mean_y = len(x), float(x.mean()), float(y.mean())
    dx, dy = x - mean_x, y - mean_y
    b = float(dx @ dy) / (float(dx @ dx) + 1.0)
    left = float(np.sum((dy - b * dx) ** 2)) + b * b + PRIOR_PAIRS
    return Line(mean_y - b * mean_x, b, math.sqrt(left / (n - 1 + PRIOR_PAIRS)), n)


def plan(rungs: int, lines: Mapping[tuple[int, int], Line], prices: Sequence[float], best: float) -> Plan:
    """The plan that gains most of those whose gain is beyond doubt.

    Args:
        rungs: R; rung R is the finished sample, the others are drafts 0..R-1.
        lines: from rung r to s, for r < s; plans that need one that is not there are left out.
        prices: of reading a rung, (R + 1,).
        best: z*.
    """
    found = [
        _rated((*drafts, rungs), lines, prices, best)
        for count in range(rungs + 1)
        for drafts in itertools.combinations(range(rungs), count)
        if all(pair in lines for pair in itertools.pairwise((*drafts, rungs)))
    ]
    sure = max((each for each in found if each.gain >= 1 + _doubt(each, lines)), key=lambda each: each.gain)
    return sure._replace(doubtful=any(each.gain > sure.gain for each in found))


def _doubt(found: Plan, lines: Mapping[tuple[int, int], Line]) -> float:
    """What a plan's gain must exceed 1 by: so many standard errors of a slope of normal scores, by rule of thumb."""
    pairs = min((lines[pair].pairs for pair in itertools.pairwise(found.rungs)), default=math.inf)
    return ERRORS / math.sqrt(pairs)


def _rated(rungs: tuple[int, ...], lines: Mapping[tuple[int, int], Line], prices: Sequence[float], best: float) -> Plan:
    """ρ of a plan, the root of E[V] - ρ c, which falls with ρ, beside what it is without drafts."""
    if len(rungs) == 1:
        return Plan(rungs, 1.0, ())
    steps = [lines[pair] for pair in itertools.pairwise(rungs)]
    cost = [prices[rung] for rung in rungs]
    moves = [_moves(step.a + step.b * GRID, step.sd) for step in steps[:-1]]
    hope, first = hoped(steps[-1].a + steps[-1].b * GRID, steps[-1].sd, best), _moves(np.zeros(1), 1.0)[0]

    def values(rate: float) -> list[F64]:
        found = [hope - rate * cost[-1]]
        for move, price in zip(moves[::-1], cost[-2:0:-1], strict=True):
            found.append(move @ np.maximum(found[-1], 0.0) - rate * price)
        return found[::-1]

    low, high = 0.0, float(first @ np.maximum(values(0.0)[0], 0.0)) / cost[0]
    plain = high * cost[0] / cost[-1]  # what is dropped at no rate is finished
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        gain = float(first @ np.maximum(values(middle)[0], 0.0)) - middle * cost[0]
        low, high = (middle, high) if gain > 0 else (low, middle)
    return Plan(rungs, low / plain if plain > 0 else 0.0, tuple(values(low)))


def hoped(mean: F64, sd: float, best: float) -> F64:
    """E[(Z - z*)⁺] of Z ~ N(mean, sd²), (n,)."""
    z = (best - mean) / sd
    return np.maximum(sd * (np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) - z * normal.tail(z)), 0.0)


def _moves(mean: F64, sd: float) -> F64:
    """Probabilities (n, grid) of the points of `GRID` under N(mean, sd²)."""
    far = 0.5 * ((GRID - mean[:, None]) / sd) ** 2
    density = np.exp(far.min(1, keepdims=True) - far)
    return density / density.sum(1, keepdims=True)
