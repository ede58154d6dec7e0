"""Selection: which child to descend to, and the compiled loop that selects a wave of leaves.

    boltzmann     child ~ exp(λ v_c + log_w_c)                      Diffusion Tree Sampling
    uct           argmax v_c + c_uct √(log N / N_c)                 Diffusion Tree Search (DTS*)
    round_robin   the least visited child; looks at no value, so the root's soft value is unbiased

Widening: a node expands while |C| < C·N^α, before anything is selected. Within a wave values are frozen, visits and
child counts are not; a child without a value (pending) cannot be selected, and where every child is pending the node
expands. Rules read a node's children once a wave: their values cannot change before the wave is told.

Source: Diffusion Tree Sampling (Jain et al., 2025), algorithm 1 and appendix F.1 (C = 2, α = .8; c_uct is not given).
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core.compiled import compiled
from treesearch.core.noise import child_key, hash64
from treesearch.core.tree import add_child


class Select(IntEnum):
    """Selection rules as compiled code knows them."""

    BOLTZMANN = 0
    UCT = 1
    ROUND_ROBIN = 2


RULES = {"boltzmann": Select.BOLTZMANN, "uct": Select.UCT, "round_robin": Select.ROUND_ROBIN}
_STREAM_SELECT = 3


class Policy(NamedTuple):
    """How a wave is selected."""

    rule: int
    lam: float
    widening_c: float
    widening_alpha: float
    c_uct: float
    root_key: np.uint64
    levels: NDArray[np.int64]  # t of a node by depth, root first, 0 last


class Selected(NamedTuple):
    """What the iterations of a wave did, (wave,) each.

    Iteration i expanded source[i] with the new nodes first[i]..last[i], or (first[i] = -1) ended at the leaf last[i].
    """

    source: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


@compiled
def select_wave(nodes, n, policy, wave, iteration, nfe, calls, out):
    """Select up to `wave` leaves; every expansion appends a rollout's nodes, one a branching level.

    Args:
        nodes: `Tree.columns()`, with room for wave * len(levels) nodes behind the n there are.
        policy: `Policy`.
        iteration: iterations before this wave, the counter of the selection stream.
        nfe, calls: what may still be spent.
        out: `Selected`, filled in.

    Returns:
        (nodes now, `kids`, iterations done, whether the budget stopped it).
    """
    depths = len(policy.levels)
    kids, mark = nodes.kids, nodes.mark
    ids, score, extra = np.empty(n, np.int64), np.empty(n, np.float64), np.empty(n, np.float64)
    seen = np.empty(wave * depths + 1, np.int64)  # nodes whose children were gathered, and where they were put
    place, count = np.empty_like(seen), np.empty_like(seen)
    path, chosen = np.empty(depths + 1, np.int64), np.empty(depths + 1, np.int64)
    gathered, used, done, stopped = 0, 0, 0, False
    while done < wave:
        node, depth, expand = 0, 0, False
        path[0], chosen[0] = 0, -1
        while depth < depths - 1:
            if nodes.children[node] < policy.widening_c * nodes.visits[node] ** policy.widening_alpha:
                expand = True
                break
            if mark[node] < 0:
                mark[node] = gathered
                seen[gathered], place[gathered] = node, used
                count[gathered] = _gather(node, policy, wave, nodes, kids, ids, score, extra, used)
                used += count[gathered]
                gathered += 1
            slot = mark[node]
            if count[slot] == 0:
                expand = True
                break
            bits = hash64(policy.root_key, iteration + done, depth, _STREAM_SELECT)
            u = float(bits >> np.uint64(11)) * 2.0**-53
            at = _pick(policy, nodes.visits[node], u, score, extra, place[slot], count[slot])
            node = ids[at]
            depth += 1
            path[depth], chosen[depth] = node, at
        if expand:
            cost = policy.levels[depth] if depth > 0 else policy.levels[0] - 1
            if cost > nfe or calls < 1:
                stopped = True
                break
            nfe -= cost
            calls -= 1
            out.source[done], out.first[done] = node, n
            n, kids = _rollout(node, depth, n, policy.levels, nodes, kids)
            out.last[done] = n - 1
        else:
            out.source[done], out.first[done], out.last[done] = -1, -1, node
        for i in range(depth + 1):
            nodes.visits[path[i]] += 1
            if chosen[i] >= 0 and policy.rule > 0:
                extra[chosen[i]] = 1.0 / math.sqrt(nodes.visits[path[i]])
                if policy.rule == 2:
                    score[chosen[i]] = nodes.visits[path[i]]
        done += 1
    for i in range(gathered):
        mark[seen[i]] = -1
    return n, kids, done, stopped


@compiled
def _gather(node, policy, wave, nodes, kids, ids, key, extra, at):
    """Copy the valued children of a node, oldest first, behind `at`; returns how many.

    `key` receives the cumulative weights (boltzmann), the values (uct) or the visits (round robin); `extra` 1/√N_c.
    """
    n = 0
    for child in kids[nodes.start[node] : nodes.start[node] + nodes.children[node]]:
        if not math.isnan(nodes.value[child]):
            ids[at + n] = child
            n += 1
    if policy.rule == 0:
        _cumulate(policy.lam, nodes, ids, key, at, n)
        return n
    for i in range(at, at + n):
        child = ids[i]
        key[i] = nodes.value[child] if policy.rule == 1 else nodes.visits[child]
        extra[i] = 1.0 / math.sqrt(nodes.visits[child])
    if policy.rule == 1 and n > 4 * wave:
        return _contenders(policy.c_uct, nodes.visits[node], wave, ids, key, extra, at, n)
    return n


@compiled
def _cumulate(lam, nodes, ids, key, at, n):
    """Cumulative Boltzmann weights of the children gathered at `at`."""
    top = -math.inf
    for i in range(at, at + n):
        child = ids[i]
        if lam == 0:
            key[i] = nodes.log_w[child]
        elif math.isinf(lam):
            key[i] = nodes.value[child] if nodes.log_w[child] > -math.inf else -math.inf
        else:
            key[i] = lam * nodes.value[child] + nodes.log_w[child]
        top = max(top, key[i])
    total = 0.0
    for i in range(at, at + n):
        if top == -math.inf:
            total += 1.0  # every child is forbidden: uniform, so that visits go on
        elif math.isinf(lam):
            total += 1.0 if key[i] == top else 0.0
        else:
            total += math.exp(key[i] - top)
        key[i] = total


@compiled
def _contenders(c_uct, visits_here, wave, ids, key, extra, at, n):
    """Keep only the children that UCT can choose within this wave, in order; returns how many.

    A visit lowers the score of the child that got it, a visit to the parent raises every score. So as long as fewer
    than `wave` children were chosen, one of the `wave` best of now is still there with at least its score of now: a
    child whose score stays below that even with the bonus of the wave's end is never chosen.
    """
    now = c_uct * math.sqrt(math.log(visits_here))
    end = c_uct * math.sqrt(math.log(visits_here + wave))
    least = np.partition(key[at : at + n] + now * extra[at : at + n], n - wave)[n - wave]
    kept = 0
    for i in range(at, at + n):
        if key[i] + end * extra[i] >= least:
            ids[at + kept], key[at + kept], extra[at + kept] = ids[i], key[i], extra[i]
            kept += 1
    return kept


@compiled
def _pick(policy, visits_here, u, key, extra, start, n):
    """Position of the chosen child within start..start+n."""
    if policy.rule == 0:
        point, low, high = u * key[start + n - 1], start, start + n - 1
        while low < high:  # first position whose cumulative weight exceeds the point
            middle = (low + high) // 2
            if key[middle] > point:
                high = middle
            else:
                low = middle + 1
        return low
    best, at = -math.inf, start
    bonus = policy.c_uct * math.sqrt(math.log(visits_here))
    for i in range(start, start + n):
        score = key[i] + bonus * extra[i] if policy.rule == 1 else -key[i]
        if score > best:
            best, at = score, i
    if best == -math.inf:  # every child is forbidden: the least visited, so that the search looks elsewhere
        for i in range(start, start + n):
            if extra[i] > extra[at]:
                at = i
    return at


@compiled
def _rollout(node, depth, n, levels, nodes, kids):
    """Append a new child of `node` and its continuation down to x_0; returns (nodes now, kids)."""
    fresh = child_key(nodes.key[node], nodes.t[node], nodes.children[node], node == 0)
    for level in range(depth + 1, len(levels)):
        nodes.parent[n], nodes.t[n], nodes.key[n], nodes.visits[n] = node, levels[level], fresh, 2
        nodes.value[n], nodes.reward[n], nodes.log_w[n], nodes.slot[n] = math.nan, math.nan, 0.0, -1
        nodes.children[n], nodes.start[n], nodes.mark[n] = 0, -1, -1
        kids = add_child(node, n, nodes.children, nodes.start, kids, nodes.slabs)
        node = n
        n += 1
    return n, kids
