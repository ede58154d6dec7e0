"""Backups: a node's value from its children's values, in units of the reward.

    soft   λ v(x) = log( (1/|C|) Σ_c exp(λ v_c + log_w_c) )     log-MEAN-exp over all children that have a value
    max    v(x) = max_c v_c over children with w_c > 0          the limit λ → ∞
    mean   v(x) = Σ_c w_c v_c / Σ_c w_c                         the limit λ → 0
    visits v(x) = Σ_c n_c v_c / Σ_c n_c      mean over iterations, n_c of which passed through c

With selection that does not look at values, E[exp(λ v_root)] = Z at every budget for the soft backup; with Boltzmann
selection it is biased low. Children still pending (value NaN) are left out.

Sources: Diffusion Tree Sampling (Jain et al., 2025), algorithm 1; the weights log_w = Σ log p/q extend it to proposals.
Bandit based Monte-Carlo Planning (Kocsis & Szepesvári, 2006), visits.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from treesearch.core.compiled import compiled
from treesearch.core.tree import Tree


class Rule(IntEnum):
    """Backup rules as compiled code knows them."""

    SOFT = 0
    MAX = 1
    MEAN = 2
    VISITS = 3


RULES = {"soft": Rule.SOFT, "max": Rule.MAX, "mean": Rule.MEAN, "visits": Rule.VISITS}


def rule_of(name: str, lam: float) -> Rule:
    """The rule to run: the soft backup is `max` at λ = ∞ and `mean` at λ = 0."""
    rule = RULES[name]
    if rule == Rule.SOFT and lam == 0:
        return Rule.MEAN
    return Rule.MAX if rule == Rule.SOFT and math.isinf(lam) else rule


@compiled
def _mean_of_visits(node, nodes):
    """Mean of the children's values by the iterations through them; NaN where none has a value."""
    total, count = 0.0, 0
    for child in nodes.kids[nodes.start[node] : nodes.start[node] + nodes.children[node]]:
        if not math.isnan(nodes.value[child]):
            n = nodes.visits[child] - 1
            total += n * nodes.value[child]
            count += n
    return total / count if count > 0 else math.nan


@compiled
def _value(node, rule, lam, nodes, score):
    """Value of one node from its valued children; NaN where it has none. `score` is scratch for its children."""
    if rule == 3:
        return _mean_of_visits(node, nodes)
    top, count, total, weight = -math.inf, 0, 0.0, 0.0
    value, log_w = nodes.value, nodes.log_w
    mine = nodes.kids[nodes.start[node] : nodes.start[node] + nodes.children[node]]
    for child in mine:
        v = value[child]
        if not math.isnan(v):
            if rule == 0:
                score[count] = lam * v + log_w[child]
            elif rule == 1:
                score[count] = v if log_w[child] > -math.inf else -math.inf
            else:
                score[count] = log_w[child]
            top = max(top, score[count])
            count += 1
    if count == 0:
        return math.nan
    if rule == 1 or top == -math.inf:
        return top
    if rule == 0:
        for i in range(count):
            total += math.exp(score[i] - top)
        return (top + math.log(total / count)) / lam
    for child in mine:
        w = 0.0 if math.isnan(value[child]) else math.exp(log_w[child] - top)
        weight += w
        if w > 0:
            total += w * value[child]
    return total / weight


@compiled
def _backup(leaves, rule, lam, nodes):
    """Recompute every ancestor of the leaves, deepest first."""
    stale = np.empty(64, np.int64)
    n = 0
    for leaf in leaves:
        node = nodes.parent[leaf]
        while node >= 0 and nodes.mark[node] < 0:
            nodes.mark[node] = 0
            if n == len(stale):
                grown = np.empty(2 * n, np.int64)
                grown[:n] = stale
                stale = grown
            stale[n] = node
            n += 1
            node = nodes.parent[node]
    ordered = np.sort(stale[:n])
    score = np.empty(nodes.children[ordered].max() if n else 0, np.float64)
    for i in range(n - 1, -1, -1):  # children have larger numbers than their parents
        node = ordered[i]
        nodes.value[node] = _value(node, rule, lam, nodes, score)
        nodes.mark[node] = -1


@compiled
def _recompute(size, rule, lam, nodes):
    score = np.empty(nodes.children[:size].max(), np.float64)
    for node in range(size - 1, -1, -1):
        if nodes.children[node] > 0:
            nodes.value[node] = _value(node, rule, lam, nodes, score)


@compiled
def _visits(ends, parent, visits):
    for node in range(len(parent)):
        visits[node] = 1 + ends[node]
    for node in range(len(parent) - 1, 0, -1):
        visits[parent[node]] += visits[node] - 1


@compiled
def _log_shares(value, log_w, parent):
    valued = np.zeros(len(parent), np.int32)
    for node in range(1, len(parent)):
        if not math.isnan(value[node]):
            valued[parent[node]] += 1
    share = np.zeros(len(parent), np.float64)
    for node in range(1, len(parent)):
        above = parent[node]
        share[node] = share[above] + log_w[node]
        if valued[above] > 1:
            share[node] -= math.log(valued[above])
    return share


def log_shares(tree: Tree) -> NDArray[np.float64]:
    """Σ (log_w - log |C(parent)|) from the root down to each node, over children that have a value."""
    return _log_shares(tree.value, tree.log_w, tree.parent)


def backup(tree: Tree, leaves: NDArray[np.int64], rule: Rule, lam: float) -> None:
    """Give newly scored leaves their rewards as values and carry them up to the root."""
    tree.value[leaves] = tree.reward[leaves]
    _backup(leaves, int(rule), float(lam), tree.columns())


def revisit(tree: Tree, leaves: NDArray[np.int64], rule: Rule, lam: float) -> None:
    """Carry the values above leaves up again, whose visits have changed; for rules that look at visits."""
    if rule == Rule.VISITS:
        _backup(leaves, int(rule), float(lam), tree.columns())


def recompute(tree: Tree, rule: Rule, lam: float) -> None:
    """All values from scratch, bottom up, from the rewards of the leaves."""
    tree.value[:] = np.where(tree.t == 0, tree.reward, np.nan)
    _recompute(len(tree), int(rule), float(lam), tree.columns())


def recount(tree: Tree, ends: NDArray[np.int64]) -> None:
    """All visits from the node at which each iteration ended."""
    counts = np.bincount(ends, minlength=len(tree)).astype(np.int32)
    _visits(counts, tree.parent, tree.visits)
