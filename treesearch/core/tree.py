"""The tree: a struct of arrays. A node is an integer, its children always have larger integers.

Only branching levels become nodes; node 0 is the root, at level t = T + 1, its children are draws of x_T and leaves are
samples x_0. States live apart, in a `StateStore`; `slot` says where. A node's children stand side by side in `kids`,
oldest first, in slabs whose sizes are powers of two: reading them is what selection and backup do most, and walking a
linked list costs a cache miss a child. At most 64 bytes a node in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core.compiled import compiled

ROOT = 0
NONE = -1
_CLASSES = 33  # slab sizes 2^0..2^31, and the count of used places
_DTYPES: dict[str, Any] = {
    "parent": np.int32,  # NONE for the root
    "t": np.int16,  # denoising steps left
    "visits": np.int32,  # 1 + iterations that passed through
    "value": np.float64,  # soft value in units of r; NaN while no reward below has been told
    "reward": np.float64,  # r of the sample (leaves) or of the endpoint (scored levels); NaN where not scored
    "log_w": np.float64,  # Σ log p/q along the edge from the parent
    "key": np.uint64,  # noise key of the path
    "slot": np.int32,  # place of the state in the store; NONE where not kept
    "children": np.int32,  # how many
    "start": np.int32,  # place of its children in `kids`
    "mark": np.int32,  # scratch of selection and backup, NONE between waves
}
INITIAL: dict[str, Any] = {
    "visits": 1,
    "value": np.nan,
    "reward": np.nan,
    "log_w": 0.0,
    "slot": NONE,
    "children": 0,
    "start": NONE,
    "mark": NONE,
}


class Columns(NamedTuple):
    """The arrays as compiled code takes them."""

    parent: NDArray[np.int32]
    t: NDArray[np.int16]
    visits: NDArray[np.int32]
    value: NDArray[np.float64]
    reward: NDArray[np.float64]
    log_w: NDArray[np.float64]
    key: NDArray[np.uint64]
    slot: NDArray[np.int32]
    children: NDArray[np.int32]
    start: NDArray[np.int32]
    mark: NDArray[np.int32]
    kids: NDArray[np.int32]
    slabs: NDArray[np.int32]


class Tree:
    """Growing arrays of nodes.

    Every column of `COLUMNS` is an attribute: a view of the nodes so far, shape (n,).

    Args:
        num_steps: T of the kernel.
        key: noise key of the root.
        capacity: nodes to make room for at first.
        angle: θ between the prior noise of a node at level T and that of its neighbours, its children at level T.
    """

    COLUMNS = tuple(_DTYPES)

    parent: NDArray[np.int32]
    t: NDArray[np.int16]
    visits: NDArray[np.int32]
    value: NDArray[np.float64]
    reward: NDArray[np.float64]
    log_w: NDArray[np.float64]
    key: NDArray[np.uint64]
    slot: NDArray[np.int32]
    children: NDArray[np.int32]
    start: NDArray[np.int32]
    mark: NDArray[np.int32]

    def __init__(self, num_steps: int, key: int, capacity: int = 64, *, angle: float = 0.0) -> None:
        self._size, self.angle = 0, angle
        self.kids = np.empty(max(capacity, 1), np.int32)
        self.slabs = np.full(_CLASSES, NONE, np.int32)
        self.slabs[-1] = 0
        self._data: dict[str, NDArray[Any]] = {name: np.empty(0, dtype) for name, dtype in _DTYPES.items()}
        self.reserve(capacity)
        self.append(np.array([NONE]), np.array([num_steps + 1]), np.array([key], np.uint64))

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> dict[str, Any]:
        """Its nodes, without the room for more."""
        data = {name: column[: self._size].copy() for name, column in self._data.items()}
        return {"angle": self.angle, "kids": self.kids[: self.slabs[-1]].copy(), "slabs": self.slabs, "data": data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._data, self.angle, self.kids, self.slabs = (state[name] for name in ("data", "angle", "kids", "slabs"))
        self._trim(len(self._data["t"]))

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more nodes; views taken before are stale afterwards."""
        need, have = self._size + extra, len(self._data["t"])
        if need <= have:
            return
        capacity = max(need, 2 * have)
        for name, old in self._data.items():
            grown = np.empty(capacity, old.dtype)  # untouched pages cost nothing: rows are filled when they are used
            grown[: self._size] = old[: self._size]
            self._data[name] = grown
        self._trim(self._size)

    def _trim(self, size: int) -> None:
        self._size = size
        for name, column in self._data.items():
            setattr(self, name, column[:size])

    def columns(self) -> Columns:
        """Whole arrays, room for new nodes included, for compiled loops; call `grown` afterwards."""
        return Columns(**self._data, kids=self.kids, slabs=self.slabs)

    def grown(self, size: int, kids: NDArray[np.int32]) -> None:
        """Accept the nodes that a compiled loop wrote behind the last one, and where it put their places."""
        self.kids = kids
        self._trim(size)

    def children_of(self, node: int) -> NDArray[np.int32]:
        """A node's children, oldest first."""
        return self.kids[self.start[node] : self.start[node] + self.children[node]]

    def append(self, parent: NDArray[Any], t: NDArray[Any], key: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Add nodes in order; returns their numbers."""
        start, n = self._size, len(parent)
        if start + n > len(self._data["t"]):
            self.reserve(n)
        ids = np.arange(start, start + n)
        for name, values in ({"parent": parent, "t": t, "key": key} | INITIAL).items():
            self._data[name][start : start + n] = values
        self._trim(start + n)
        self.kids = _link(self.parent, self.children, self.start, self.kids, self.slabs, start)
        return ids

    def check_levels(self, levels: NDArray[Any]) -> None:
        """Raises:
        ValueError: a node's level is not the one below its parent's in `levels`, which begin with the root's.
        """
        below = np.full(int(levels[0]) + 1, NONE)
        below[levels[:-1]] = levels[1:]
        wrong = np.flatnonzero(self.t[1:] != below[self.t[self.parent[1:]]])
        if len(wrong):
            node = int(wrong[0]) + 1
            raise ValueError(f"node {node} is at level {self.t[node]}, below one at level {self.t[self.parent[node]]}")

    @property
    def leaves(self) -> NDArray[np.int64]:
        """Scored samples, in order of creation."""
        return np.flatnonzero((self.t == 0) & ~np.isnan(self.reward))

    def roots(self, nodes: NDArray[Any]) -> NDArray[np.int64]:
        """The child of the root that each node descends from."""
        lineage = np.asarray(nodes, np.int64)
        while True:
            above = self.parent[lineage]
            if (above <= ROOT).all():
                return lineage
            lineage = np.where(above > ROOT, above, lineage)

    def lineage(self, node: int) -> NDArray[np.uint64]:
        """Keys of the nodes at a node's level on its path, itself last: what makes the state of a node at level T."""
        line = [node]
        while self.t[above := self.parent[line[-1]]] == self.t[node]:
            line.append(int(above))
        return self.key[line[::-1]]

    def edge_weights(self, nodes: NDArray[Any]) -> NDArray[np.float64]:
        """Σ log p/q from the root down to each node."""
        total, at = np.zeros(len(nodes)), np.asarray(nodes, np.int64)
        while (at > ROOT).any():
            total += np.where(at > ROOT, self.log_w[at], 0.0)
            at = np.maximum(self.parent[at], ROOT)
        return total

    @property
    def bytes_per_node(self) -> float:
        """Topology bytes of one node: its row and its share of `kids`."""
        row = sum(column.itemsize for column in self._data.values())
        return row + self.kids.itemsize * int(self.slabs[-1]) / len(self)


@compiled
def add_child(node, child, children, start, kids, slabs):
    """Enter a child behind its siblings; returns `kids`, grown if it was full.

    slabs[k] heads the list of free slabs of 2^k places, linked through their first place; slabs[-1] counts used places.
    """
    count = children[node]
    if count & (count - 1) == 0:  # 0 or a power of two: the slab is full
        size, k = max(2 * count, 1), 0
        while 1 << k < size:
            k += 1
        if slabs[k] >= 0:
            new = slabs[k]
            slabs[k] = kids[new]
        else:
            new = slabs[-1]
            slabs[-1] += size
            if slabs[-1] > len(kids):
                grown = np.empty(max(2 * len(kids), slabs[-1]), np.int32)
                grown[: len(kids)] = kids
                kids = grown
        if count > 0:
            old = start[node]
            kids[new : new + count] = kids[old : old + count]
            kids[old] = slabs[k - 1]
            slabs[k - 1] = old
        start[node] = new
    kids[start[node] + count] = child
    children[node] = count + 1
    return kids


@compiled
def _link(parent, children, start, kids, slabs, first):
    """Enter nodes first.. under their parents."""
    for node in range(first, len(parent)):
        if parent[node] >= 0:
            kids = add_child(parent[node], node, children, start, kids, slabs)
    return kids
