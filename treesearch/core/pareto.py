"""Pareto k̂: how heavy the upper tail of importance weights is, from a generalised Pareto fit.

    exceedances y of the M largest of S weights over the next one,   M = min(S/5, 3 √S)
    P(Y > y) = (1 + k y/σ)^(-1/k),   and with b = -k/σ the best k for a b is k(b) = mean log(1 - b y)
    b̂ = Σ_j L_j b_j over a grid of b, L_j ∝ exp(n (log(-b_j/k_j) - k_j - 1)),   k̂ = (n k(b̂) + 10 · 0.5) / (n + 10)

Moments of the weights exist up to order 1/k: above 1/2 the variance of Ẑ is infinite, above 1 so is its mean. The usual
limit, k̂ <= min(1 - 1/log10 S, .7), is not used: whether k̂ falls below it says as much about luck as about the weights,
and intervals that allow for skew hold log Z less often among the searches that pass than among all of them.

Sources: A new and efficient estimation method for the generalized Pareto distribution (Zhang and Stephens, 2009), the
grid and its likelihood weights; Pareto Smoothed Importance Sampling (Vehtari et al., 2024), appendices (M, the prior of
weight 10 at 1/2) and eq. 13 (the limit).
"""

from __future__ import annotations

import math

import numpy as np

from treesearch.core.weights import F64, log_sum

LEAST_TAIL = 5
LEAST = 5 * LEAST_TAIL
PRIOR_COUNT, PRIOR_K = 10, 0.5


def k_hat(log_w: F64) -> float | None:
    """Shape of the tail of exp(log_w) (S,); None below 25 draws, -inf where the largest weights are all equal."""
    s = len(log_w)
    if s < LEAST or np.max(log_w) == -math.inf:
        return None
    tail = math.ceil(min(0.2 * s, 3 * math.sqrt(s)))
    w = np.exp(np.sort(log_w)[-tail - 1 :] - np.max(log_w))
    excess = w[1:] - w[0]
    excess = excess[excess > 0]
    return fit(excess) if len(excess) >= LEAST_TAIL else -math.inf


def fit(y: F64) -> float:
    """k̂ of positive exceedances, sorted."""
    n = len(y)
    m = 30 + math.isqrt(n)
    j = np.arange(1, m + 1)
    b = 1 / y[-1] + (1 - np.sqrt(m / (j - 0.5))) / (3 * y[int(n / 4 + 0.5) - 1])
    k = np.log1p(-b[:, None] * y).mean(1)
    likelihood = n * (np.log(-b / k) - k - 1)
    best = float(np.sum(np.exp(likelihood - log_sum(likelihood)) * b))
    return float((n * np.log1p(-best * y).mean() + PRIOR_COUNT * PRIOR_K) / (n + PRIOR_COUNT))
