"""A run is a folder.

    run.json              configuration, versions, seed, fingerprint, status; replaced atomically
    tree.bin              one block a wave: fixed-width records of new nodes, checksummed, written after its states
    states-*.safetensors  the states, in order of their slots; a node's record holds the checksum of its state
    events.jsonl          one line a wave, for people
    command.json          what the command line was asked, where it made the run
    outputs/, README.md   what the command line adds: pictures and a card

`kill -9` at any moment loses at most the waves in flight: a last block that is incomplete is cut off on resume, after
a copy of it is made, and its work is done again with the same draws. Any other damage is an error that names the block.
A folder may come from anybody: nothing in it is believed before it is checked, nothing is written through a link, and
looking at it changes nothing. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import reprlib
import secrets
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from treesearch import host
from treesearch.backends.base import STEPS
from treesearch.budget import Budget, Cost
from treesearch.core.tree import NONE, Tree
from treesearch.errors import StoreError, writing
from treesearch.runs import files, schema
from treesearch.runs.files import write_json as write_json
from treesearch.runs.schema import flag, maybe, number, one_of, plain, record, several, text, whole
from treesearch.runs.shards import DTYPES, ShardStates

FORMAT = 2
TASKS = 2**16  # that a record can tell apart
_MAGIC = b"TREESRCH" + struct.pack("<I", FORMAT)
_BLOCK = struct.Struct("<4sIIIII")  # mark, wave, bytes of JSON, nodes, hits, CRC-32 of the rest of the block
_MARK = b"WAVE"
_CRC = 4  # bytes at the end of a block's head
_APART = ("status", "sum")  # of run.json: not in its checksum; a status is one of few words, which no flipped bit makes
_CONFIG_BYTES, _META_BYTES, _STATE_BYTES = 2**26, 2**26, 2**40
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
log = logging.getLogger("treesearch")

_MOST = sys.float_info.max  # what JSON holds is finite
_COST = record({name: number(0.0, _MOST) if name == "seconds" else whole() for name in asdict(Cost())})
_LIMIT = maybe(whole(1))
CONFIG = record(
    {
        "format": whole(),
        "id": text(64),
        "created": text(64),
        "status": one_of("running", "finished", "interrupted", "stopped"),
        "method": record({"name": text(200)}, rest=plain(3)),
        "seed": whole(0, 2**64 - 1),
        "prompts": maybe(several(plain(16), 1, TASKS)),
        "num_steps": whole(1, STEPS),
        "state_shape": several(whole(0, 2**31), 0, 16),
        "dtype": one_of(*map(str, DTYPES)),
        "fingerprint": plain(16),
        "deterministic": several(whole(0, STEPS), 0, STEPS + 1),
        "previews": flag,
        "reward": text(),
        "reward_settings": plain(16),
        "kernel": text(),
        "budget": record(
            {"nfe": _LIMIT, "seconds": maybe(number(0.0)), "reward_calls": _LIMIT, "iterations": _LIMIT},
        ),
        "pilot": record(
            {
                "rollouts": whole(),
                "target": number(0.0, 1.0),
                "lam": maybe(number()),
                "kl": maybe(number()),
                "cost": _COST,
            }
        ),
        "options": record(
            {"batch_size": whole(1), "keep_states": one_of("all", "frontier", "none"), "batch_invariant": flag},
            rest=plain(4),
        ),
        "versions": record({"treesearch": text(200)}, rest=text(200)),
        "sum": whole(0, 2**32 - 1),  # CRC-32, see `stamped`
    },
    {
        "departs": text(),
        "closed": text(64),
        "out_of_time": flag,
        "memory": whole(),
        "remarks": several(several(text(), 0, 1000), 1, TASKS),
        "waves": whole(),  # at least so many are in tree.bin
    },
    rest=plain(16),
)
_BLOCK_META = record(
    {
        "run": text(64),
        "history": record(
            {
                "wave": whole(),
                "nfe": whole(),
                "reward_calls": whole(),
                "seconds": number(0.0, _MOST),
                "best_reward": maybe(number(-_MOST, _MOST)),
                "ess": number(0.0, _MOST),
                "nodes": whole(),
            },
            rest=plain(4),
        ),
        "cost": _COST,
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


class Run:
    """An open run folder; one process at a time writes to it.

    Raises:
        StoreError: the folder holds a run already (create), holds none or another format (open), or is in use.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise StoreError("store is empty, expected a folder: name one, or leave store=None to keep nothing")
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        self.states: ShardStates | None = None
        self._blocks: list[Block] = []
        self._waves, self._end = 0, len(_MAGIC)
        self._log: BinaryIO | None = None
        self._events: BinaryIO | None = None
        self._lock: _Lock | None = None

    @staticmethod
    def create(path: str | os.PathLike[str], config: dict[str, Any], beside: Mapping[str, Any] | None = None) -> Run:
        """Start a run in a folder that holds none, or one without a single wave.

        Args:
            config: what run.json holds.
            beside: further JSON documents by file name; they are there before run.json is.
        """
        run = Run(path)
        run.config = _document(config)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the run folder {path}: {error.strerror}") from error
        run._lock = _Lock(run.path)
        with ExitStack() as undo:
            undo.callback(run._let_go)
            with run._guard():
                check_vacant(path)
                for stale in run.path.glob("states-*.safetensors"):  # of a run that recorded no wave
                    stale.unlink()
                run._open_files(new=True)
                for name, value in (beside or {}).items():
                    write_json(run.path / name, value)
                run.save()
            undo.pop_all()
        return run

    @staticmethod
    def open(path: str | os.PathLike[str], *, look: bool = False) -> tuple[Run, list[Block]]:
        """Go on with a run: its folder and the waves that it holds.

        Args:
            look: read only: no lock, and nothing in the folder changes; `write` and `save` are not to be called.
        """
        run = Run(path)
        run.config = read_config(path)
        with ExitStack() as undo:
            undo.callback(run._let_go)
            if not look:
                run._lock = _Lock(run.path)
                run.config = read_config(path)  # another process may have closed it since
            run._blocks, run._end = read_log(run.path, run.config)
            run._waves = len(run._blocks)
            if not look:
                with run._guard():
                    run._open_files()
            undo.pop_all()
        return run, run._blocks

    def go_on(self, **changes: Any) -> None:
        """Begin to write to an opened run: what is left of an interrupted wave is cut off, and run.json renewed."""
        with self._guard():
            self._cut(self._end)
        self.save(waves=self._waves, **changes)

    def open_states(self, shape: tuple[int, ...], dtype: torch.dtype, used: int) -> ShardStates:
        """The run's states, with `used` slots written."""
        nodes = [b.nodes[b.nodes["slot"] != NONE] for b in self._blocks]
        with self._guard():
            self.states = ShardStates(self.path, shape, dtype, used, run=self.config["id"], look=self._log is None)
        for some in nodes:
            self.states.recall(some["slot"], some["sum"])
        return self.states

    def write(self, block: Block) -> None:
        """Append a wave: its states first, then its block, then one line for people.

        Raises:
            StoreError: the disk is full or not writable; the waves before this one are safe.
        """
        assert self._log is not None
        self._check_cost(block.meta["cost"])
        if self.states is not None:
            block.nodes["sum"] = self.states.sums(block.nodes["slot"])
        meta = json.dumps({"run": self.config["id"]} | block.meta, allow_nan=False).encode()
        payload = meta + block.nodes.tobytes() + block.hits.tobytes()
        head = _BLOCK.pack(_MARK, block.wave, len(meta), len(block.nodes), len(block.hits), 0)[:-_CRC]
        crc = zlib.crc32(payload, zlib.crc32(head))
        with self._guard():
            if self.states is not None:
                self.states.sync()
            files.write_at(self._log, head + struct.pack("<I", crc) + payload, self._log.seek(0, os.SEEK_END))
            files.sync(self._log)
        self._waves += 1
        self.event(block.meta["history"])

    def _check_cost(self, cost: dict[str, Any]) -> None:
        """Raises:
        StoreError: numbers that would not be read again, in a run that was forged near their limits.
        """
        try:
            _COST(cost, "its cost")
        except schema.Invalid as error:
            raise StoreError(f"{self.path}: the next wave cannot be recorded: {error}") from error

    def event(self, record: dict[str, Any]) -> None:
        """One line of events.jsonl."""
        assert self._events is not None
        with self._guard():
            files.write_at(self._events, (json.dumps(record) + "\n").encode(), self._events.seek(0, os.SEEK_END))

    def save(self, **changes: Any) -> None:
        """Replace run.json."""
        self.config = stamped(self.config | changes)
        with self._guard():
            write_json(self.path / "run.json", self.config)

    @property
    def there(self) -> bool:
        """Whether the folder still has the files that are written to."""
        states = self.states is None or self.states.there
        return self._log is not None and files.same(self.path / "tree.bin", self._log) and states

    def close(self, status: str) -> None:
        """Finish the files and let go of the folder, each whatever became of the others."""
        if self._log is None:
            return
        with ExitStack() as ending:
            ending.callback(self._let_go)
            if self.states is not None:
                ending.callback(self.states.close)
            if self.there:
                self.save(status=status, closed=_now(), waves=self._waves)

    def leave(self) -> None:
        """Let go of a folder that is not there any more."""
        if self.states is not None:
            self.states.leave()
        self._let_go()

    def _let_go(self) -> None:
        """Close the files and give the lock back."""
        with ExitStack() as ending:
            for held in (self._lock, self._events, self._log):
                if held is not None:
                    ending.callback(held.close)
            self._lock = self._events = self._log = None

    def _cut(self, end: int) -> None:
        """Keep a copy of an interrupted block at the end of the log, cut it off, and say so."""
        assert self._log is not None
        lost = self._log.seek(0, os.SEEK_END) - end
        if lost <= 0:
            return
        self._log.seek(end)
        copy = self.path / f"tree-cut-{end}-{secrets.token_hex(3)}.bin"
        with contextlib.closing(files.in_place(copy, new=True)) as kept:
            files.write_at(kept, _read(self._log, lost), 0)
            files.sync(kept)
        self._log.truncate(end)
        log.warning(
            "%s: whole up to wave %d; the %d bytes of an interrupted one behind it are cut (a copy is %s), its work is "
            "done again",
            self.path, self._waves - 1, lost, copy.name,
        )  # fmt: skip
        self.event({"cut_bytes": lost, "waves_kept": self._waves, "copy": copy.name})

    def _open_files(self, *, new: bool = False) -> None:
        self._log = files.in_place(self.path / "tree.bin", new=new)
        self._events = files.in_place(self.path / "events.jsonl", new=new)
        if new:
            files.write_at(self._log, _MAGIC, 0)

    def _guard(self) -> AbstractContextManager[None]:
        return writing(self.path)


