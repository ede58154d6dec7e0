"""Descents: searches that look at rewards on their way down and decide where to go on from.

    a descent asks for moves: from a node already reached, down to one or several new nodes
    the moves of all descents that are under way make a wave; their rewards decide the next moves

Depth-first search, rollover budget forcing and look-ahead beams are descents. Several independent ones run side by side
so that passes are full; how many is a setting of the method, so that no result depends on the batch size. A descent is
begun only if the most it can cost fits the budget; what is left at the end goes to smaller ones, the smallest of which
is a plain rollout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from treesearch.core.noise import child_keys
from treesearch.core.tree import NONE, ROOT
from treesearch.engine.segments import Segments
from treesearch.errors import StoreError
from treesearch.methods.base import NO_NODES, Ids, Problem, Readout, Search, Spent, Status
from treesearch.methods.groups import packed, unpacked


class Move(NamedTuple):
    """From a node down through new nodes at the given levels; above t = 0 the last one is scored by its endpoint."""

    source: int
    levels: tuple[int, ...]


class Plan(NamedTuple):
    """A size of descent: what makes it, and the most it can cost."""

    size: int
    nfe: int
    reward_calls: int


class Descent(Protocol):
    """One descent's decisions."""

    done: bool

    def moves(self) -> list[Move]:
        """What it wants next; asked again unchanged until it is told."""
        ...

    def tell(self, reached: list[Ids], reward: NDArray[np.float64]) -> None:
        """The new nodes of each move, in order, and the reward of the last one of each."""
        ...

    def keep(self) -> list[int]:
        """Nodes that later moves may start from."""
        ...


def price(source: int, level: int, num_steps: int, *, held: bool) -> int:
    """NFE of a move from level `source` down to `level`, whose endpoint is scored above t = 0.

    A held transition was paid for when its level was scored.
    """
    return min(source, num_steps) - level + (level > 0) - (held and source <= num_steps)


def prices(levels: Sequence[int], num_steps: int) -> list[int]:
    """NFE from each scored level (the root first) to the next."""
    above = (num_steps + 1, *levels[:-1])
    return [price(s, t, num_steps, held=True) for s, t in zip(above, levels, strict=True)]


