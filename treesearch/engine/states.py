"""Where latents live: a protocol, and a growing arena in memory. Lossless, whatever keeps them.

States on disk, `treesearch.runs.shards`, may be lost; what is lost is struck from the trees and computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.core.tree import NONE
from treesearch.errors import StoreError

log = logging.getLogger("treesearch")

CHUNK_BYTES = 16 * 2**20


class StateStore(Protocol):
    """States by slot."""

    def put(self, x: Tensor) -> NDArray[np.int64]:
        """Keep rows (n, *state); returns their slots."""
        ...

    def get(self, slots: NDArray[Any]) -> Tensor:
        """The rows of the given slots, in order."""
        ...

    def drop(self, slots: NDArray[Any]) -> None:
        """Forget rows; their memory may be used again."""
        ...

    def close(self) -> None:
        """Finish what is open."""
        ...


class MemoryStates:
    """States in chunks of memory, so that growing copies nothing; dropped slots are used again.

    Args:
        shape, dtype: of one state.
        device: where they live; the host by default.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        self._empty = torch.empty((0, *shape), dtype=dtype, device=device)
        self._size = max(1, CHUNK_BYTES // max(1, int(np.prod(shape)) * dtype.itemsize))  # rows of a chunk
        self._chunks: list[Tensor] = []
        self._used = 0
        self._free = np.empty(0, np.int64)  # increasing

    def put(self, x: Tensor) -> NDArray[np.int64]:
        n = len(x)
        reuse, self._free = self._free[:n], self._free[n:]
        fresh = np.arange(self._used, self._used + n - len(reuse))
        self._used += len(fresh)
        while len(self._chunks) * self._size < self._used:
            self._chunks.append(self._empty.new_empty((self._size, *self._empty.shape[1:])))
        slots = np.concatenate([reuse, fresh])
        for chunk, at, rows in self._places(slots):
            self._chunks[chunk][rows] = x[at].to(self._empty.device)
        return slots

    def get(self, slots: NDArray[Any]) -> Tensor:
        slots = np.asarray(slots, np.int64)
        places = self._places(slots)
        if len(places) == 1:
            found = self._chunks[places[0][0]][places[0][2]]
            return found.clone() if isinstance(places[0][2], slice) else found
        out = self._empty.new_empty((len(slots), *self._empty.shape[1:]))
        for chunk, at, rows in places:
            out[at] = self._chunks[chunk][rows]
        return out

    def drop(self, slots: NDArray[Any]) -> None:
        self._free = np.sort(np.concatenate([self._free, np.asarray(slots, np.int64)]))

    def _places(self, slots: NDArray[np.int64]) -> list[tuple[int, slice | Tensor, slice | Tensor]]:
        """(chunk, which of the slots, its rows), slices where they stand together."""
        chunk, row = np.divmod(slots, self._size)
        if len(slots) == 0 or (chunk == chunk[0]).all():
            return [(int(chunk[0]), slice(0, len(slots)), index(row))] if len(slots) else []
        found = []
        for c in np.unique(chunk):
            at = np.flatnonzero(chunk == c)
            found.append((int(c), index(at), index(row[at])))
        return found

    def close(self) -> None:
        """Nothing is open."""


class LostStates(StoreError):
    """States that are missing or do not match their checksums.

    Args:
        folder: of the run.
        shard: file name of the first of them.
        slots: places of all that is lost in the shards of those that were asked for.
    """

    def __init__(self, folder: Path, shard: str, slots: NDArray[np.int64]) -> None:
        self.slots, self.file = slots, folder / shard
        super().__init__(f"{self.file} is missing or damaged, states in it are lost: put back the file")


def index(rows: NDArray[np.int64]) -> slice | Tensor:
    """Rows as an index: a slice, which copies nothing, where they stand together in order."""
    first, n = int(rows[0]), len(rows)
    together = rows[-1] - first + 1 == n and (n < 3 or (np.diff(rows) == 1).all())
    return slice(first, first + n) if together else torch.from_numpy(rows)


def recovered(read: Callable[[], Tensor], slots: Sequence[NDArray[Any]]) -> Tensor:
    """What `read` finds; lost states are struck from the trees' `slot`, as if never kept, and it is asked again."""
    while True:
        try:
            return read()
        except LostStates as lost:
            forget(lost, slots)


def forget(lost: LostStates, slots: Sequence[NDArray[Any]]) -> None:
    """Strike lost states from the trees' `slot`, and say so."""
    gone = [np.flatnonzero(np.isin(slot, lost.slots) & (slot != NONE)) for slot in slots]
    if not sum(map(len, gone)):
        raise lost
    named = [f"node {node} of task {task}" for task, nodes in enumerate(gone) for node in nodes[:3].tolist()]
    count = sum(map(len, gone))
    more = ", ..." if count > len(named[:4]) else ""
    text = (
        "%s is missing or damaged: %d states (%s%s) are lost and computed again from their keys where they are needed"
    )
    log.warning(text, lost.file, count, ", ".join(named[:4]), more)
    for slot, nodes in zip(slots, gone, strict=True):
        slot[nodes] = NONE
