"""What a draft from a node says of the sample that its first child will lead to.

    z       normal score of a draft's reward among those of its level, mean 0 and variance 1 under p
    y       = μ + c √T z + e,   T = τ_1² + .. + τ_L²,   Var e = T (1 - c²): the finished path's own reward
    o       = μ + √T z / c = y + N(0, ω²),   ω² = T (1/c² - 1)

c by level is learnt from drafts that were finished, by the regression of y on z: which are finished depends on z, and
leaves it as it is. Noise of steps decides, not the node alone: what is observed is y, and through it every value
V_k on the way, k a depth below the node's own, l. With V_l ~ N(m, v) known without the draft,

    E[V_k | o]   = m + g_k (o - m),   g_k = (v + S_k) / (v + S_L + ω²),   S_k = τ_{l+1}² + .. + τ_k²
    Var[V_k | o] = (v + S_k) (1 - g_k)

An unfinished draft also says of V_l what a sample below would, with ω² more. Ours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core.compiled import compiled
from treesearch.core.looks import LEAST, MOST, UNREAD, Looks, learnt
from treesearch.core.nested_effects import Law, Seen, improvement
from treesearch.core.weights import F64


def slope(z: F64, y: F64, total: float) -> tuple[float, float]:
    """ĉ of drafts z that were finished as y, and what it counts for."""
    off, gap = z - z.mean(), y - y.mean()
    count = float(off @ off)
    c = float(off @ gap) / math.sqrt(total) / (count + 1e-9)
    return min(max(c, -MOST), MOST), count


def read_drafts(depth: NDArray[Any], reward: F64, mass: F64, fresh: int, tau2: F64, mean: float, y: F64) -> Looks:
    """What the drafts say.

    Args:
        depth: of the nodes.
        reward: of drafts, (nodes,), NaN where there was none; -∞ says nothing.
        mass: of p at each node.
        fresh: independent rollouts.
        tau2: τ² by depth.
        mean: μ.
        y: of finished drafts, by the node that they began at, (nodes,), NaN elsewhere.
    """
    levels, total = len(tau2), float(tau2.sum())
    z, c = learnt(depth, reward, mass, fresh, levels, ~np.isnan(y), lambda _, at, z: slope(z, y[at], total))
    noise, told = np.full(levels, UNREAD), np.abs(c) > LEAST
    noise[told] = total * (1.0 / c[told] ** 2 - 1.0)
    use = told[depth] & ~np.isnan(z)
    below = np.append(np.cumsum(tau2[::-1])[::-1][1:], 0.0)
    value, precision = np.zeros(len(depth)), np.zeros(len(depth))
    value[use] = mean + math.sqrt(total) * z[use] / c[depth[use]]
    precision[use] = 1.0 / (noise[depth[use]] + below[depth[use]])
    return Looks(c, noise, Seen(value, precision))


@compiled
def draft_index(
    depth: int, tried: float, flying: float, mean: float, var: float, law: Law, noise: F64, price: F64
) -> float:
    """Index of a new child that is drafted, and finished where that is promising: the largest gain at any depth that
    the draft can be hoped to show, for its price and, with the probability that it is promising, that of finishing."""
    if noise[depth + 1] >= UNREAD:
        return -1.0
    known = var / (1.0 + flying * var / law.below[depth]) + law.tau2[depth + 1]
    whole = known + law.below[depth + 1] + noise[depth + 1]
    best = 0.0
    for k in range(depth + 1, len(law.tau2)):
        sd = (known + law.below[depth + 1] - law.below[k]) / math.sqrt(whole)
        gap = law.target[k] - mean
        hope = 0.5 * math.erfc(gap / (sd * math.sqrt(2.0)))
        cost = price[depth] + hope * law.price[depth + 1]
        best = max(best, improvement(gap, sd) / (1.0 + (tried + flying) * hope) / cost)
    return best


@compiled
def finish_index(depth: int, mean: float, var: float, value: float, precision: float, law: Law, noise: F64) -> float:
    """Index of finishing a drafted node: the largest gain at any depth below, for its price; without a verdict that of
    a sample.

    Args:
        depth: of the node.
        mean, var: of its value, the draft included.
        value, precision: what the draft said of it.
        law, noise: as above.
    """
    left = max(1.0 / var - precision, 1e-12)
    known, prior = 1.0 / left, (mean / var - precision * value) / left
    whole, best = known + law.below[depth] + noise[depth], 0.0
    for k in range(depth + 1, len(law.tau2)):
        spread = known + law.below[depth] - law.below[k]
        gain = spread / whole if precision > 0.0 else 0.0
        sd = math.sqrt(max(spread * (1.0 - gain), 0.0))
        best = max(best, improvement(law.target[k] - prior - gain * (value - prior), sd))
    return best / law.price[depth]
