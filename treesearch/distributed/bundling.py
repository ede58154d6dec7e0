"""From waves to bundles: the rows of a wave as columns, any part of them as a bundle, and what comes of it.

Functions of trees and columns; nothing here knows of processes beyond their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.budget import Cost
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.distributed.bundles import Bundle, as_numpy
from treesearch.engine.segments import Ids, Leg, Segments, leg, sideways
from treesearch.engine.states import StateStore


@dataclass(eq=False)
class Job:
    """The rows of one wave, in order of its work."""

    wave: int
    task: Ids
    source: Ids
    first: Ids
    last: Ids
    hold: NDArray[np.bool_]
    draft: Ids  # evaluations of the draft that scores `last`, 0 for none
    t: Ids  # level of the source
    paid: NDArray[np.bool_]  # its evaluation was charged before
    nfe: NDArray[np.float64]  # evaluations, drafts as they are charged
    draft_nfe: NDArray[np.float64]  # those of the draft
    kept: Ids  # (worker, bundle, row) of the transition it draws from, NONE for none, (n, 3)
    queued: NDArray[np.bool_]
    left: int
    uses: set[tuple[int, int]]  # (worker, bundle) whose transitions are of no use after it
    cost: Cost = field(default_factory=Cost)

    def name(self, row: int, trees: Sequence[Tree]) -> str:
        """What errors call a row."""
        task, node = int(self.task[row]), int(self.last[row])
        return f"node {node} (t = {trees[task].t[node]}) of task {task}"


Parts = list[tuple[Job, Ids]]  # rows of several jobs


class Kept:
    """Where the transitions wait that ended a segment: (worker, bundle, row) by task and node."""

    def __init__(self) -> None:
        self._of: dict[int, list[tuple[Ids, Ids]]] = {}  # by task: nodes, increasing, and where their transitions are

    def add(self, task: int, nodes: Ids, where: Ids) -> None:
        """Enter transitions of nodes (n,) at where (n, 3)."""
        order = np.argsort(nodes)
        self._of.setdefault(task, []).append((nodes[order], where[order]))

    def take(self, task: int, source: Ids, keep: Ids) -> Ids:
        """Where those of the sources are, (n, 3), NONE for none; from now on only those of nodes to keep are known."""
        found = np.full((len(source), 3), NONE)
        for nodes, where in self._of.pop(task, []):
            at = np.searchsorted(nodes, source).clip(max=len(nodes) - 1)
            here = nodes[at] == source
            found[here] = where[at[here]]
            if (stay := np.isin(nodes, keep)).any():
                self._of.setdefault(task, []).append((nodes[stay], where[stay]))
        return found

    def bundles(self, tasks: Iterable[int] | None = None) -> set[tuple[int, int]]:
        """(worker, bundle) of the transitions of tasks, by default of all."""
        held = [where for task in (self._of if tasks is None else tasks) for _, where in self._of.get(task, [])]
        return {(int(w), int(b)) for where in held for w, b in np.unique(where[:, :2], axis=0)}


def job_of(wave: int, work: Sequence[tuple[int, Segments]], trees: Sequence[Tree], spec: Spec, kept: Kept) -> Job:
    """The rows of a wave of (task, segments), all of them queued."""
    # Also of transitions that nothing draws from: their lineages died out.
    held = kept.bundles(task for task, _ in work)
    parts = [_rows(task, trees[task], segments, spec, kept) for task, segments in work]
    uses = held - kept.bundles()
    columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n = len(columns["task"])
    return Job(wave, queued=np.ones(n, np.bool_), left=n, uses=uses, **columns)


def _rows(task: int, tree: Tree, segments: Segments, spec: Spec, kept: Kept) -> dict[str, NDArray[Any]]:
    """Columns of a job for the rows of one task."""
    n = len(segments.first)
    t = tree.t[segments.source].astype(np.int64)
    beside = sideways(tree, segments)
    paid = (segments.source != ROOT) & ~np.isnan(tree.reward[segments.source]) & segments.paid
    draft = _drafts(segments, tree.t[segments.last].astype(np.int64), spec)
    nfe = np.minimum(t, spec.num_steps) - tree.t[segments.last] + segments.hold - (paid & ~beside) + draft
    where = kept.take(task, segments.source, segments.keep)
    where[beside] = NONE
    return {
        "task": np.full(n, task),
        "source": segments.source,
        "first": segments.first,
        "last": segments.last,
        "hold": np.full(n, segments.hold),
        "draft": np.full(n, segments.draft),
        "t": t,
        "paid": paid,
        "nfe": nfe.astype(float),
        "draft_nfe": draft.astype(float),
        "kept": where,
    }


def _drafts(segments: Segments, level: Ids, spec: Spec) -> NDArray[Any]:
    """NFE of each row's draft."""
    if not segments.draft:
        return np.zeros(len(level))
    free, held = (np.array(spec.draft_prices(segments.draft, held=held))[level] for held in (False, True))
    return np.where(segments.hold, held, free)


