"""What a search asks of an engine, and what it hears back: walks between nodes, in the columns of their trees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from treesearch.budget import Cost

Ids = NDArray[np.int64]


class Ledger(Protocol):
    """The columns of nodes that an engine reads and writes: a `Tree`'s, or those of a part of one."""

    parent: NDArray[Any]
    t: NDArray[Any]
    key: NDArray[np.uint64]
    slot: NDArray[Any]
    reward: NDArray[np.float64]
    log_w: NDArray[np.float64]

    def lineage(self, node: int, /) -> NDArray[np.uint64]:
        """Keys whose noise makes the state of a node at level T."""
        ...


class Nodes(Protocol):
    """The nodes of every task."""

    def __getitem__(self, task: int, /) -> Ledger: ...


@dataclass
class Segments:
    """Walks to run: row i leaves source[i] and passes the new nodes first[i]..last[i], each a child of the one before.

    Args:
        source, first, last: node numbers, (n,).
        hold: score the endpoint of `last` and keep its transition, instead of scoring a sample; for all, or by row.
        keep: nodes whose transitions, held since earlier waves, are kept for later ones; all others are let go.
        draft: evaluations of a draft, 0 for none. `last` is above t = 0, and its reward is that of the x_0 at which a
            draft from it ends. Without `hold` the draft takes the noise that the node's first child will take: once
            finished, the two share every draw. With `hold` it takes noise of its own: offspring draw theirs afresh, and
            a value that has seen it would bias them.
        paid: whether sources that have a reward were evaluated when they got it. Not those that were drafted.
    """

    source: Ids
    first: Ids
    last: Ids
    hold: bool | NDArray[np.bool_] = False
    keep: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    draft: int = 0
    paid: bool = True

    def take(self, rows: Ids) -> Segments:
        """Some of its walks."""
        mine = {name: getattr(self, name)[rows] for name in ("source", "first", "last")}
        return replace(self, hold=self.hold if isinstance(self.hold, bool) else self.hold[rows], **mine)


class Leg(NamedTuple):
    """A way that is walked again.

    Args:
        keys: noise key of its steps; from the prior those of a lineage, the last of which is the key of its steps.
        level, end: t of both ends; T + 1 for the prior.
    """

    keys: tuple[int, ...]
    level: int
    end: int


class Arrival(NamedTuple):
    """Rows that are scored.

    Args:
        wave: theirs.
        rows: positions among the wave's segments, in order of its work.
        cost: what the wave cost, once all its rows have arrived.
    """

    wave: int
    rows: Ids
    cost: Cost | None


def sideways(tree: Ledger, segments: Segments) -> NDArray[np.bool_]:
    """Rows that begin at a neighbour of the node they leave."""
    return np.asarray(tree.t[segments.first] == tree.t[segments.source])


def leg(tree: Ledger, node: int, num_steps: int) -> Leg:
    """The way to a node from its parent; to one at level T from the prior, with the keys of its lineage."""
    end = int(tree.t[node])
    if end == num_steps:
        return Leg(tuple(tree.lineage(node).tolist()), num_steps + 1, end)
    return Leg((int(tree.key[node]),), int(tree.t[tree.parent[node]]), end)
