"""tree.bin, the log of a run: a mark of its format, then one block a wave.

    block = mark, wave, sizes, CRC-32 | JSON (history, cost, states of the searches) | nodes | hits

Nodes and hits are records of fixed width. A last block that is incomplete is that of an interrupted wave; other damage
is an error that names the block. What blocks hold is checked in `treesearch.runs.checks`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from treesearch.budget import Cost
from treesearch.core.tree import Tree
from treesearch.errors import StoreError
from treesearch.runs import files, schema
from treesearch.runs.schema import maybe, number, plain, record, several, text, whole

FORMAT = 3
TASKS = 2**16  # that a record can tell apart
MAGIC = b"TREESRCH" + struct.pack("<I", FORMAT)
BLOCK = struct.Struct("<4sIIIII")  # mark, wave, bytes of JSON, nodes, hits, CRC-32 of the rest of the block
MARK = b"WAVE"
CRC = 4  # bytes at the end of a block's head
_META_BYTES = 2**26
_SEARCHED = 2**28  # bytes behind a damaged block in which intact ones are looked for
NODE = np.dtype(
    [
        ("task", "<u2"),
        ("t", "<i2"),
        ("parent", "<i4"),
        ("slot", "<i4"),
        ("sum", "<u4"),  # CRC-32 of the state, 0 where none is kept
        ("key", "<u8"),
        ("log_w", "<f8"),
        ("reward", "<f8"),
    ]
)
HIT = np.dtype([("task", "<i4"), ("leaf", "<i4")])
_MOST = sys.float_info.max  # what JSON holds is finite
COST = record({name: number(0.0, _MOST) if name.endswith("seconds") else whole() for name in asdict(Cost())})
_BLOCK_META = record(
    {
        "run": text(64),
        "history": record(
            {
                "wave": whole(),
                "nfe": whole(),
                "reward_calls": whole(),
                "seconds": number(0.0, _MOST),
                "model_seconds": number(0.0, _MOST),
                "reward_seconds": number(0.0, _MOST),
                "best_reward": maybe(number(-_MOST, _MOST)),
                "ess": number(0.0, _MOST),
                "nodes": whole(),
            },
            rest=plain(4),
        ),
        "cost": COST,
        "searches": several(record({}, rest=plain(5)), 1, TASKS),
        "slots": whole(0, 2**31),
    }
)


@dataclass
class Block:
    """What one wave left behind.

    Args:
        wave: its number.
        meta: history record, cost, the searches' states after asking it, slots used.
        nodes: records of `NODE`, by task, in order of creation.
        hits: records of `HIT`, iterations that ended at an existing leaf.
    """

    wave: int
    meta: dict[str, Any]
    nodes: NDArray[Any]
    hits: NDArray[Any] = field(default_factory=lambda: np.empty(0, HIT))


def records(task: int, tree: Tree, start: int, stop: int) -> NDArray[Any]:
    """Records of the nodes start..stop of a tree."""
    out = np.zeros(stop - start, NODE)
    out["task"] = task
    for name in ("parent", "t", "slot", "key", "log_w", "reward"):
        out[name] = getattr(tree, name)[start:stop]
    return out


def grow(tree: Tree, nodes: NDArray[Any]) -> None:
    """Append recorded nodes of one task to its tree."""
    ids = tree.append(nodes["parent"], nodes["t"], nodes["key"])
    for name in ("slot", "log_w", "reward"):
        getattr(tree, name)[ids] = nodes[name]


def packed(run: str, block: Block) -> bytes:
    """A block as bytes, head and checksum first.

    Args:
        run: id of the run.
    """
    meta = json.dumps({"run": run} | block.meta, allow_nan=False).encode()
    payload = meta + block.nodes.tobytes() + block.hits.tobytes()
    head = BLOCK.pack(MARK, block.wave, len(meta), len(block.nodes), len(block.hits), 0)[:-CRC]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def read_blocks(path: Path, waves: int = 0, *, at: int = len(MAGIC), wave: int = 0) -> Iterator[tuple[Block, int]]:
    """Whole blocks of tree.bin in order, each with the position of its end; an interrupted last one is left out.

    Args:
        waves: how many there are at least, if that is known.
        at, wave: position and number of the first one wanted, where those before it are read.

    Raises:
        StoreError: the file is missing, no tree log of this format, or damaged before its last block.
    """
    try:
        opened = files.reading(path / "tree.bin")
    except OSError as error:
        raise StoreError(f"{path} has no readable tree.bin: {error.strerror}") from error
    with opened as file, _unreadable(path):
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            raise StoreError(f"{path}/tree.bin is no tree log of format {FORMAT}")
        while at < size:
            found = _read_block(file, at, size, wave)
            if isinstance(found, str):
                if found != _CUT or size > at + BLOCK.size:
                    _check_last(path, file, at, size, wave, waves, found)
                return
            meta, nodes, hits, end = found
            where = f"{path}/tree.bin: block {wave} (byte {at})"
            try:
                checked = schema.parse(meta, "its JSON")
                _BLOCK_META(checked, "its JSON")
            except schema.Invalid as error:
                raise StoreError(f"{where}: {error}") from error
            at, wave = end, wave + 1
            yield Block(wave - 1, checked, np.frombuffer(nodes, NODE), np.frombuffer(hits, HIT)), end


_CUT = "is incomplete"


def _read_block(file: BinaryIO, at: int, size: int, wave: int) -> tuple[bytes, memoryview, memoryview, int] | str:
    """JSON, nodes, hits and end of the block at a position; a string says why there is none."""
    file.seek(at)
    head = read(file, min(BLOCK.size, size - at))
    if len(head) < BLOCK.size:
        return _CUT
    mark, number, text, nodes, hits, crc = BLOCK.unpack(head)
    length = text + nodes * NODE.itemsize + hits * HIT.itemsize
    if mark != MARK or number != wave or not 0 < text <= _META_BYTES:
        return "does not begin as a block does"
    if at + BLOCK.size + length > size:
        return _CUT
    data = memoryview(read(file, length))
    if len(data) < length:
        return _CUT
    if zlib.crc32(data, zlib.crc32(head[:-CRC])) != crc:
        return "does not match its checksum" + ("" if at + BLOCK.size + length == size else ", nor is it the last one")
    cut = text + nodes * NODE.itemsize
    return bytes(data[:text]), data[text:cut], data[cut:], at + BLOCK.size + length


def _check_last(path: Path, file: BinaryIO, at: int, size: int, wave: int, waves: int, why: str) -> None:
    """Whether what does not read as a block can be an interrupted last one.

    Raises:
        StoreError: it is damage: blocks follow, or more than one is lost.
    """
    follows = _next_block(file, at, size, wave)
    torn = why == _CUT or (wave + 1 >= waves and "nor" not in why)
    if follows is None and torn and size - at <= _SEARCHED:
        return
    behind = "" if follows is None else f"; further blocks follow at byte {follows}"
    raise StoreError(
        f"{path}/tree.bin is damaged: block {wave} (byte {at}) {why}{behind}. Put back a copy of the file; or keep "
        f"one, cut this one to {at} bytes, and resume: waves {wave} and later are done again"
    )


def _next_block(file: BinaryIO, at: int, size: int, wave: int) -> int | None:
    """Position of the next intact block behind a damaged one; None where there is none.

    A file that is made of beginnings of blocks is not searched to its end: the last beginning looked at is returned.
    """
    file.seek(at)
    data, budget = read(file, min(size - at, _SEARCHED)), 4 * _SEARCHED
    found = data.find(MARK)
    while found >= 0:
        budget -= 2**12
        if budget < 0:
            return at + found
        if found + BLOCK.size <= len(data):
            _, number, text, nodes, hits, crc = BLOCK.unpack_from(data, found)
            length = text + nodes * NODE.itemsize + hits * HIT.itemsize
            start = found + BLOCK.size
            if number >= wave and text > 0 and start + length <= len(data):
                budget -= length
                head = data[found : start - CRC]
                if zlib.crc32(memoryview(data)[start : start + length], zlib.crc32(head)) == crc:
                    return at + found
        found = data.find(MARK, found + 1)
    return None


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Turns an OSError of reading into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}/tree.bin cannot be read: {error.strerror}") from error


def read(file: BinaryIO | io.BufferedReader, count: int) -> bytes:
    """Up to `count` bytes, fewer only at the end of the file."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
