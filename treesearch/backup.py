"""Backups: a node's value from its children's values, in units of the reward.

    soft   λ v(x) = log( (1/|C|) Σ_c exp(λ v_c + log_w_c) )     log-MEAN-exp over all children that have a value
    max    v(x) = max_c v_c                                     the limit λ → ∞
    mean   v(x) = Σ_c w_c v_c / Σ_c w_c                         the limit λ → 0

With selection that does not look at values, E[exp(λ v_root)] = Z at every budget for the soft backup; with Boltzmann
selection it is biased low. Children still pending (value NaN) are left out.

Source: Diffusion Tree Sampling (Jain et al., 2025), algorithm 1; the weights log_w = Σ log p/q extend it to proposals.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numba import njit
from numpy.typing import NDArray

from treesearch.tree import Tree


class Rule(IntEnum):
    """Backup rules as compiled code knows them."""

    SOFT = 0
    MAX = 1
    MEAN = 2


RULES = {"soft": Rule.SOFT, "max": Rule.MAX, "mean": Rule.MEAN}


def rule_of(name: str, lam: float) -> Rule:
    """The rule to run: the soft backup is `max` at λ = ∞ and `mean` at λ = 0."""
    rule = RULES[name]
    if rule == Rule.SOFT and lam == 0:
        return Rule.MEAN
    return Rule.MAX if rule == Rule.SOFT and math.isinf(lam) else rule


@njit(cache=True)
def _value(node, rule, lam, value, log_w, first, sibling):  # noqa: ANN001, ANN202
    """Value of one node from its valued children; NaN where it has none."""
    top, count, child = -math.inf, 0, first[node]
    while child >= 0:
        if not math.isnan(value[child]):
            count += 1
            if rule == 0:
                top = max(top, lam * value[child] + log_w[child])
            elif rule == 1:
                top = max(top, value[child])
            else:
                top = max(top, log_w[child])
        child = sibling[child]
    if count == 0:
        return math.nan
    if rule == 1 or top == -math.inf:
        return top
    total, weight, child = 0.0, 0.0, first[node]
    while child >= 0:
        if not math.isnan(value[child]):
            if rule == 0:
                total += math.exp(lam * value[child] + log_w[child] - top)
            else:
                w = math.exp(log_w[child] - top)
                weight += w
                if w > 0:
                    total += w * value[child]
        child = sibling[child]
    if rule == 0:
        return (top + math.log(total / count)) / lam
    return total / weight


@njit(cache=True)
def _backup(leaves, rule, lam, value, log_w, parent, first, sibling, mark):  # noqa: ANN001, ANN202
    """Recompute every ancestor of the leaves, deepest first."""
    stale = np.empty(64, np.int64)
    n = 0
    for leaf in leaves:
        node = parent[leaf]
        while node >= 0 and mark[node] < 0:
            mark[node] = 0
            if n == len(stale):
                grown = np.empty(2 * n, np.int64)
                grown[:n] = stale
                stale = grown
            stale[n] = node
            n += 1
            node = parent[node]
    ordered = np.sort(stale[:n])
    for i in range(n - 1, -1, -1):  # children have larger numbers than their parents
        node = ordered[i]
        value[node] = _value(node, rule, lam, value, log_w, first, sibling)
        mark[node] = -1


@njit(cache=True)
def _recompute(rule, lam, value, log_w, children, first, sibling):  # noqa: ANN001, ANN202
    for node in range(len(value) - 1, -1, -1):
        if children[node] > 0:
            value[node] = _value(node, rule, lam, value, log_w, first, sibling)


@njit(cache=True)
def _visits(ends, parent, visits):  # noqa: ANN001, ANN202
    for node in range(len(parent)):
        visits[node] = 1 + ends[node]
    for node in range(len(parent) - 1, 0, -1):
        visits[parent[node]] += visits[node] - 1


def backup(tree: Tree, leaves: NDArray[np.int64], rule: Rule, lam: float) -> None:
    """Give newly scored leaves their rewards as values and carry them up to the root."""
    tree.value[leaves] = tree.reward[leaves]
    _backup(leaves, int(rule), float(lam), tree.value, tree.log_w, tree.parent, tree.first, tree.sibling, tree.mark)


def recompute(tree: Tree, rule: Rule, lam: float) -> None:
    """All values from scratch, bottom up, from the rewards of the leaves."""
    tree.value[:] = np.where(tree.t == 0, tree.reward, np.nan)
    _recompute(int(rule), float(lam), tree.value, tree.log_w, tree.children, tree.first, tree.sibling)


def recount(tree: Tree, ends: NDArray[np.int64]) -> None:
    """All visits from the node at which each iteration ended."""
    counts = np.bincount(ends, minlength=len(tree)).astype(np.int32)
    _visits(counts, tree.parent, tree.visits)
