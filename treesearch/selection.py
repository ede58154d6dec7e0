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

import numpy as np
from numba import njit

from treesearch.noise import child_key, hash64
from treesearch.tree import add_child


class Select(IntEnum):
    """Selection rules as compiled code knows them."""

    BOLTZMANN = 0
    UCT = 1
    ROUND_ROBIN = 2


RULES = {"boltzmann": Select.BOLTZMANN, "uct": Select.UCT, "round_robin": Select.ROUND_ROBIN}
_STREAM_SELECT = 3


@njit(cache=True)
def _gather(  # noqa: ANN202
    node, rule, lam, c_uct, wave, value, visits, log_w, children, start, kids, ids, key, extra, at,  # noqa: ANN001
):  # fmt: skip
    """Copy the valued children of a node, oldest first, behind `at`; returns how many.

    `key` receives the cumulative weights (boltzmann), the values (uct) or the visits (round robin); `extra` 1/√N_c.
    """
    n = 0
    for child in kids[start[node] : start[node] + children[node]]:
        if not math.isnan(value[child]):
            ids[at + n] = child
            n += 1
    if rule == 0:
        top = -math.inf
        for i in range(at, at + n):
            child = ids[i]
            if lam == 0:
                key[i] = log_w[child]
            elif math.isinf(lam):
                key[i] = value[child]
            else:
                key[i] = lam * value[child] + log_w[child]
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
        return n
    for i in range(at, at + n):
        child = ids[i]
        key[i] = value[child] if rule == 1 else visits[child]
        extra[i] = 1.0 / math.sqrt(visits[child])
    if rule == 1 and n > 4 * wave:
        return _contenders(c_uct, visits[node], wave, ids, key, extra, at, n)
    return n


@njit(cache=True)
def _contenders(c_uct, visits_here, wave, ids, key, extra, at, n):  # noqa: ANN001, ANN202
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


@njit(cache=True)
def _pick(rule, c_uct, visits_here, u, key, extra, start, n):  # noqa: ANN001, ANN202
    """Position of the chosen child within start..start+n."""
    if rule == 0:
        point, low, high = u * key[start + n - 1], start, start + n - 1
        while low < high:  # first position whose cumulative weight exceeds the point
            middle = (low + high) // 2
            if key[middle] > point:
                high = middle
            else:
                low = middle + 1
        return low
    best, at = -math.inf, start
    if rule == 1:
        bonus = c_uct * math.sqrt(math.log(visits_here))
        for i in range(start, start + n):
            score = key[i] + bonus * extra[i]
            if score > best:
                best, at = score, i
        return at
    for i in range(start, start + n):
        if -key[i] > best:
            best, at = -key[i], i
    return at


@njit(cache=True)
def select_wave(  # noqa: ANN201, PLR0913
    n, parent, t, visits, value, reward, log_w, key, slot_of, children, start, mark, kids, slabs,  # noqa: ANN001 - tree columns
    levels, wave, nfe, calls, iteration, rule, lam, widening_c, widening_alpha, c_uct, root_key,  # noqa: ANN001
    source, first_new, ends,  # noqa: ANN001 - outputs, (wave,)
):
    """Select up to `wave` leaves; every expansion appends a rollout's nodes, one a branching level.

    Args:
        n: nodes so far; the columns have room for wave * len(levels) more.
        levels: t of a node by depth, root first and 0 last.
        nfe, calls: what may still be spent.
        iteration: number of iterations before this wave, the counter of the selection stream.

    Returns:
        (nodes now, `kids`, iterations done, whether the budget stopped it). Iteration i expanded source[i] with new nodes
        first_new[i]..ends[i], or ended at the existing leaf ends[i] with first_new[i] = -1.
    """
    depths = len(levels)
    ids = np.empty(n, np.int64)
    score = np.empty(n, np.float64)
    extra = np.empty(n, np.float64)
    place = np.empty(wave * depths + 1, np.int64)
    count = np.empty(wave * depths + 1, np.int64)
    seen, used, done, stopped = np.empty(wave * depths + 1, np.int64), 0, 0, False
    visited, path = 0, np.empty(depths + 1, np.int64)
    chosen = np.empty(depths + 1, np.int64)
    while done < wave:
        node, depth = 0, 0
        path[0], chosen[0] = 0, -1
        expand = False
        while depth < depths - 1:
            if children[node] < widening_c * visits[node] ** widening_alpha:
                expand = True
                break
            if mark[node] < 0:
                mark[node] = visited
                seen[visited], place[visited] = node, used
                count[visited] = _gather(
                    node, rule, lam, c_uct, wave, value, visits, log_w, children, start, kids, ids, score, extra, used
                )
                used += count[visited]
                visited += 1
            slot = mark[node]
            if count[slot] == 0:
                expand = True
                break
            u = float(hash64(root_key, iteration + done, depth, _STREAM_SELECT) >> np.uint64(11)) * 2.0**-53
            at = _pick(rule, c_uct, visits[node], u, score, extra, place[slot], count[slot])
            node = ids[at]
            depth += 1
            path[depth], chosen[depth] = node, at
        if expand:
            cost = levels[depth] if depth > 0 else levels[1]
            if cost > nfe or calls < 1:
                stopped = True
                break
            nfe -= cost
            calls -= 1
            source[done], first_new[done] = node, n
            fresh = child_key(key[node], t[node], children[node], node == 0)
            above = node
            for level in range(depth + 1, depths):
                parent[n], t[n], key[n], visits[n] = above, levels[level], fresh, 2
                value[n], reward[n], log_w[n], slot_of[n] = math.nan, math.nan, 0.0, -1
                children[n], start[n], mark[n] = 0, -1, -1
                kids = add_child(above, n, children, start, kids, slabs)
                above = n
                n += 1
            ends[done] = n - 1
        else:
            source[done], first_new[done], ends[done] = -1, -1, node
        for i in range(depth + 1):
            visits[path[i]] += 1
            if chosen[i] >= 0 and rule > 0:
                extra[chosen[i]] = 1.0 / math.sqrt(visits[path[i]])
                if rule == 2:
                    score[chosen[i]] = visits[path[i]]
        done += 1
    for i in range(visited):
        mark[seen[i]] = -1
    return n, kids, done, stopped