class _Lock:
    """The lock of a run folder, held by this process whichever thread lets go of it.

    Raises:
        StoreError: it is held already, or cannot be had here.
    """

    _held: ClassVar[set[str]] = set()
    _mutex = threading.Lock()

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self._name = os.path.realpath(path)
        self._lock = FileLock(path / "lock", thread_local=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where the system has no locks, a marker file takes their place
                self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(f"{path} is in use by {self._holder(path / 'lock')}") from error
        except (OSError, NotImplementedError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise StoreError(
                f"cannot lock {path}: {why}; a run is written where locks work and files may change: use a folder on "
                "a local disk, or copy the run to one"
            ) from error
        with self._mutex:
            self._held.add(self._name)

    def close(self) -> None:
        """Let go."""
        with self._mutex:
            self._held.discard(self._name)
        self._lock.release()

    def _holder(self, file: Path) -> str:
        """Who has it, and how to get it back."""
        with self._mutex:
            if self._name in self._held:
                return (
                    "this process: a search or stream of it is still open; let the stream run to its end, or call its "
                    "close()"
                )
        try:
            with files.reading(file, 1024) as marker:
                pid, machine, *_ = marker.read().decode().split("\n")
        except (OSError, ValueError):
            return "another process: wait for it, or stop it"
        return f"process {pid} of {machine}: wait for it, or stop it; if it is gone, remove {file}"


def held(path: Path) -> bool | None:
    """Whether somebody has a folder's lock, asked without writing; None where that cannot be known."""
    try:
        with files.reading(path / "lock") as file:
            return host.locked(file)
    except FileNotFoundError:
        return False
    except OSError:
        return None


def status(path: str | os.PathLike[str], config: dict[str, Any]) -> str:
    """A run's status; one that says it is running while nobody holds its lock was killed."""
    if config["status"] != "running":
        return config["status"]
    return {True: "running", False: "killed", None: "running or killed"}[held(Path(path))]


def check_vacant(path: str | os.PathLike[str]) -> None:
    """Whether a run may begin in a folder: one that failed before its first wave may be started over.

    Raises:
        StoreError: it holds a run, or what is left of one.
    """
    file, tree = Path(path) / "run.json", Path(path) / "tree.bin"
    size = tree.lstat().st_size if os.path.lexists(tree) else 0
    if not os.path.lexists(file):
        if size > len(_MAGIC):
            raise StoreError(f"{path} holds a tree.bin without its run.json: put that back, or name another folder")
        return
    try:
        begun = read_config(path).get("waves", 0) > 0
    except StoreError:
        begun = True
    if begun or size != len(_MAGIC):
        raise StoreError(f"{path} holds a run already: resume it, or name another folder")


def _document(config: dict[str, Any]) -> dict[str, Any]:
    """A new run's run.json, as it will be read again.

    Raises:
        StoreError: it could not be.
    """
    config = {"format": FORMAT, "id": secrets.token_hex(8), "created": _now(), "status": "running", "waves": 0} | config
    try:
        written = json.dumps(config)
        config = stamped(schema.parse(written.encode(), "run.json"))
        CONFIG(config, "run.json")
        if len(written) > _CONFIG_BYTES // 2:
            raise ValueError(f"it would have {len(written)} bytes: split the prompts over several runs")
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"run.json cannot hold this search: {error}; prompts must be strings or plain data") from error
    return config


def stamped(config: dict[str, Any]) -> dict[str, Any]:
    """run.json with the checksum of all that it says, but for its status."""
    told = {name: value for name, value in config.items() if name not in _APART}
    return config | {"sum": zlib.crc32(json.dumps(told).encode())}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """run.json of a folder, checked.

    Raises:
        StoreError: there is none, it is damaged, or another version of the format wrote it.
    """
    file = Path(path) / "run.json"
    try:
        with files.reading(file, _CONFIG_BYTES) as opened:
            config = schema.parse(opened.read(), os.fspath(file))
    except FileNotFoundError as error:
        raise StoreError(f"{path} holds no run: there is no run.json in it") from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    except schema.Invalid as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} cannot be read: it is no JSON object")
    _check_format(path, config)
    try:
        CONFIG(config, "run.json")
        Budget(**config["budget"])
        size = np.dtype("u8").itemsize
        for length in config["state_shape"]:
            size *= length
        if size > _STATE_BYTES:
            raise schema.refused(config["state_shape"], "run.json.state_shape", f"states of up to {_STATE_BYTES} bytes")
        if stamped(config)["sum"] != config["sum"]:
            raise schema.Invalid("it does not match its checksum")
    except ValueError as error:
        raise StoreError(
            f"{file}: {error}: it is damaged, edited or of another version: put back the file as it was written"
        ) from error
    return config


