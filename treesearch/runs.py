"""A run is a folder.

    run.json              configuration, versions, seed, fingerprint, status; written atomically
    tree.bin              one block a wave: fixed-width records of new nodes, checksummed, written after its states
    states-*.safetensors  the states, in order of their slots
    events.jsonl          one line a wave, for people
    outputs/, README.md   what the command line adds: pictures and a card

`kill -9` at any moment loses at most the waves in flight: a block that is incomplete or whose checksum does not match
ends the log, is cut off on resume, and its work is done again with the same draws. No pickle anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treesearch.errors import StoreError, writing
from treesearch.states import ShardStates
from treesearch.tree import Tree

FORMAT = 1
_MAGIC = b"TREESRCH" + struct.pack("<I", FORMAT)
_BLOCK = struct.Struct("<4sIIIII")  # mark, wave, bytes of JSON, nodes, hits, CRC-32 of what follows
_MARK = b"WAVE"
_CHECKED = ("method", "seed", "prompts", "num_steps", "state_shape", "dtype", "fingerprint", "reward")
_REQUIRED = (*_CHECKED, "budget", "pilot", "options")
NODE = np.dtype(
    [
        ("task", "<i4"),
        ("parent", "<i4"),
        ("t", "<i2"),
        ("pad", "<i2"),
        ("slot", "<i4"),
        ("key", "<u8"),
        ("log_w", "<f8"),
        ("reward", "<f8"),
    ]
)
HIT = np.dtype([("task", "<i4"), ("leaf", "<i4")])


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


class Run:
    """An open run folder; one process at a time.

    Raises:
        StoreError: the folder holds a run already (create), holds none or another format (open), or is in use.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise StoreError("store is empty, expected a folder: name one, or leave store=None to keep nothing")
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        self.states: ShardStates | None = None
        self._log: Any = None
        self._events: Any = None
        self._lock = None

    @staticmethod
    def create(path: str | os.PathLike[str], config: dict[str, Any]) -> Run:
        """Start a run in a folder that holds none."""
        run = Run(path)
        try:
            json.dumps(config)
        except TypeError as error:
            raise StoreError(
                f"run.json cannot hold this search: {error}; prompts must be strings or plain data"
            ) from error
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the run folder {path}: {error.strerror}") from error
        run._acquire()
        if (run.path / "run.json").exists():
            run._release()
            raise StoreError(f"{path} holds a run already: resume it, or name another folder")
        run.config = {"format": FORMAT, "created": _now(), "status": "running"} | config
        with run._guard():
            (run.path / "tree.bin").write_bytes(_MAGIC)
            run._open_files()
            run.save()
        return run

    @staticmethod
    def open(path: str | os.PathLike[str]) -> tuple[Run, list[Block]]:
        """Go on with a run: its folder and the waves that it holds."""
        run = Run(path)
        run.config = read_config(path)
        run._acquire()
        try:
            with run._guard():
                blocks, end = [], len(_MAGIC)
                for block, end in read_blocks(run.path):  # noqa: B007 - the last end is used
                    blocks.append(block)
                lost = (run.path / "tree.bin").stat().st_size - end
                os.truncate(run.path / "tree.bin", end)
                run._open_files()
                if lost:
                    run._report_cut(len(blocks), lost)
        except StoreError:
            run._release()
            raise
        return run, blocks

    def open_states(self, shape: tuple[int, ...], dtype: torch.dtype, used: int) -> ShardStates:
        """The run's states, with `used` slots written."""
        self.states = ShardStates(self.path, shape, dtype, used)
        return self.states

    def write(self, block: Block) -> None:
        """Append a wave: its states first, then its block, then one line for people.

        Raises:
            StoreError: the disk is full or not writable; the waves before this one are safe.
        """
        meta = json.dumps(block.meta, allow_nan=False).encode()
        payload = meta + block.nodes.tobytes() + block.hits.tobytes()
        head = _BLOCK.pack(_MARK, block.wave, len(meta), len(block.nodes), len(block.hits), zlib.crc32(payload))
        with self._guard():
            if self.states is not None:
                self.states.sync()
            self._log.write(head + payload)
            self._log.flush()
            os.fdatasync(self._log.fileno())
        self.event(block.meta["history"])

    def event(self, record: dict[str, Any]) -> None:
        """One line of events.jsonl."""
        with self._guard():
            self._events.write(json.dumps(record) + "\n")
            self._events.flush()

    def save(self, **changes: Any) -> None:
        """Write run.json atomically."""
        self.config |= changes
        with self._guard():
            write_json(self.path / "run.json", self.config)

    def close(self, status: str) -> None:
        """Finish the files and let go of the folder."""
        if self._log is None:
            return
        try:
            self.save(status=status, closed=_now())
            with self._guard():
                if self.states is not None:
                    self.states.close()
        finally:
            self._log.close()
            with suppress(OSError):  # a line for people that found no room is not worth another error
                self._events.close()
            self._log = None
            self._release()

    def _report_cut(self, waves: int, lost: int) -> None:
        """Say that the end of the log was unusable: a kill leaves part of a block, more than that is damage."""
        text = f"{self.path}: whole up to wave {waves - 1}; {lost} bytes behind it are cut, their work is done again"
        logging.getLogger("treesearch").warning(text)
        self.event({"cut_bytes": lost, "waves_kept": waves})

    def _open_files(self) -> None:
        self._log = open(self.path / "tree.bin", "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        self._events = open(self.path / "events.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        self._lock = FileLock(self.path / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(f"{self.path} is in use by another process: wait for it, or stop it") from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _guard(self) -> AbstractContextManager[None]:
        return writing(self.path)


def status(path: str | os.PathLike[str], config: dict[str, Any]) -> str:
    """A run's status; one that says it is running while nobody holds its lock was killed."""
    if config["status"] != "running":
        return config["status"]
    from filelock import FileLock, Timeout

    try:
        with FileLock(Path(path) / "lock", timeout=0):
            return "killed"
    except Timeout:
        return "running"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """run.json of a folder.

    Raises:
        StoreError: there is none, it is damaged, or another version of the format wrote it.
    """
    file = Path(path) / "run.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} holds no run: there is no run.json in it") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} cannot be read: it is no JSON object")
    if config.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {config.get('format')}, this version reads format {FORMAT}: use its version"
        )
    if missing := [name for name in _REQUIRED if name not in config]:
        raise StoreError(
            f"{file} lacks {', '.join(map(repr, missing))}: it is damaged, put back the file as it was written"
        )
    return config