def column(parts: Parts, name: str) -> NDArray[Any]:
    """A column of jobs, of these rows."""
    return np.concatenate([getattr(job, name)[rows] for job, rows in parts])


def nfe_of(parts: Parts) -> float:
    """Evaluations that rows take."""
    return float(sum(job.nfe[rows].sum() for job, rows in parts))


def nodes_of(parts: Parts) -> tuple[Ids, Ids]:
    """(task, node) of the nodes that rows pass, row by row."""
    first, passed = column(parts, "first"), column(parts, "last") - column(parts, "first") + 1
    return np.repeat(column(parts, "task"), passed), _ranges(first, passed)


def pack(
    parts: Parts,
    worker: int,
    trees: Sequence[Tree],
    states: StateStore,
    num_steps: int,
    *,
    number: int,
    settle: Callable[[], None],
    forget: tuple[int, ...] = (),
) -> Bundle:
    """Rows as they travel to a worker.

    Args:
        parts: the rows.
        worker: its number; rows whose transition it keeps need no state.
        trees, states, num_steps: of the search.
        number: of the bundle.
        settle: called where a state has no place in `states`: it may have arrived, and not been put there yet.
        forget: bundles whose transitions the worker need not keep.

    Raises:
        LostStates: some that should be stored are not.
    """
    task, source, first, last, kept = (column(parts, name) for name in ("task", "source", "first", "last", "kept"))
    owner, nodes = nodes_of(parts)
    n, here = len(task), kept[:, 0] == worker
    key, levels = np.empty(n, np.uint64), np.empty(len(nodes), np.int64)
    slot, legs, lineages = np.full(n, NONE), {}, {}
    for i in np.unique(task):
        tree, mine = trees[i], np.flatnonzero(task == i)
        key[mine] = tree.key[first[mine]]
        levels[owner == i] = tree.t[nodes[owner == i]]
        beside = tree.t[first[mine]] == tree.t[source[mine]]
        lineages |= {int(row): tree.lineage(int(source[row])) for row in mine[beside]}
        wanted = mine[~here[mine] & (source[mine] != ROOT) & ~beside]
        if (tree.slot[source[wanted]] == NONE).any():
            settle()
        slot[wanted] = tree.slot[source[wanted]]
        for row in wanted[slot[wanted] == NONE]:
            slot[row], legs[int(row)] = detour(tree, int(source[row]), num_steps)
    travelling, start = _gathered(states, slot)
    return Bundle(
        number=number,
        task=task,
        key=key,
        t=column(parts, "t"),
        again=column(parts, "paid"),
        hold=column(parts, "hold"),
        draft=column(parts, "draft"),
        passed=last - first + 1,
        levels=levels,
        name=last,
        start=start,
        states=travelling,
        kept=np.where(here[:, None], kept[:, 1:], NONE),
        legs=legs,
        lineages=lineages,
        forget=forget,
    )


