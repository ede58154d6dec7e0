"""How far the weights exp(λ r) p/q of rollouts are spread: what importance sampling and best-of-N have to pay.

    ESS fraction    (E w)² / E w²                     1/fraction rollouts are worth one draw of π
    variance        of log w = λ r + log p/q over the rollouts whose weight is not zero
    KL(π‖p)         E_π[λ r] - log Z                  exp(KL) rollouts are what importance sampling needs
    λ(.1)           the λ at which the ESS fraction is a tenth

All from the leaves of a pilot, which share chains: means over leaves are unbiased, their ratios consistent; an ESS
fraction is too high where the best samples of π are too rare to be among them. Tasks are averaged.

Source: The Sample Size Required in Importance Sampling (Chatterjee and Diaconis, 2018), theorem 1.1.
"""

from __future__ import annotations

import math

import numpy as np

from treesearch.core.weights import F64, ess, scaled
from treesearch.session.calibrate import TARGET, divergence, lambda_for_ess


def statistics(leaves: F64, log_p: F64, lam: float) -> F64:
    """ESS fraction, variance of log w and KL of rewards and log p/q (P, K, J); NaN for a task without any weight."""
    found = []
    for rewards, weights in zip(leaves.reshape(len(leaves), -1), log_p.reshape(len(leaves), -1), strict=True):
        log_w = scaled(lam, rewards) + weights
        alive = log_w[log_w > -math.inf]
        if not len(alive):
            return np.full(3, math.nan)
        found.append((ess(log_w) / len(log_w), float(alive.var(ddof=1)) if len(alive) > 1 else 0.0,
                      divergence(rewards, weights, lam)))  # fmt: skip
    return np.mean(found, 0)


def tenth(leaves: F64, log_p: F64) -> float | None:
    """λ(.1), None where no λ does it."""
    rows = [list(part.reshape(len(part), -1)) for part in (leaves, log_p)]
    try:
        return lambda_for_ess(rows[0], rows[1], TARGET)
    except ValueError:
        return None
