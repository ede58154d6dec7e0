"""A wave: what was asked of the searches together, until all of it is told and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.budget import Cost
from treesearch.engine.segments import Segments
from treesearch.methods.base import Search


@dataclass
class Wave:
    """A wave in flight."""

    number: int
    work: list[tuple[int, Segments]]
    bounds: list[tuple[int, int]]  # nodes it added to each tree
    hits: list[NDArray[Any]]  # records of `treesearch.runs.log.HIT`
    states: list[dict[str, Any]]  # of the searches, right after they were asked
    known: list[NDArray[np.float64]] | None = None  # rewards of a wave that was read back from a run
    cost: Cost = field(default_factory=Cost)
    left: int = 0  # rows that have not arrived
    told: list[int] = field(default_factory=list)  # rows of each task told before it was selected

    def tell(self, searches: Sequence[Search], rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Tell the searches of some of its rows, counted in order of its work; (task, how many)."""
        at, told = 0, []
        for task, segments in self.work:
            mine = rows[(rows >= at) & (rows < at + len(segments.first))] - at
            at += len(segments.first)
            if len(mine):
                searches[task].tell(segments.take(mine))
                told.append((task, len(mine)))
        self.left -= len(rows)
        return told


@dataclass
class Staleness:
    """How many rows of its task were told between the selection of a row and its arrival: what it did not know."""

    total: int = 0
    rows: int = 0
    most: int = 0

    def add(self, told: int, rows: int) -> None:
        """Enter rows that arrive together, `told` rows after they were selected."""
        self.total, self.rows, self.most = self.total + told * rows, self.rows + rows, max(self.most, told)

    def mean(self) -> float:
        """Mean over the rows so far."""
        return round(self.total / max(1, self.rows), 2)


def merge(number: int, waves: Sequence[Wave]) -> Wave:
    """Waves that follow one another as one."""
    cost = Cost()
    for wave in waves:
        cost.add(wave.cost)
    bounds = [(a, b) for (a, _), (_, b) in zip(waves[0].bounds, waves[-1].bounds, strict=True)]
    work = [part for wave in waves for part in wave.work]
    return Wave(number, work, bounds, [h for w in waves for h in w.hits], waves[-1].states, cost=cost)
