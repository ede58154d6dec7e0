"""What a look at a node says of its value, before a sample below it is there: the reward of its endpoint x̂_0.

    z       normal score of a look's reward among those of its level, mean 0 and variance 1 under p
    z       = c V / √T + e,   Var e = 1 - c²,   T = τ_1² + .. + τ_l², the variance of V at that level
    o       = √T z / c = V + N(0, ω²),   ω² = T (1/c² - 1)

c, one number a level, is the correlation of looks and values: negative where looks mislead, 0 where they tell nothing,
and then they weigh nothing. It is learnt from the nodes with samples below them, whose V ~ N(m, v) is known from these
alone: V - m is independent of m, so that the regression of z on m is not diluted,

    c       = √T Σ w z m / Σ w m²,   w = 1 / (1 - c² + c² v / T),   shrunk towards other levels' and a prior

Looks along a path share their errors: counted each by itself they would be trusted too much. So a sweep takes the
deepest look of each path where no sample is below it, and the look at a node itself is added to that node alone.

Ours. The regression on what is known with an error of its own: Are There Two Regressions? (Berkson, 1950).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core.compiled import compiled
from treesearch.core.nested_effects import BORROWED, Law, Posterior, Seen, improvement, index_of, scores
from treesearch.core.weights import F64

PRIOR = 0.9  # of c, before there are data
PRIOR_COUNT = 2.0  # what it counts for, in units of Σ w m² / T
OWN_COUNT = 4.0  # what the other levels count for at each one
MOST = 0.98  # |c|, since few samples may agree by chance
LEAST = 0.02  # |c| below which looks are not read
FEWEST = 4  # looks at a level, and nodes there with samples below, from which something is learnt
ROUNDS = 3  # of the weights in a regression
UNREAD = 1e300  # ω² of looks that tell nothing


class Looks(NamedTuple):
    """What is known from looks.

    Args:
        c: correlation by depth.
        noise: ω² by depth.
        seen: o and its precision at every node.
    """

    c: F64
    noise: F64
    seen: Seen


@compiled
def above_samples(parent: NDArray[Any], leaf: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Nodes with a sample at or below them."""
    found = leaf.copy()
    for x in range(len(parent) - 1, 0, -1):
        if found[x]:
            found[parent[x]] = True
    return found


def standard(reward: F64, mass: F64, fresh: int) -> F64 | None:
    """Normal scores of a level's looks with mean 0 and variance 1 under p; None where they tell nothing apart."""
    z, p = scores(reward, mass, fresh), mass / mass.sum()
    z = z - p @ z
    spread = math.sqrt(float(p @ z**2))
    return z / spread if spread > 1e-6 else None


def regression(z: F64, mean: F64, var: F64, total: float) -> tuple[float, float]:
    """ĉ of looks z at nodes whose values are N(mean, var), of variance `total` under p, and what it counts for."""
    c, count = 0.5, 0.0
    for _ in range(ROUNDS):
        w = 1.0 / (1.0 - c * c + c * c * np.minimum(var / total, 1.0) + 1e-3)
        off, gap = z - w @ z / w.sum(), mean - w @ mean / w.sum()
        count = float(w @ gap**2) / total
        c = min(max(float(w @ (gap * off)) / math.sqrt(total) / (count + 1e-9), -MOST), MOST)
    return c, count


def pooled(found: F64, counts: F64) -> F64:
    """c by level: each level's own estimate, shrunk towards those of the levels near it, and these to the prior."""
    at = np.arange(len(found))
    near = BORROWED ** np.abs(at[:, None] - at)
    guess = (near @ (counts * found) + PRIOR_COUNT * PRIOR) / (near @ counts + PRIOR_COUNT)
    return (counts * found + OWN_COUNT * guess) / (counts + OWN_COUNT)


def learnt(
    depth: NDArray[Any],
    reward: F64,
    mass: F64,
    fresh: int,
    levels: int,
    taught: NDArray[np.bool_],
    estimate: Callable[[int, NDArray[np.int64], F64], tuple[float, float]],
) -> tuple[F64, F64]:
    """Normal scores z of the nodes within their levels, (nodes,), and c by depth.

    Args:
        depth, reward, mass, fresh: as for `read`.
        levels: how many depths there are.
        taught: (nodes,) those whose values are known from samples.
        estimate: (depth, nodes, their z) -> ĉ and what it counts for.
    """
    z, found, counts = np.full(len(depth), np.nan), np.zeros(levels), np.zeros(levels)
    for level in range(1, levels - 1):
        at = np.flatnonzero((depth == level) & np.isfinite(reward))
        level_z = standard(reward[at], mass[at], fresh) if len(at) >= FEWEST else None
        if level_z is None:
            continue
        z[at] = level_z
        known = at[taught[at]]
        if len(known) >= FEWEST:
            found[level], counts[level] = estimate(level, known, z[known])
    c = np.zeros(levels)
    c[1:-1] = np.clip(pooled(found[1:-1], counts[1:-1]), -MOST, MOST)
    return z, c


