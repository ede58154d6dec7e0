"""What nested rollouts say by level: how much of the reward is decided, and how well endpoints know it.

With chains k, r_k0 the reward of the chain's own leaf, r_ki that of its continuation from level l_i, levels descending:

    Var r             mean over leaves of their sample variances over chains
    Var E[r | x_l]    sample covariance over chains of r_ki and the mean of r_k0 and all r_kj with l_j < l_i
    decided           the second over the first: the share of the reward's variance that x_l has decided

Both variances are unbiased: leaves that part at l are independent given x_l with the same mean E[r | x_l] (the law of
total variance), and each column of leaves is an independent sample of r. Their ratio has a bias of O(1/K). It may come
out below 0 or above 1: nothing is cut. With r̂ the reward of x_l's endpoint,

    rank, slope       Spearman's correlation of r̂ with r, and the slope of r on r̂; mean over the leaves below l
    known             correlation of r̂ with E[r | x_l]:  Corr(r̂, r) / √decided

`known` is the correlation with the soft value as λ -> 0, cleaned of what is not decided yet ("correction for
attenuation"). `upper` is `decided` of the normal scores of the rewards, ranks among all leaves; those below the median
count as the median: what matters to a search for the best. Tasks are taken apart, (co)variances are means over them.

Standard errors: the jackknife over chains (one of every task at a time).

Sources: Sensitivity Estimates for Nonlinear Mathematical Models (Sobol', 1993), estimates from pairs that share a part.
The Proof and Measurement of Association between Two Things (Spearman, 1904), attenuation. The Jackknife, the Bootstrap
and Other Resampling Plans (Efron, 1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from treesearch.core.weights import F64

SMALL = 1e-12  # of a variance, beside the square of the largest value: nothing but rounding


class Estimate(NamedTuple):
    """A figure and its standard error; NaN where there is none."""

    value: float
    se: float

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:.2f} ± {self.se:.2f}".replace(" ± nan", "")


class Nested(NamedTuple):
    """Rewards of a pilot, tasks first.

    Args:
        endpoints: (P, K, L).
        leaves: (P, K, 1 + C), the chain's own first, then those of the first C levels; C is L or, where every step is
            deterministic, 0.
    """

    endpoints: F64
    leaves: F64

    def without(self, chain: int) -> Nested:
        """All but one chain of every task."""
        return Nested(*(np.delete(part, chain, axis=1) for part in self))


def finite(values: F64) -> F64:
    """Rewards with -inf as low below the lowest finite one as that is below the highest; all zero where none is."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros_like(values)
    return np.where(np.isfinite(values), values, known.min() - max(float(np.ptp(known)), 1.0))


def scores(leaves: F64) -> F64:
    """Normal scores of rewards (P, K, J) by rank in the task, ties shared; below the median that of the median."""
    out = np.empty(leaves.shape)
    for task, rewards in enumerate(leaves):
        z = torch.special.ndtri(torch.from_numpy((ranks(rewards.ravel()) + 0.5) / rewards.size)).numpy()
        out[task] = np.maximum(z, 0.0).reshape(rewards.shape)
    return out


def ranks(values: F64) -> F64:
    """0..n-1 of values (n,), ties shared."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - count + 0.5 * (count - 1))[place]


def covariance(a: F64, b: F64) -> F64:
    """Unbiased, over chains, mean over tasks: (P, K, ...) -> (...)."""
    centred = (a - a.mean(1, keepdims=True)) * (b - b.mean(1, keepdims=True))
    return (centred.sum(1) / (a.shape[1] - 1)).mean(0)


def decided(leaves: F64, levels: int) -> F64:
    """Shares (levels,) of the variance of leaves (P, K, 1 + levels); NaN where rewards do not vary."""
    total = float(covariance(leaves, leaves).mean())
    if total <= SMALL * float(np.abs(leaves).max(initial=1.0)) ** 2:
        return np.full(levels, math.nan)
    shared = [float(covariance(leaves[..., i + 1], _below(leaves, i).mean(-1))) for i in range(levels)]
    return np.array(shared) / total


def _below(leaves: F64, i: int) -> F64:
    """Leaves below level i that part from its continuation there: the chain's own and those of lower levels."""
    return np.concatenate([leaves[..., :1], leaves[..., i + 2 :]], -1)


def _all_below(leaves: F64, i: int) -> F64:
    return np.concatenate([leaves[..., :1], leaves[..., i + 1 :]], -1)


def correlations(endpoints: F64, leaves: F64) -> tuple[F64, F64]:
    """Pearson's correlation (L,) of the endpoints with the leaves below them, and the slope of r on r̂."""
    found = []
    for i in range(endpoints.shape[-1]):
        e, r = endpoints[..., i], _all_below(leaves, i)
        both = float(np.mean([covariance(e, r[..., j]) for j in range(r.shape[-1])]))
        of_e, of_r = float(covariance(e, e)), float(covariance(r, r).mean())
        known = min(of_e, of_r) > SMALL * max(float(np.abs(endpoints).max()), float(np.abs(leaves).max()), 1.0) ** 2
        found.append((both / math.sqrt(of_e * of_r), both / of_e) if known else (math.nan, math.nan))
    return np.array([f[0] for f in found]), np.array([f[1] for f in found])


def statistics(nested: Nested) -> F64:
    """Rows decided, upper, rank, slope, known of (L,) levels."""
    endpoints, leaves = finite(nested.endpoints), finite(nested.leaves)
    levels, drawn = endpoints.shape[-1], leaves.shape[-1] - 1
    ones = np.ones(levels - drawn)  # levels below which every step is deterministic
    share = np.append(decided(leaves, drawn), ones)
    upper = np.append(decided(scores(leaves), drawn), ones)
    line, slope = correlations(endpoints, leaves)
    rank, _ = correlations(*(np.apply_along_axis(ranks, 1, part) for part in (endpoints, leaves)))
    known = line / np.sqrt(np.where(share > 0, share, math.nan))
    return np.stack([share, upper, rank, slope, known])


def jackknife(statistic: Callable[[Nested], F64], nested: Nested) -> tuple[F64, F64]:
    """A statistic and its standard errors, chains left out one at a time; NaN where one of them is."""
    chains = nested.leaves.shape[1]
    others = np.stack([statistic(nested.without(k)) for k in range(chains)])
    spread = ((others - others.mean(0)) ** 2).sum(0)
    return statistic(nested), np.sqrt((chains - 1) / chains * spread)


def monotone(shares: F64, weights: F64) -> F64:
    """The nearest shares that do not fall, in [0, 1], by pooling neighbours: more is decided the less noise is left."""
    blocks: list[tuple[float, float, int]] = []
    for share, weight in zip(shares.tolist(), weights.tolist(), strict=True):
        blocks.append((share, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, w, n), (b, v, m) = blocks[-2:]
            blocks[-2:] = [((w * a + v * b) / (w + v), w + v, n + m)]
    return np.clip(np.repeat([b[0] for b in blocks], [b[2] for b in blocks]), 0.0, 1.0)