def _gathered(states: StateStore, slot: Ids) -> tuple[NDArray[Any] | None, Ids]:
    """The states of slots, each of them once, and which of them is each row's, NONE for none."""
    start, stored = np.full(len(slot), NONE), slot != NONE
    if not stored.any():
        return None, start
    slots, start[stored] = np.unique(slot[stored], return_inverse=True)
    return as_numpy(states.get(slots)), start


def nearest(tree: Tree, node: int) -> int:
    """The nearest ancestor of a node whose state is stored, or the root."""
    above = int(tree.parent[node])
    while above != ROOT and tree.slot[above] == NONE:
        above = int(tree.parent[above])
    return above


def detour(tree: Tree, node: int, num_steps: int) -> tuple[int, list[Leg]]:
    """(slot of the nearest stored ancestor or NONE, legs from there) of a node whose state is not stored."""
    above = nearest(tree, node)
    return NONE if above == ROOT else int(tree.slot[above]), legs_between(tree, node, above, num_steps)


def legs_between(tree: Tree, node: int, above: int, num_steps: int) -> list[Leg]:
    """The edges from an ancestor down to a node."""
    legs = []
    while node != above:
        legs.append(leg(tree, node, num_steps))
        node = int(tree.parent[node])
    return legs[::-1]


def inputs(parts: Parts, trees: Sequence[Tree], prompts: Sequence[Any] | None) -> str:
    """What a bundle was made of, for messages."""
    job, row = parts[0][0], int(parts[0][1][0])
    tasks = sorted({int(i) for j, r in parts for i in j.task[r]})
    n = sum(len(r) for _, r in parts)
    first = int(job.task[row])
    asked = "" if prompts is None else f", prompts {[prompts[i] for i in tasks[:4]]!r}"
    return (
        f"{n} rows of tasks {tasks[:8]}{asked}; the first from node {job.source[row]} (t = {job.t[row]}) to node "
        f"{job.last[row]} of task {first}, noise key {trees[first].key[job.first[row]]}"
    )


def chosen(parts: Parts, mark: NDArray[np.bool_]) -> Parts:
    """The rows that are marked, (n,) over all parts."""
    ends = np.cumsum([len(rows) for _, rows in parts])
    picked = [(job, rows[mark[end - len(rows) : end]]) for (job, rows), end in zip(parts, ends, strict=True)]
    return [(job, rows) for job, rows in picked if len(rows)]


def halves(parts: Parts, n: int) -> list[Parts]:
    """The first n rows of a bundle, and the others."""
    first, second = [], []
    for job, rows in parts:
        first += [(job, rows[:n])] if n > 0 else []
        second += [(job, rows[n:])] if n < len(rows) else []
        n = max(0, n - len(rows))
    return [first, second]


def charge(parts: Parts, cost: Cost) -> None:
    """Enter a bundle's cost into the waves of its rows: evaluations exactly, the rest in proportion."""
    nfe, draft = (np.array([getattr(job, name)[rows].sum() for job, rows in parts]) for name in ("nfe", "draft_nfe"))
    count = np.array([len(rows) for _, rows in parts])
    for name in ("nfe", "rows", "backward_nfe", "repeated_nfe", "reward_calls", "decodes", "draft_nfe"):
        weight = count if name in ("reward_calls", "decodes") or not nfe.any() else nfe
        weight = draft if name == "draft_nfe" and draft.any() else weight
        total = getattr(cost, name)
        upto = np.floor(total * np.cumsum(weight) / weight.sum() + 1e-9).astype(int)
        for (job, _), share in zip(parts, np.diff(upto, prepend=0), strict=True):
            setattr(job.cost, name, getattr(job.cost, name) + int(share))
    for (job, _), n, evaluated in zip(parts, count / count.sum(), nfe / (nfe.sum() or 1), strict=True):
        job.cost.model_seconds += cost.model_seconds * float(evaluated)
        job.cost.reward_seconds += cost.reward_seconds * float(n)


def _ranges(first: Ids, counts: Ids) -> Ids:
    """first[0], first[0] + 1, ... counts[0] of them, then from first[1] on."""
    begin = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return begin + np.arange(len(begin))