def read(depth: NDArray[Any], reward: F64, mass: F64, fresh: int, tau2: F64, known: Posterior) -> Looks:
    """What the looks say. Without samples c is the prior's and V has mean 0.

    Args:
        depth: of the nodes.
        reward: of endpoints, (nodes,), NaN where none was scored and at leaves; -∞ says nothing.
        mass: of p at each node.
        fresh: independent rollouts.
        tau2: τ² by depth.
        known: V given samples alone; var NaN at nodes with none below.
    """
    levels, total = len(tau2), np.cumsum(tau2)

    def estimate(level: int, at: NDArray[np.int64], z: F64) -> tuple[float, float]:
        return regression(z, known.mean[at], known.var[at], float(total[level]))

    z, c = learnt(depth, reward, mass, fresh, levels, ~np.isnan(known.var), estimate)
    noise, told = np.full(levels, UNREAD), np.abs(c) > LEAST
    noise[told] = total[told] * (1.0 / c[told] ** 2 - 1.0)
    use = told[depth] & ~np.isnan(z)
    value, precision = np.zeros(len(depth)), np.zeros(len(depth))
    value[use] = known.mean[0] + z[use] * np.sqrt(total[depth[use]]) / c[depth[use]]
    precision[use] = 1.0 / noise[depth[use]]
    return Looks(c, noise, Seen(value, precision))


def with_own(found: Posterior, own: Seen) -> Posterior:
    """The posterior of each node with the look at it, where that has not been part of it."""
    gain = own.precision * found.var  # of precision, relative
    mean = (found.mean + gain * own.value) / (1.0 + gain)
    return found._replace(mean=mean, var=found.var / (1.0 + gain))


class Prices(NamedTuple):
    """Of looks, by the depth of the parent of what is looked at.

    Args:
        noise: ω² of looks by depth.
        look: what one costs.
    """

    noise: F64
    look: F64


@compiled
def look_index(depth: int, tried: float, flying: float, mean: float, var: float, law: Law, prices: Prices) -> float:
    """Index of a new child that is looked at, and gone on from where that is promising: what the look can be hoped to
    show, for its price and, with the probability that it is promising, that of the way down."""
    noise, below = prices.noise[depth + 1], law.below[depth + 1]
    if noise >= UNREAD:
        return -1.0
    both = noise * below / (noise + below) if noise + below > 0.0 else 0.0
    spread = var / (1.0 + flying * var / law.below[depth]) + law.tau2[depth + 1]
    sd = math.sqrt(spread * (spread + both) / (spread + noise))
    gap = law.target[depth + 1] - mean
    hope = 0.5 * math.erfc(gap / (sd * math.sqrt(2.0)))
    price = prices.look[depth] + hope * max(law.price[depth] - prices.look[depth], 0.0)
    return improvement(gap, sd) / (1.0 + (tried + flying) * hope) / price


@compiled
def look_indices(depth: NDArray[Any], tried: NDArray[Any], mean: F64, var: F64, law: Law, prices: Prices) -> F64:
    """That of every node; -1 where a child would be a leaf."""
    out = np.full(len(depth), -1.0)
    for x in range(len(depth)):
        if depth[x] < len(law.price) - 1:
            out[x] = look_index(depth[x], tried[x], 0.0, mean[x], var[x], law, prices)
    return out


def allotted(depth: int, flying: F64, mean: F64, var: F64, law: Law, prices: Prices, room: int) -> list[int]:
    """Nodes of one level that get `room` new children, one by one by the largest index, the best of them the target.

    Those at x_T, all drawn alike, get one each.

    Args:
        depth: of the nodes.
        flying: children on their way, (nodes,).
        mean, var: of V, (nodes,).
        law: with any target.
        room: how many.
    """
    law = law._replace(target=np.full(len(law.target), mean.max()))
    unread, flying = prices.noise[depth + 1] >= UNREAD, flying.copy()

    def index(i: int) -> float:
        of = (depth, 0.0, flying[i], mean[i], var[i], law)
        return index_of(*of) if unread else look_index(*of, prices)

    indices, taken = np.array([index(i) for i in range(len(mean))]), list[int]()
    while len(taken) < room and indices.max() > 0:
        taken.append(i := int(np.argmax(indices)))
        flying[i] += 1
        indices[i] = index(i) if depth > 1 else -1.0
    return taken