def read_blocks(path: Path) -> Iterator[tuple[Block, int]]:
    """Whole blocks of tree.bin in order, each with the position of its end; stops before a damaged one.

    Raises:
        StoreError: the file is missing or no tree log of this format.
    """
    try:
        data = memoryview((path / "tree.bin").read_bytes())
    except OSError as error:
        raise StoreError(f"{path} has no readable tree.bin: {error.strerror}") from error
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise StoreError(f"{path}/tree.bin is no tree log of format {FORMAT}")
    at, expected = len(_MAGIC), 0
    while at + _BLOCK.size <= len(data):
        mark, wave, text, nodes, hits, crc = _BLOCK.unpack_from(data, at)
        start = at + _BLOCK.size
        end = start + text + nodes * NODE.itemsize + hits * HIT.itemsize
        if (mark, wave) != (_MARK, expected) or end > len(data) or zlib.crc32(data[start:end]) != crc:
            return
        meta = json.loads(bytes(data[start : start + text]))
        rows = np.frombuffer(data, NODE, nodes, start + text)
        ended = np.frombuffer(data, HIT, hits, start + text + nodes * NODE.itemsize)
        at, expected = end, expected + 1
        yield Block(wave, meta, rows, ended), end


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    scratch = path.with_suffix(".tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
