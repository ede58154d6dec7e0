"""A run is a folder.

    run.json              configuration, versions, seed, fingerprint, status; replaced atomically
    tree.bin              one block a wave: fixed-width records of new nodes, checksummed, written after its states
    states-*.safetensors  the states, in order of their slots; a node's record holds the checksum of its state
    events.jsonl          one line a wave, for people
    command.json          what the command line was asked, where it made the run
    workers.json          what each worker does, where there are some; replaced now and then
    outputs/, README.md   what the command line adds: pictures and a card

`kill -9` at any moment loses at most the waves in flight: a last block that is incomplete is cut off on resume, after
a copy of it is made, and its work is done again with the same draws. Any other damage is an error that names the block.
A folder may come from anybody: nothing in it is believed before it is checked, nothing is written through a link, and
looking at it changes nothing. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch

from treesearch.core.tree import NONE
from treesearch.errors import GO_ON, StoreError, writing
from treesearch.runs import files, schema
from treesearch.runs.config import document, now, read_config, stamped
from treesearch.runs.files import write_json
from treesearch.runs.lock import Lock
from treesearch.runs.log import COST, MAGIC, Block, packed, read
from treesearch.runs.reading import read_log
from treesearch.runs.shards import ShardStates

log = logging.getLogger("treesearch")


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
        self._waves, self._end = 0, len(MAGIC)
        self._log: BinaryIO | None = None
        self._events: BinaryIO | None = None
        self._lock: Lock | None = None

    @staticmethod
    def create(path: str | os.PathLike[str], config: dict[str, Any], beside: Mapping[str, Any] | None = None) -> Run:
        """Start a run in a folder that holds none, or one without a single wave.

        Args:
            config: what run.json holds.
            beside: further JSON documents by file name; they are there before run.json is.
        """
        run = Run(path)
        run.config = document(config)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the run folder {path}: {error.strerror}") from error
        run._lock = Lock(run.path)
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
                run._lock = Lock(run.path)
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
        data = packed(self.config["id"], block)
        with self._guard():
            if self.states is not None:
                self.states.sync()
            files.write_at(self._log, data, self._log.seek(0, os.SEEK_END))
            files.sync(self._log)
        self._waves += 1
        self.event(block.meta["history"])

    def _check_cost(self, cost: dict[str, Any]) -> None:
        """Raises:
        StoreError: numbers that would not be read again, in a run that was forged near their limits.
        """
        try:
            COST(cost, "its cost")
        except schema.Invalid as error:
            raise StoreError(f"{self.path}: the next wave cannot be recorded: {error}") from error

    def event(self, record: dict[str, Any]) -> None:
        """One line of events.jsonl."""
        assert self._events is not None
        with self._guard():
            files.write_at(self._events, (json.dumps(record) + "\n").encode(), self._events.seek(0, os.SEEK_END))

    def leave_beside(self, name: str, value: Any) -> None:
        """Replace a JSON document that nothing is read back from, for those who look."""
        with self._guard():
            write_json(self.path / name, value)

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
                self.save(status=status, closed=now(), waves=self._waves)

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
            files.write_at(kept, read(self._log, lost), 0)
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
            files.write_at(self._log, MAGIC, 0)

    def _guard(self) -> AbstractContextManager[None]:
        return writing(self.path, GO_ON)


def check_vacant(path: str | os.PathLike[str]) -> None:
    """Whether a run may begin in a folder: one that failed before its first wave may be started over.

    Raises:
        StoreError: it holds a run, or what is left of one.
    """
    file, tree = Path(path) / "run.json", Path(path) / "tree.bin"
    size = tree.lstat().st_size if os.path.lexists(tree) else 0
    if not os.path.lexists(file):
        if size > len(MAGIC):
            raise StoreError(f"{path} holds a tree.bin without its run.json: put that back, or name another folder")
        return
    try:
        begun = read_config(path).get("waves", 0) > 0
    except StoreError:
        begun = True
    if begun or size != len(MAGIC):
        raise StoreError(f"{path} holds a run already: resume it, or name another folder")
