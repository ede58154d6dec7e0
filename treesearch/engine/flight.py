"""Rows under way: the flight of a wave, the transitions that ended its segments, and the rows of one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Transition
from treesearch.budget import Cost
from treesearch.engine.segments import Ids, Nodes
from treesearch.engine.states import index


@dataclass
class Held:
    """Transitions of one task's nodes, evaluated and not left yet."""

    transition: Transition
    node: Ids  # increasing

    def only(self, nodes: Ids) -> Held | None:
        """Those of the given nodes, one at least and in order; None where there are none."""
        rows = np.flatnonzero(nodes[np.searchsorted(nodes, self.node).clip(max=len(nodes) - 1)] == self.node)
        if len(rows) == len(self.node):
            return self
        return Held(self.transition.take(torch.from_numpy(rows)), self.node[rows]) if len(rows) else None


@dataclass
class Flight:
    """The rows of one wave, as arrays."""

    wave: int
    x: Tensor  # (n, *state)
    t: Ids
    task: Ids
    node: Ids  # the next node to reach
    last: Ids
    stop: Ids  # t of `node`
    key: NDArray[np.uint64]
    hold: NDArray[np.bool_]
    draft: Ids  # evaluations of the draft that scores `last`, 0 for none
    log_w: NDArray[np.float64]  # since the node passed last
    again: NDArray[np.bool_]  # the next evaluation was paid for before (an interrupted wave)
    trees: Nodes
    stays: bool = True  # the engine keeps the transitions that ended its segments
    unscored: int = 0
    cost: Cost = field(default_factory=Cost)  # settled when the wave is finished
    held: dict[int, list[Held]] = field(default_factory=dict)  # by task: transitions that ended a segment
    queue: dict[int, list[Ids]] = field(default_factory=dict)  # evaluations left -> chunks of rows

    @property
    def previewed(self) -> NDArray[np.bool_]:
        """Rows whose endpoints are scored, which a preview may decode."""
        return self.hold & (self.draft == 0)

    def enqueue(self, rows: Ids, left: Ids) -> None:
        """Queue rows by the evaluations they have left; rows with none are not queued."""
        for steps in np.unique(left[left > 0]):
            self.queue.setdefault(int(steps), []).append(rows[left == steps])

    def take(self, room: int) -> Iterator[tuple[int, Ids]]:
        """Up to `room` rows with their evaluations left, most first."""
        for steps in sorted(self.queue, reverse=True):
            chunks = self.queue[steps]
            while chunks and room > 0:
                chunk = chunks.pop(0)
                if len(chunk) > room:
                    chunks.insert(0, chunk[room:])
                    chunk = chunk[:room]
                room -= len(chunk)
                yield steps, chunk
            if not chunks:
                del self.queue[steps]


class Transitions:
    """Those that nodes hold, by task, until segments leave the nodes."""

    def __init__(self, of: dict[int, list[Held]] | None = None) -> None:
        self._of = of or {}

    def add(self, task: int, held: list[Held]) -> None:
        """Keep some more."""
        self._of.setdefault(task, []).extend(held)

    def keep_only(self, task: int, nodes: Ids) -> None:
        """Let go of a task's transitions, but for those of the given nodes."""
        held, nodes = self._of.pop(task, []), np.sort(nodes)
        self._of[task] = [part for h in held if (part := h.only(nodes))] if len(nodes) else []

    def leaving(self, task: Ids, source: Ids, beside: NDArray[np.bool_]) -> Iterator[tuple[Ids, Transition]]:
        """Rows that leave a node whose transition is held, and their transitions; those that go `beside` leave none."""
        for i, at in by_task(task):
            if not (parts := self._of.get(i)):
                continue
            node, first = np.concatenate([h.node for h in parts]), np.cumsum([0, *(len(h.node) for h in parts)])
            order = np.argsort(node)
            place = order[np.searchsorted(node, source[at], sorter=order).clip(max=len(node) - 1)]
            mine = np.flatnonzero((node[place] == source[at]) & ~beside[at])
            place = place[mine]
            for part, which in grouped(np.searchsorted(first, place, "right") - 1):
                law = parts[part].transition.take(torch.from_numpy(place[which] - first[part]))
                yield at.start + mine[which], law


class Batch:
    """The rows of one pass, which may belong to several flights."""

    def __init__(self, parts: list[tuple[Flight, int, Ids]]) -> None:
        self.parts = parts
        self.x = cat([f.x[index(rows)] for f, _, rows in parts])
        self.t = np.concatenate([f.t[rows] for f, _, rows in parts])
        self.task = np.concatenate([f.task[rows] for f, _, rows in parts])
        self.key = np.concatenate([f.key[rows] for f, _, rows in parts])
        self.ends = np.concatenate([f.hold[rows] & (steps == 1) for f, steps, rows in parts])

    def split(self) -> Iterator[tuple[Flight, int, Ids, slice]]:
        """Each part with its place in the batch."""
        at = 0
        for flight, steps, rows in self.parts:
            yield flight, steps, rows, slice(at, at + len(rows))
            at += len(rows)


def grouped(label: Ids) -> Iterator[tuple[int, Ids]]:
    """(label, positions of the rows that bear it), in order of label."""
    if (label == label[:1]).all():
        yield from [(int(label[0]), np.arange(len(label)))] if len(label) else []
        return
    order = np.argsort(label, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        yield int(label[part[0]]), part


def by_task(task: Ids) -> Iterator[tuple[int, slice]]:
    """(task, its rows) of rows that stand in order of task."""
    ends = [*(np.flatnonzero(np.diff(task)) + 1).tolist(), len(task)]
    at = 0
    for end in ends:
        yield int(task[at]), slice(at, end)
        at = end


def cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