def _check_format(path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Raises:
    StoreError: another format; which version can read it.
    """
    if (found := config.get("format")) == FORMAT:
        return
    versions = config.get("versions")
    by = versions.get("treesearch") if isinstance(versions, dict) else None
    wrote = f" (treesearch {by[:40]})" if isinstance(by, str) else ""
    raise StoreError(
        f"{path} has format {reprlib.repr(found)}{wrote}, this version reads format {FORMAT}: use the version that "
        "wrote it"
    )


def read_log(path: Path, config: dict[str, Any]) -> tuple[list[Block], int]:
    """The whole blocks of a run's tree.bin, checked against its run.json, and where they end.

    Raises:
        StoreError: the log is damaged before its last block, belongs to another run, or holds what no search writes.
    """
    waves, blocks, end = config.get("waves", 0), [], len(_MAGIC)
    try:
        for block, end in read_blocks(path, waves):  # noqa: B007 - the last end is used
            blocks.append(block)
        _check_blocks(path, config, blocks)
    except MemoryError as error:
        raise StoreError(f"{path}/tree.bin does not fit into memory") from error
    if len(blocks) < waves:
        log.warning(
            "%s is damaged: tree.bin ends after %d waves (byte %d) of at least %d; the others are lost, `resume` does "
            "their work again",
            path, len(blocks), end, waves,
        )  # fmt: skip
    return blocks, end


def read_blocks(path: Path, waves: int = 0) -> Iterator[tuple[Block, int]]:
    """Whole blocks of tree.bin in order, each with the position of its end; an interrupted last one is left out.

    Args:
        waves: how many there are at least, if that is known.

    Raises:
        StoreError: the file is missing, no tree log of this format, or damaged before its last block.
    """
    try:
        opened = files.reading(path / "tree.bin")
    except OSError as error:
        raise StoreError(f"{path} has no readable tree.bin: {error.strerror}") from error
    with opened as file, _unreadable(path):
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_MAGIC)) != _MAGIC:
            raise StoreError(f"{path}/tree.bin is no tree log of format {FORMAT}")
        at, wave = len(_MAGIC), 0
        while at < size:
            found = _read_block(file, at, size, wave)
            if isinstance(found, str):
                if found != _CUT or size > at + _BLOCK.size:
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
    head = _read(file, min(_BLOCK.size, size - at))
    if len(head) < _BLOCK.size:
        return _CUT
    mark, number, text, nodes, hits, crc = _BLOCK.unpack(head)
    length = text + nodes * NODE.itemsize + hits * HIT.itemsize
    if mark != _MARK or number != wave or not 0 < text <= _META_BYTES:
        return "does not begin as a block does"
    if at + _BLOCK.size + length > size:
        return _CUT
    data = memoryview(_read(file, length))
    if len(data) < length:
        return _CUT
    if zlib.crc32(data, zlib.crc32(head[:-_CRC])) != crc:
        return "does not match its checksum" + ("" if at + _BLOCK.size + length == size else ", nor is it the last one")
    cut = text + nodes * NODE.itemsize
    return bytes(data[:text]), data[text:cut], data[cut:], at + _BLOCK.size + length


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
    data, budget = _read(file, min(size - at, _SEARCHED)), 4 * _SEARCHED
    found = data.find(_MARK)
    while found >= 0:
        budget -= 2**12
        if budget < 0:
            return at + found
        if found + _BLOCK.size <= len(data):
            _, number, text, nodes, hits, crc = _BLOCK.unpack_from(data, found)
            length = text + nodes * NODE.itemsize + hits * HIT.itemsize
            start = found + _BLOCK.size
            if number >= wave and text > 0 and start + length <= len(data):
                budget -= length
                head = data[found : start - _CRC]
                if zlib.crc32(memoryview(data)[start : start + length], zlib.crc32(head)) == crc:
                    return at + found
        found = data.find(_MARK, found + 1)
    return None


def _check_blocks(path: Path, config: dict[str, Any], blocks: list[Block]) -> None:
    """What blocks hold, beside one another and beside run.json.

    Raises:
        StoreError: they belong to another run, or hold what no search writes; the message names block and field.
    """
    tasks, total, slots, ends = len(config["prompts"] or [None]), 0, 0, []
    for block in blocks:
        total += len(block.nodes)
        ends.append(total)
        slots = max(slots, int(block.nodes["slot"].max(initial=NONE)) + 1)
        meta, history = block.meta, block.meta["history"]
        if meta["run"] != config["id"]:
            raise StoreError(
                f"{path}: tree.bin and run.json belong to two runs: block {block.wave} is of run {meta['run']!r}, "
                f"run.json of {config['id']!r}"
            )
        for name, got, want in (
            ("history.wave", history["wave"], block.wave),
            ("history.nodes", history["nodes"], total + tasks),
            ("searches", len(meta["searches"]), tasks),
            ("slots", meta["slots"], slots),
        ):
            if got != want:
                _refuse(path, block.wave, f"{name} is {got}, expected {want}")
    if blocks:
        _check_nodes(path, config["num_steps"], tasks, blocks, np.array(ends))


def _check_nodes(path: Path, top: int, tasks: int, blocks: list[Block], ends: NDArray[np.int64]) -> None:
    """Every record and hit within bounds, so that compiled code may follow them."""
    nodes = np.concatenate([b.nodes for b in blocks])

    def check(name: str, bad: NDArray[np.bool_], expected: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            block = int(np.searchsorted(ends, row, side="right"))
            at = row - (int(ends[block - 1]) if block else 0)
            _refuse(path, block, f"{name} of its node {at} is {nodes[name][row]}, expected {expected}")

    task, t, parent, slot = (nodes[name].astype(np.int64) for name in ("task", "t", "parent", "slot"))
    check("task", task >= tasks, f"0..{tasks - 1}")
    order = np.argsort(task, kind="stable")
    starts = np.searchsorted(task[order], np.arange(tasks + 1))
    own = np.empty(len(nodes), np.int64)
    own[order] = np.arange(len(nodes)) - starts[task[order]] + 1
    check("parent", (parent < 0) | (parent >= own), "a node before it")
    check("t", (t < 0) | (t > top), f"0..{top}")
    if len(nodes):
        above = np.where(parent > 0, t[order[np.minimum(starts[task] + parent - 1, len(nodes) - 1)]], top + 1)
        check("t", (t >= above) & ~((t == top) & (above == top)), "a level below its parent's, or beside it at the top")
    check("slot", slot < NONE, "a place among the states, or -1")
    kept = np.flatnonzero(slot != NONE)
    by_slot = kept[np.argsort(slot[kept], kind="stable")]
    twice = np.zeros(len(nodes), np.bool_)
    twice[by_slot[1:][np.diff(slot[by_slot]) == 0]] = True
    check("slot", twice, "a place of its own")
    check("log_w", ~(nodes["log_w"] < np.inf), "a number below infinity")
    check("reward", np.where(t == 0, ~(nodes["reward"] < np.inf), nodes["reward"] == np.inf), "a number below infinity")
    sizes = np.zeros(tasks, np.int64)
    for block in blocks:
        sizes += np.bincount(block.nodes["task"], minlength=tasks)
        hits = block.hits
        if not len(hits):
            continue
        inside = (hits["task"] >= 0) & (hits["task"] < tasks)
        of = np.where(inside, hits["task"], 0)
        inside &= (hits["leaf"] >= 1) & (hits["leaf"] <= sizes[of])
        if not inside.all() or (t[order[starts[of] + hits["leaf"] - 1]] != 0).any():
            _refuse(path, block.wave, "hits name nodes that are no leaves")


def check_state(state: dict[str, Any], like: dict[str, Any], nodes: int) -> None:
    """A search's recorded state: names and kinds as its own, numbers that its tree can have come to.

    Args:
        like: the state of a fresh search of the same method.
        nodes: of the tree.

    Raises:
        ValueError: it differs.
    """
    kinds: dict[type, schema.Check] = {
        int: whole(),
        list: several(several(several(whole(0, 2**31), 2, 2), 1, nodes), 0, nodes),
        type(None): maybe(several(number(0.0), 1, STEPS + 2)),
    }
    record({name: kinds[type(value)] for name, value in like.items()})(state, "state")
    for name, value in like.items():
        if type(value) is list and sum(count for group in state[name] for _, count in group) > nodes:
            raise schema.refused(state[name], f"state.{name}", f"groups of at most {nodes} in all")


def _refuse(path: Path, block: int, what: str) -> NoReturn:
    raise StoreError(f"{path}/tree.bin: block {block}: {what}: no search wrote this")


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Turns an OSError of reading into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}/tree.bin cannot be read: {error.strerror}") from error


def _read(file: BinaryIO | io.BufferedReader, count: int) -> bytes:
    """Up to `count` bytes, fewer only at the end of the file."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
