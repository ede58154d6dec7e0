"""States on disk: rolling safetensors shards, lossless, each state with a checksum.

A shard is a valid safetensors file at every moment: its header announces room for about 64 MB of states and the file
is extended to that length at once (sparse), then rows are written in place. Closing it cuts header and file to the
rows that it holds. Slot s is row s % rows_per_shard of shard s // rows_per_shard. The checksum of a state (CRC-32)
lies with its node, not with the state: one that does not match is damaged, or another run's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.core.tree import NONE
from treesearch.engine.states import LostStates, MemoryStates
from treesearch.errors import GO_ON, StoreError, writing
from treesearch.runs import files
from treesearch.runs.dtypes import DTYPES

Ids = NDArray[np.int64]
log = logging.getLogger("treesearch")

SHARD_BYTES = 64 * 2**20
_NEAR = 2**16  # bytes between rows that are read together with what lies between them
_HEADER = 512  # bytes of JSON, padded with blanks so that it can be rewritten in place


class ShardStates:
    """States in `states-00000.safetensors`, ... of a folder, each verified when it is read.

    Args:
        folder: the run folder.
        shape, dtype: of one state.
        used: slots already written (when a run goes on); later rows overwrite what lies behind them.
        shard_bytes: size of a shard.
        run: the run's id, kept in every shard.
        look: nothing will be put.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        used: int = 0,
        shard_bytes: int = SHARD_BYTES,
        *,
        run: str = "",
        look: bool = False,
    ) -> None:
        self.folder, self.shape, self.dtype, self.used, self.run = folder, shape, dtype, used, run
        self._row = max(1, int(np.prod(shape)) * dtype.itemsize)
        self.rows = max(1, shard_bytes // self._row)
        self._sums = np.zeros(1024, np.uint32)
        self._own: set[int] = set()  # shards known to be of this run
        self._open: tuple[int, BinaryIO] | None = None
        self._kept: tuple[int, MemoryStates] | None = None  # from this slot on, once the folder is gone
        shard, row = divmod(used, self.rows)
        if row and not look and not self._holds(shard, row):
            self.used = (shard + 1) * self.rows  # what is lost stays lost: no shard is filled up with zeros

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"states-{shard:05d}.safetensors"

    @property
    def there(self) -> bool:
        """Whether the shard that is written to is still in its place."""
        return self._kept is None and (self._open is None or files.same(self.path(self._open[0]), self._open[1]))

    def put(self, x: Tensor) -> NDArray[np.int64]:
        data = _bytes(x.detach().to("cpu", self.dtype).contiguous())
        slots = np.arange(self.used, self.used + len(x))
        self.recall(slots, _checksums(data))
        if self._kept is None and not self.folder.is_dir():
            self.leave()
        if self._kept is not None:
            self.used += len(x)
            return self._kept[0] + self._kept[1].put(x)
        at = 0
        while at < len(x):
            shard, row = divmod(self.used, self.rows)
            n = min(len(x) - at, self.rows - row)
            with writing(self.folder, GO_ON):
                files.write_at(
                    self._file(shard, row), data[at : at + n].reshape(-1).data, 8 + _HEADER + row * self._row
                )
            self.used, at = self.used + n, at + n
        return slots

    def get(self, slots: NDArray[Any]) -> Tensor:
        """The rows of the given slots, in order.

        Raises:
            LostStates: some are missing or damaged.
        """
        slots = np.asarray(slots, np.int64)
        if not len(slots):
            return torch.empty((0, *self.shape), dtype=self.dtype, device="cpu")
        out, shard = np.zeros((len(slots), self._row), np.uint8), slots // self.rows
        bad = (slots < 0) | (slots >= len(self._sums))
        if self._kept is not None and (late := slots >= self._kept[0]).any():
            out[late], shard[late] = _bytes(self._kept[1].get(slots[late] - self._kept[0])), NONE
        for number in np.unique(shard[~bad & (shard != NONE)]):
            at = np.flatnonzero((shard == number) & ~bad)
            bad[at] = ~self._read(int(number), slots[at] % self.rows, out, at)
        bad[~bad] = _checksums(out[~bad]) != self._sums[slots[~bad]]
        if bad.any():
            raise self._lost(slots[bad], shard[bad])
        return torch.from_numpy(out).view(self.dtype).reshape(len(slots), *self.shape)

    def _lost(self, slots: NDArray[np.int64], shards: NDArray[np.int64]) -> LostStates:
        """What is lost of the shards that lost states were found in, so that all of it is known at once."""
        lost = [slots]
        for number in np.unique(shards[shards >= 0]):
            first = int(number) * self.rows
            rows = np.flatnonzero(self._sums[first : first + self.rows])  # those that a record knows of
            out = np.zeros((len(rows), self._row), np.uint8)
            there = self._read(int(number), rows, out, np.arange(len(rows)))
            lost.append(first + rows[~there | (_checksums(out) != self._sums[first + rows])])
        return LostStates(self.folder, self.path(int(shards[0])).name, np.unique(np.concatenate(lost)))

    def recall(self, slots: NDArray[Any], sums: NDArray[np.uint32]) -> None:
        """Checksums of states, as their nodes' records have them."""
        if len(slots) and (most := int(slots.max()) + 1) > len(self._sums):
            grown = np.zeros(max(most, 2 * len(self._sums)), np.uint32)
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        self._sums[slots] = sums

    def sums(self, slots: NDArray[Any]) -> NDArray[np.uint32]:
        """Checksums of the states in the given slots, 0 for none."""
        return np.where(slots == NONE, 0, self._sums[slots]).astype(np.uint32)

    def drop(self, slots: NDArray[Any]) -> None:
        """Files only grow: what was written stays."""
        del slots

    def sync(self) -> None:
        """Force written rows to the disk."""
        if self._open is not None:
            files.sync(self._open[1])

    def leave(self) -> None:
        """The folder is gone: what is put from now on stays in memory."""
        self._kept = self._kept or (self.used, MemoryStates(self.shape, self.dtype))
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        """Cut the last shard to the rows it holds."""
        if self._open is not None:
            shard, file = self._open
            self._open = None
            with writing(self.folder, GO_ON), closing(file):
                self._announce(file, self.used - shard * self.rows)

    def _read(self, shard: int, rows: NDArray[np.int64], out: NDArray[np.uint8], at: Ids) -> NDArray[np.bool_]:
        """Rows of a shard into out[at], and which of them are there; neighbours are read together."""
        there = np.zeros(len(rows), np.bool_)
        try:
            with self._reading(shard) as file:
                order = np.argsort(rows, kind="stable")
                near = max(1, _NEAR // self._row)
                for part in np.split(order, np.flatnonzero(np.diff(rows[order]) > near) + 1):
                    first, last = int(rows[part[0]]), int(rows[part[-1]])
                    file.seek(8 + _HEADER + first * self._row)
                    data = np.frombuffer(file.read((last + 1 - first) * self._row), np.uint8)
                    whole = data[: len(data) // self._row * self._row].reshape(-1, self._row)
                    part = part[rows[part] - first < len(whole)]
                    out[at[part]], there[part] = whole[rows[part] - first], True
        except OSError as error:
            log.warning("%s cannot be read: %s", self.path(shard), error.strerror)
        return there

    @contextmanager
    def _reading(self, shard: int) -> Iterator[BinaryIO]:
        """A shard of this run to read from: the one that is written to, or its file.

        Raises:
            OSError, StoreError: there is none, or it is of another run.
        """
        if self._open is not None and self._open[0] == shard:
            yield self._open[1]
            return
        with files.reading(self.path(shard)) as file:
            self._check_own(shard, file)
            yield file

    def _check_own(self, shard: int, file: BinaryIO) -> None:
        """Raises:
        StoreError: the shard says that it is another run's; a header that cannot be read says nothing.
        """
        if shard in self._own:
            return
        try:
            found = json.loads(file.read(8 + _HEADER)[8:])["__metadata__"]["run"]
        except (ValueError, LookupError, TypeError, RecursionError):
            found = self.run
        if found != self.run:
            raise StoreError(f"{self.path(shard)} is of another run ({found!r}, not {self.run!r}): put back its own")
        self._own.add(shard)

    def _holds(self, shard: int, rows: int) -> bool:
        """Whether a shard is there with so many rows, to be gone on with."""
        path = self.path(shard)
        try:
            with files.reading(path) as file:
                self._check_own(shard, file)
                return not path.is_symlink() and os.fstat(file.fileno()).st_size >= 8 + _HEADER + rows * self._row
        except OSError:
            return False

    def _file(self, shard: int, row: int) -> BinaryIO:
        """The shard to write to; one that begins takes the place of whatever has its name."""
        if self._open is not None and self._open[0] == shard:
            return self._open[1]
        if self._open is not None:
            with closing(self._open[1]):
                self.sync()
            self._open = None
        file = files.in_place(self.path(shard), new=row == 0)
        self._open = (shard, file)
        self._announce(file, self.rows)
        self._own.add(shard)
        return file

    def _announce(self, file: BinaryIO, rows: int) -> None:
        """Write the header for `rows` states and make the file as long as it says."""
        entry = {"dtype": DTYPES[str(self.dtype)], "shape": [rows, *self.shape], "data_offsets": [0, rows * self._row]}
        header = json.dumps({"__metadata__": {"run": self.run}, "states": entry}).encode()
        if len(header) > _HEADER:
            raise StoreError(f"a state of {len(self.shape)} axes needs a longer header than {_HEADER} bytes")
        files.write_at(file, struct.pack("<Q", _HEADER) + header.ljust(_HEADER), 0)
        file.truncate(8 + _HEADER + rows * self._row)


def _bytes(data: Tensor) -> NDArray[np.uint8]:
    """Rows (n, *state) as bytes (n, row)."""
    return data.reshape(len(data), math.prod(data.shape[1:])).view(torch.uint8).numpy()


def _checksums(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 of each row of bytes."""
    n, size = rows.shape
    view = rows.reshape(-1).data
    return np.fromiter((zlib.crc32(view[i : i + size]) for i in range(0, n * size, size)), np.uint32, n)