class DescentSearch(Search):
    """Runs descents one group after another.

    Args:
        problem: the task.
        plans: sizes of descents, largest first; the last one is the least that is worth beginning.
        beside: descents that run side by side.
    """

    def __init__(self, problem: Problem, plans: list[Plan], beside: int) -> None:
        super().__init__(problem)
        self.plans, self.beside = plans, beside
        self.nfe = self.calls = self.finished = 0
        self.group: Sequence[Descent] = []
        self.groups: list[list[int]] = []  # sizes of the descents begun, by group
        self.asked: list[tuple[Descent, list[Move]]] = []

    @abstractmethod
    def make(self, size: int) -> Descent:
        """A descent of one of the planned sizes."""

    @property
    def busy(self) -> bool:
        """Whether descents are on their way."""
        return bool(self.group)

    def frontier(self) -> Ids:
        return np.array(sorted({n for d in self.group for n in d.keep()}), np.int64)

    def ask(self, capacity: int) -> Segments:
        del capacity  # the result depends on the group, never on the batch size
        if not self.group and not self._begin(self._sizes()):
            self.status = Status.BUDGET
            return Segments(NO_NODES, NO_NODES, NO_NODES)
        moves = self._next()
        first, last = self._append(moves)
        hold = moves[0].levels[-1] > 0
        return Segments(np.array([m.source for m in moves]), first, last, hold=hold, keep=self.frontier())

    def tell(self, segments: Segments) -> None:
        tree, at = self.tree, 0
        leaves = segments.last[tree.t[segments.last] == 0]
        tree.value[leaves] = tree.reward[leaves]
        for descent, moves in self.asked:
            mine = slice(at, at + len(moves))
            at += len(moves)
            reached = [np.arange(a, b + 1) for a, b in zip(segments.first[mine], segments.last[mine], strict=True)]
            descent.tell(reached, tree.reward[segments.last[mine]])
        if all(descent.done for descent in self.group):
            self.finished += len(self.group)
            self.conclude(self.group)
            self.group = []

    def conclude(self, group: Sequence[Any]) -> None:
        """A group has finished; what it saw may count from now on."""

    def state(self) -> dict[str, Any]:
        return {"groups": packed(self.groups)}

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        """Repeat the decisions on the recorded rewards; the recorded parents must be the ones they lead to."""
        del ends
        at = 1
        for sizes in state["groups"]:
            self._begin(unpacked(sizes))
            while self.group and at < len(self.tree):
                moves = self._next()
                ends_at = at + np.cumsum([len(m.levels) for m in moves]) - 1
                first = np.concatenate([[at], ends_at[:-1] + 1])
                sources, levels = np.array([m.source for m in moves]), [t for m in moves for t in m.levels]
                same = ends_at[-1] < len(self.tree) and np.array_equal(self.tree.parent[first], sources)
                if not same or self.tree.t[at : at + len(levels)].tolist() != levels:
                    raise StoreError("the recorded parents are not the ones the recorded rewards lead to: damaged run")
                at = int(ends_at[-1]) + 1
                self.tell(Segments(sources, first, ends_at))

    def readout(self) -> Readout:
        return Readout.greedy(self.told, descents=self.finished)

    def _begin(self, sizes: list[int]) -> bool:
        self.group = [self.make(k) for k in sizes]
        if sizes:
            self.groups.append(sizes)
        return bool(sizes)

    @property
    def spent(self) -> Spent:
        return Spent(self.nfe, self.calls, sum(map(len, self.groups)))

    def _sizes(self) -> list[int]:
        """Sizes of the next descents that fit whatever they will do."""
        left = self.left
        for plan in self.plans:
            count = min(left.units(plan.nfe, plan.reward_calls), self.beside if plan is self.plans[0] else 1)
            if count:
                return [plan.size] * count
        return []

    def _next(self) -> list[Move]:
        """The moves of a wave: those that end in a scored endpoint, and the last ones down when all have got there."""
        wanted = [(d, d.moves()) for d in self.group if not d.done]
        held = [(d, moves) for d, moves in wanted if moves[0].levels[-1] > 0]
        self.asked = held or wanted
        moves = [m for _, several in self.asked for m in several]
        for move in moves:
            self.nfe += self._price(move)
        self.calls += len(moves)
        return moves

    def _price(self, move: Move) -> int:
        source = int(self.tree.t[move.source])
        held = not np.isnan(self.tree.reward[move.source])
        return price(source, move.levels[-1], self.problem.num_steps, held=held)

    def _append(self, moves: list[Move]) -> tuple[Ids, Ids]:
        """Add the nodes of moves: a first child goes on with its parent's key, further ones get their own."""
        tree, before = self.tree, {}
        parents, levels, keys, first = [], [], [], []
        for source, chain in moves:
            ordinal = before.setdefault(source, int(tree.children[source]))
            before[source] += 1
            above, t = tree.key[[source]], int(tree.t[source])
            key = child_keys(above, t, np.array([ordinal]), at_root=source == ROOT)[0]
            first.append(len(tree) + len(parents))
            parents += [source, *range(first[-1], first[-1] + len(chain) - 1)]
            levels += chain
            keys += [key] * len(chain)
        tree.append(np.array(parents), np.array(levels), np.array(keys, np.uint64))
        last = np.array([*first[1:], len(tree)]) - 1
        return np.array(first), last


def best_of(nodes: Sequence[int], reward: Sequence[float]) -> int:
    """The node of highest reward, the earliest of equals; NONE among no nodes."""
    return nodes[int(np.argmax(reward))] if len(nodes) else NONE
