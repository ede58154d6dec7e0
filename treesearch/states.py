"""Where latents live: a growing arena in memory, or rolling safetensors shards on disk. Both are lossless.

A shard is a valid safetensors file at every moment: its header announces room for about 64 MB of states and the file
is extended to that length at once (sparse), then rows are written in place. Closing it cuts header and file to the
rows that it holds. Slot s is row s % rows_per_shard of shard s // rows_per_shard.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.errors import StoreError, writing

SHARD_BYTES = 64 * 2**20
CHUNK_BYTES = 16 * 2**20
_HEADER = 512  # bytes of JSON, padded with blanks so that it can be rewritten in place
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


class ShardStates:
    """States in `states-00000.safetensors`, ... of a folder.

    Args:
        folder: the run folder.
        shape, dtype: of one state.
        used: slots already written (when a run goes on); later rows overwrite what lies behind them.
        shard_bytes: size of a shard.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        used: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.shape, self.dtype, self.used = folder, shape, dtype, used
        self._row = max(1, int(np.prod(shape)) * dtype.itemsize)
        self.rows = max(1, shard_bytes // self._row)
        self._open: tuple[int, int] | None = None  # (shard, file descriptor)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"states-{shard:05d}.safetensors"

    def put(self, x: Tensor) -> NDArray[np.int64]:
        data = x.detach().to("cpu", self.dtype).contiguous()
        slots = np.arange(self.used, self.used + len(x))
        at = 0
        while at < len(x):
            shard, row = divmod(self.used, self.rows)
            n = min(len(x) - at, self.rows - row)
            with writing(self.folder):
                _write_all(self._descriptor(shard), _bytes(data[at : at + n]), 8 + _HEADER + row * self._row)
            self.used, at = self.used + n, at + n
        return slots

    def get(self, slots: NDArray[Any]) -> Tensor:
        slots = np.asarray(slots, np.int64)
        out = np.empty((len(slots), self._row), np.uint8)
        for shard in np.unique(slots // self.rows):
            rows = np.flatnonzero(slots // self.rows == shard)
            path = self.path(int(shard))
            try:
                file = np.memmap(path, np.uint8, "r", offset=8 + _HEADER)
            except (OSError, ValueError) as error:
                raise StoreError(f"{path} is missing or damaged, the states in it cannot be read: {error}") from error
            count = len(file) // self._row
            out[rows] = file[: count * self._row].reshape(count, self._row)[slots[rows] % self.rows]
        return torch.from_numpy(out).view(self.dtype).reshape(len(slots), *self.shape)

    def drop(self, slots: NDArray[Any]) -> None:
        """Files only grow: what was written stays."""
        del slots

    def sync(self) -> None:
        """Force written rows to the disk."""
        if self._open is not None:
            os.fdatasync(self._open[1])

    def close(self) -> None:
        """Cut the last shard to the rows it holds."""
        if self._open is not None:
            shard, descriptor = self._open
            self._announce(descriptor, self.used - shard * self.rows)
            os.close(descriptor)
            self._open = None

    def _descriptor(self, shard: int) -> int:
        if self._open is not None and self._open[0] == shard:
            return self._open[1]
        if self._open is not None:
            os.fsync(self._open[1])
            os.close(self._open[1])
        descriptor = os.open(self.path(shard), os.O_RDWR | os.O_CREAT, 0o644)
        self._announce(descriptor, self.rows)
        self._open = (shard, descriptor)
        return descriptor

    def _announce(self, descriptor: int, rows: int) -> None:
        """Write the header for `rows` states and make the file as long as it says."""
        entry = {"dtype": _NAMES[self.dtype], "shape": [rows, *self.shape], "data_offsets": [0, rows * self._row]}
        header = json.dumps({"states": entry}).encode()
        if len(header) > _HEADER:
            raise StoreError(f"a state of {len(self.shape)} axes needs a longer header than {_HEADER} bytes")
        _write_all(descriptor, struct.pack("<Q", _HEADER) + header.ljust(_HEADER), 0)
        os.ftruncate(descriptor, 8 + _HEADER + rows * self._row)


def index(rows: NDArray[np.int64]) -> slice | Tensor:
    """Rows as an index: a slice, which copies nothing, where they stand together in order."""
    first, n = int(rows[0]), len(rows)
    together = rows[-1] - first + 1 == n and (n < 3 or (np.diff(rows) == 1).all())
    return slice(first, first + n) if together else torch.from_numpy(rows)


def _bytes(data: Tensor) -> bytes:
    return data.reshape(len(data), -1).view(torch.uint8).numpy().tobytes()


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
