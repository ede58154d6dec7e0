"""The nested random-effects model of a tree's rewards, and what a new child of a node can be hoped to bring.

    V(child at depth l) = V(x) + δ,   δ ~ N(0, τ_l²) independent,   V(leaf) = y

    scores        y: normal scores of the rewards, rank within p; `rewards_at` is the way back
    fit           τ_1²..τ_L² by restricted likelihood
    posterior     mean m(x) and variance v(x) of V(x) given all rewards: one sweep up the tree, one down; nodes without
                  rewards below them may have been seen with an error, o = V(x) + e,  e ~ N(0, ω²)
    index_of      expected improvement of a child of x for its price, shrunk by the children that did not improve

`treesearch.methods.tree_search` says what it is for; docs/tree_search.md has what was measured.

Sources: Efficient Global Optimization of Expensive Black-Box Functions (Jones, Schonlau & Welch, 1998), eq. 15. Maximum
Likelihood Approaches to Variance Component Estimation and to Related Problems (Harville, 1977). Bayesian Interpolation
(MacKay, 1992), the fixed point. The shrunk rate and the scale of the rewards are ours.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core import normal
from treesearch.core.compiled import compiled
from treesearch.core.weights import F64, scaled

Ids = NDArray[np.int64]

ROUNDS = 3  # of the fixed point in a fit
LEAP = 20.0  # largest factor of a round
LEAST = 1e-9  # smallest τ², in units of their sum
PRIOR_COUNT = 0.2  # effects that the prior of a level counts for
BORROWED = 0.7  # weight of a neighbour's estimate in that prior, to the power of the distance
FIRST_COUNT = 0.05  # effects that the split by NFE counts for in it
KNOT = 0.5  # distance of the quantiles through which rewards are scaled, in normal scores
LOWEST = -0.75  # normal score below which rewards are not told apart


class Seen(NamedTuple):
    """What is known of the values of inner nodes beside rewards of samples.

    Args:
        value: o = V + e, (nodes,).
        precision: 1 / Var e, 0 where nothing is known, (nodes,).
    """

    value: F64
    precision: F64

    def at(self, nodes: NDArray[np.bool_]) -> Seen:
        """At the given nodes alone, (nodes,)."""
        return Seen(self.value, np.where(nodes, self.precision, 0.0))


class Posterior(NamedTuple):
    """What the rewards say about the values of the nodes.

    Args:
        mean, var: of V, (nodes,).
        counts: effects that are known, by depth: Σ 1 - Var(δ | rewards) / τ².
        squares: Σ E[δ | rewards]² by depth.
    """

    mean: F64
    var: F64
    counts: F64
    squares: F64


@compiled
def _sweeps(
    parent: NDArray[Any],
    depth: NDArray[Any],
    y: F64,
    seen: F64,
    sure: F64,
    tau2: F64,
    mean: F64,
    var: F64,
    counts: F64,
    squares: F64,
) -> None:
    """Exact posterior of the nested model with a flat prior at the root; y is NaN except at leaves with a reward, and
    `sure` is the precision of `seen`."""
    n = len(parent)
    precision, weighted = sure.copy(), sure * seen  # of V(x) from what is known at x and below
    for x in range(n - 1, 0, -1):
        q = tau2[depth[x]]
        if not math.isnan(y[x]):
            precision[parent[x]] += 1.0 / q
            weighted[parent[x]] += y[x] / q
        else:
            shrink = 1.0 + q * precision[x]
            precision[parent[x]] += precision[x] / shrink
            weighted[parent[x]] += weighted[x] / shrink
    mean[0], var[0] = weighted[0] / precision[0], 1.0 / precision[0]
    for x in range(1, n):
        above, q = parent[x], tau2[depth[x]]
        if not math.isnan(y[x]):
            mean[x], var[x], spread = y[x], 0.0, var[above]
        else:
            shrink = 1.0 + q * precision[x]
            mean[x] = (mean[above] + q * weighted[x]) / shrink
            var[x] = q / shrink + var[above] / shrink**2
            spread = q / shrink + (1.0 - 1.0 / shrink) ** 2 * var[above]
        if q > 0.0:
            counts[depth[x]] += 1.0 - spread / q
            squares[depth[x]] += (mean[x] - mean[above]) ** 2


def posterior(parent: NDArray[Any], depth: NDArray[Any], y: F64, tau2: F64, seen: Seen | None = None) -> Posterior:
    """Posterior of V at every node.

    Args:
        parent, depth: of the nodes.
        y: rewards (nodes,), NaN where there is none.
        tau2: τ² by depth.
        seen: what else is known of inner nodes.
    """
    found = Posterior(np.empty(len(y)), np.empty(len(y)), np.zeros(len(tau2)), np.zeros(len(tau2)))
    seen = Seen(np.zeros(len(y)), np.zeros(len(y))) if seen is None else seen
    _sweeps(parent, depth, y, *seen, tau2, *found)
    return found


def fit(parent: NDArray[Any], depth: NDArray[Any], y: F64, tau2: F64, prior: F64) -> F64:
    """τ² by depth after a few rounds of  τ² <- (Σ E[δ]² + n₀ s₀²) / (Σ (1 - Var δ/τ²) + n₀)  from `tau2`.

    The fixed point without n₀ is the maximum of the restricted likelihood. s₀² of a level below x_T is `prior` times
    the ratio of found to expected squares of its neighbours: levels nobody has looked at follow those next to them.
    """
    below = np.arange(2, len(tau2))
    near = BORROWED ** np.abs(below[:, None] - below)
    for _ in range(ROUNDS):
        found = posterior(parent, depth, y, tau2)
        counts, guess = np.maximum(found.counts, 0.0), prior.copy()
        ratio = near @ (found.squares[2:] / prior[2:]) + FIRST_COUNT
        guess[2:] *= ratio / (near @ counts[2:] + FIRST_COUNT)
        new = (found.squares + PRIOR_COUNT * guess) / (counts + PRIOR_COUNT)
        tau2 = np.clip(new, tau2 / LEAP, tau2 * LEAP)
        tau2[1:] = np.maximum(tau2[1:], LEAST * tau2[1:].sum())
    return tau2


@compiled
def improvement(gap: float, sd: float) -> float:
    """E[(Y - gap)⁺] of Y ~ N(0, sd²)."""
    if sd <= 0.0:
        return max(-gap, 0.0)
    z = gap / sd
    tail = 0.5 * math.erfc(z / math.sqrt(2.0))
    return max(sd * (math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) - z * tail), 0.0)


class Law(NamedTuple):
    """What an index needs beside the node, by depth.

    Args:
        tau2: τ².
        below: Σ τ² of the levels below.
        target: V* + margin.
        price: of a rollout from a node.
    """

    tau2: F64
    below: F64
    target: F64
    price: F64


@compiled
def index_of(depth: int, tried: float, flying: float, mean: float, var: float, law: Law) -> float:
    """Index of a node with `tried` children and `flying` rollouts on their way."""
    left = var / (1.0 + flying * var / law.below[depth])
    sd, gap = math.sqrt(left + law.tau2[depth + 1]), law.target[depth + 1] - mean
    hope = 0.5 * math.erfc(gap / (sd * math.sqrt(2.0)))
    return improvement(gap, sd) / (1.0 + (tried + flying) * hope) / law.price[depth]


@compiled
def indices(depth: Ids, tried: NDArray[Any], mean: F64, var: F64, law: Law) -> F64:
    """Index of every node; leaves have none (-1)."""
    out = np.full(len(depth), -1.0)
    for x in range(len(depth)):
        if depth[x] < len(law.price):
            out[x] = index_of(depth[x], tried[x], 0.0, mean[x], var[x], law)
    return out


def scores(reward: F64, mass: F64, fresh: int) -> F64:
    """Rewards on the scale of normal scores: piecewise linear through quantiles of p.

    Quantiles reach from `LOWEST`, below which all are alike (how bad the worst are tells nothing about the best), up to
    where the best of the fresh rollouts would be; above, the line through the last standard deviation goes on: ranks
    alone would stretch small differences between many refined samples. -∞ stands below every finite reward, by their
    whole range.

    Args:
        reward: (n,) of leaves.
        mass: (n,) of p that each stands for.
        fresh: independent rollouts.

    Returns:
        (n,), all zero where rewards do not differ.
    """
    finite = reward[np.isfinite(reward)]
    if not len(finite):
        return np.zeros(len(reward))
    lowest = scaled(1.0, finite).min() - max(float(np.ptp(finite)), 1.0)
    reward = np.clip(reward, lowest, finite.max())
    value, place = np.unique(reward, return_inverse=True)
    tied = np.bincount(place, mass)
    above = np.cumsum(tied[::-1])[::-1] - 0.5 * tied
    z = -normal.quantile(above / tied.sum())
    grid = np.arange(NormalDist().inv_cdf(1 - 0.5 / fresh), LOWEST, -KNOT)[::-1]
    knot, first = np.unique(np.interp(grid, z, value), return_index=True)
    if len(knot) < 2:
        return np.zeros(len(reward))
    grid = grid[first]
    i = min(max(int(np.searchsorted(grid, grid[-1] - 1.0, side="right")) - 1, 0), len(grid) - 2)
    slope = (grid[-1] - grid[i]) / (knot[-1] - knot[i])
    return np.interp(reward, knot, grid) + slope * np.maximum(reward - knot[-1], 0.0)


def rewards_at(score: F64, y: F64, reward: F64) -> F64:
    """The rewards that scores stand for, between the lowest and the highest that were found.

    Args:
        score: on the scale of `scores`, any shape.
        y, reward: (n,) scores and rewards of leaves.

    Returns:
        As `score`, linear between neighbours; the highest of the rewards that share a score.
    """
    known = np.isfinite(reward)
    grid, place = np.unique(y[known], return_inverse=True)
    height = np.full(len(grid), -math.inf)
    np.maximum.at(height, place, reward[known])
    return np.interp(score, grid, height)


@compiled
def masses(parent: NDArray[Any], children: NDArray[Any]) -> F64:
    """Probability of each node if every node's children share its own evenly."""
    mass = np.ones(len(parent))
    for x in range(1, len(parent)):
        mass[x] = mass[parent[x]] / children[parent[x]]
    return mass
