"""One run as the page shows it, followed while it grows.

    state      what changes with every wave: status, counts, the waves since
    nodes      columns of a task's nodes as bytes: parent (int32), reward (float32), t (int16), one after another
    values     of the same nodes, once the read-out is made again
    summary    figures and certificate of a task

The read-out costs as long as the tree is large, so it is made again when RESTS times that has gone by.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.report.card import resume_command
from treesearch.results.result import SearchResult
from treesearch.results.summary import summary
from treesearch.results.text import lines
from treesearch.runs import files, schema
from treesearch.runs.command import COMMAND, shown
from treesearch.runs.follow import Follower
from treesearch.runs.log import NODE
from treesearch.runs.schema import maybe, number, plain, record, text
from treesearch.session.rebuild import build_method, read_result

RESTS = 5.0
PATIENCE = 0.2  # seconds within which a second look finds nothing new
_BYTES = 2**24
_FIGURE = maybe(number(-sys.float_info.max, sys.float_info.max))
_OF_ONE = ("busy", "fill", "nfe", "nfe_per_second", "batch_size", "memory_mb")
_ONE = record({"node": text(1000), "device": text(1000)} | dict.fromkeys(_OF_ONE, _FIGURE))
_WORKERS = record({"by_worker": record({}, rest=_ONE)}, rest=plain(8))
CURVES = ("nfe", "seconds", "model_seconds", "reward_seconds", "best_reward", "ess", "nodes")  # of a wave


class View:
    """A run folder behind a lock: requests come from several threads.

    Args:
        path: the run folder.

    Raises:
        StoreError: when it is looked at, where it is no run or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._follower = Follower(path)
        self._looked = -math.inf
        self._tables: list[NDArray[Any]] = []
        self._taken = 0  # blocks whose nodes are in the tables
        self._result: SearchResult | None = None
        self._made: tuple[int, str] | None = None  # what the result is of
        self._rest = -math.inf  # until then it stays
        self._version = 0

    @property
    def config(self) -> dict[str, Any]:
        """run.json."""
        return self._follower.config

    def state(self, since: int = 0) -> dict[str, Any]:
        """What changes with every wave, with the waves from number `since` on."""
        with self.lock:
            self._look()
            blocks = self._follower.blocks
            since = min(since, len(blocks))
            history = [block.meta["history"] for block in blocks[since:]]
            return {
                "id": self.config["id"],
                "status": self._follower.status,
                "waves": len(blocks),
                "since": since,
                "nodes": [len(table) for table in self._tables],
                "readout": self._version,
                "history": {name: [wave[name] for wave in history] for name in CURVES},
                "workers": self._workers(),
            }

    def _workers(self) -> dict[str, Any] | None:
        """What the workers do, all together and each; None where there are none."""
        blocks = self._follower.blocks
        together = blocks[-1].meta["history"].get("workers") if blocks else None
        if not isinstance(together, dict):
            return None
        try:
            with files.reading(self.path / "workers.json", _BYTES) as file:
                found = schema.parse(file.read(), "workers.json")
            _WORKERS(found, "workers.json")
        except (OSError, schema.Invalid):
            return {"together": together, "each": {}}
        return {"together": together, "each": found["by_worker"]}

    def about(self) -> dict[str, Any]:
        """What was asked: it stays while the run grows."""
        with self.lock:
            self._look()
            config = self.config
            asked = {
                key: config[key] for key in ("method", "kernel", "reward", "seed", "budget", "created", "versions")
            }
            return (
                asked
                | shown(self.path, config)
                | {
                    "id": config["id"],
                    "greedy": build_method(config["method"]).claims.greedy,
                    "prompts": config["prompts"],
                    "num_steps": config["num_steps"],
                    "state_shape": config["state_shape"],
                    "departs": config.get("departs"),
                    "resume": self._resume(),
                }
            )

    def _resume(self) -> str:
        """What to type to go on; a run from Python does not say how its kernel and reward are made."""
        typed = resume_command(self.path.resolve())
        return typed if (self.path / COMMAND).exists() else f"{typed} --kernel EXPR --reward EXPR"

    def table(self, task: int) -> NDArray[Any]:
        """Records (n,) of a task's nodes below the root; node i is row i - 1.

        Raises:
            LookupError: there is no such task.
        """
        with self.lock:
            self._look()
            if not 0 <= task < len(self._tables):
                raise LookupError(f"this run has tasks 0..{len(self._tables) - 1}")
            return self._tables[task]

    def nodes(self, task: int, since: int = 0) -> bytes:
        """Columns of a task's nodes from row `since` on."""
        rows = self.table(task)[max(0, since) :]
        return b"".join(
            rows[name].astype(kind).tobytes() for name, kind in (("parent", "<i4"), ("reward", "<f4"), ("t", "<i2"))
        )

    def values(self, task: int) -> bytes:
        """Values (float32) of a task's nodes as far as the read-out goes, NaN where the method has none."""
        return self._task(task).tree.value[1:].astype("<f4").tobytes()

    def summary(self, task: int) -> dict[str, Any]:
        """Figures of a task, its certificate line by line, and the cost of the whole run."""
        with self.lock:
            found = self._task(task)
            assert self._result is not None
            told = summary(replace(self._result, tasks=[found]))[0]
            return told | {
                "interval": told["certificate"]["log_z"],
                "certificate": lines(told["certificate"]),
                "cost": self._result.cost.as_dict(),
            }

    def _task(self, task: int) -> Any:
        with self.lock:
            self.table(task)
            if self._result is None:
                self._read_out()
            assert self._result is not None
            return self._result.tasks[task]

    def _look(self) -> None:
        """Read what was added, if it is time."""
        if time.monotonic() - self._looked < PATIENCE:
            return
        before = self.config.get("id")
        self._follower.look()
        if self.config["id"] != before:
            self._taken, self._result = 0, None
            self._tables = [np.empty(0, NODE) for _ in self.config["prompts"] or [None]]
        self._take()
        due = self._result is not None and self._made != self._standing()
        if due and time.monotonic() >= self._rest:
            self._read_out()
        self._looked = time.monotonic()

    def _standing(self) -> tuple[int, str]:
        return len(self._follower.blocks), self.config["status"]

    def _take(self) -> None:
        """Enter the nodes of new blocks in the tables."""
        added = [block.nodes for block in self._follower.blocks[self._taken :]]
        self._taken = len(self._follower.blocks)
        if not added:
            return
        nodes = np.concatenate(added)
        for task in np.unique(nodes["task"]).tolist():
            self._tables[task] = np.concatenate([self._tables[task], nodes[nodes["task"] == task]])

    def _read_out(self) -> None:
        """Make the read-out of what is there."""
        began = time.monotonic()
        self._result = read_result(self.config, self._follower.blocks)
        self._made, self._version = self._standing(), self._version + 1
        self._rest = time.monotonic() + RESTS * (time.monotonic() - began)
