"""A run that may still be written to, by this process or another, looked at again and again.

What was read is kept, and only what was added is read: `tree.bin` grows by whole blocks, `run.json` is replaced.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from treesearch.runs.checks import check_blocks
from treesearch.runs.config import read_config
from treesearch.runs.log import MAGIC, Block, read_blocks
from treesearch.runs.reading import status

ASKED = 2.0  # seconds between two questions of whether anybody has the lock: asking holds it for a moment


class Follower:
    """The waves of a run so far.

    Args:
        path: the run folder. Nothing in it changes, and no code that it names runs.

    Attributes:
        config: run.json.
        blocks: the waves, in order.
        status: running, finished, interrupted, stopped or killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self.blocks: list[Block] = []
        self.status = "running"
        self._end = len(MAGIC)
        self._seen: dict[str, tuple[int, int, int] | None] = {}
        self._asked = -ASKED

    def look(self) -> bool:
        """Read what was added since the last look; whether anything was.

        Raises:
            StoreError: it is no run, damaged, or holds what no search writes.
        """
        seen = {name: _mark(self.path / name) for name in ("run.json", "tree.bin")}
        if fresh := seen != self._seen:
            self._read()
            self._seen = seen
        return self._ask() or fresh

    def _read(self) -> None:
        config = read_config(self.path)
        blocks, end = self.blocks, self._end
        if config["id"] != self.config.get("id"):  # another run has taken the folder
            blocks, end = [], len(MAGIC)
        added = list(read_blocks(self.path, config.get("waves", 0), at=end, wave=len(blocks)))
        blocks = blocks + [block for block, _ in added]
        check_blocks(self.path, config, blocks)
        self.config, self.blocks = config, blocks
        self._end = added[-1][1] if added else end

    def _ask(self) -> bool:
        """Find the status out; whether it has changed."""
        before = self.status
        if self.config["status"] != "running":
            self.status = self.config["status"]
        elif time.monotonic() - self._asked >= ASKED:
            self.status, self._asked = status(self.path, self.config), time.monotonic()
        return self.status != before


def _mark(path: Path) -> tuple[int, int, int] | None:
    """What tells that a file has changed; None where there is none, which whoever reads it finds out."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
