"""What a search has come to: its history, its cost, its best reward, and the run folder where there is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from treesearch.budget import Cost
from treesearch.core.weights import ess
from treesearch.methods.base import Search
from treesearch.runs.folder import Run
from treesearch.runs.log import Block, records
from treesearch.session.wave import Wave

WORKERS = 2.0  # seconds between two accounts of what each worker does
GROWTH = 1.1  # the ESS of the history is computed again when the trees have grown by this factor


class Recorder:
    """Enters waves that are told.

    Attributes:
        run: the run folder, None to keep nothing.
        lost: what became of a run folder that is gone.
        cost: of what is recorded; the engine enters here what it does again.
        history: one record a wave.
        best: best reward over all tasks; -inf before the first sample.
        slots: places of the state store that are taken.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.lost: str | None = None
        self.cost = Cost()
        self.history: list[dict[str, Any]] = []
        self.best, self.slots = -np.inf, 0
        self._ess = (0, 0.0)
        self._told = -np.inf  # when the workers' account was written
        self._seconds = 0.0  # of earlier sessions
        self._began = time.perf_counter()

    @property
    def path(self) -> str | None:
        """The run folder while there is one."""
        return None if self.run is None or self.lost is not None else str(self.run.path)

    @property
    def saved(self) -> dict[str, Any]:
        """What the run's run.json holds."""
        return {} if self.run is None else self.run.config

    def take_up(self, run: Run, blocks: Sequence[Block]) -> None:
        """Go on where a run's log ends."""
        self.run = run
        self.history = [b.meta["history"] for b in blocks]
        self.cost = Cost(**(blocks[-1].meta["cost"] if blocks else run.config["pilot"]["cost"]))
        self._seconds = self.cost.seconds
        self.best = max((h["best_reward"] for h in self.history if h["best_reward"] is not None), default=-np.inf)

    def elapsed(self) -> float:
        """Seconds of this session and the ones before it."""
        return self._seconds + time.perf_counter() - self._began

    def record(self, wave: Wave, searches: Sequence[Search], **beside: Any) -> dict[str, Any]:
        """The wave's history record, written to the run folder.

        Args:
            beside: further entries of the record.
        """
        self.cost.add(wave.cost)
        self.cost.seconds = self.elapsed()
        for task, segments in wave.work:
            tree = searches[task].tree
            leaves = segments.last[tree.t[segments.last] == 0]
            if len(leaves):
                self.best = max(self.best, float(tree.reward[leaves].max()))
        nodes = sum(after for _, after in wave.bounds)
        record = {
            "wave": wave.number,
            "nfe": self.cost.nfe,
            "reward_calls": self.cost.reward_calls,
            "seconds": round(self.cost.seconds, 4),
            "model_seconds": round(self.cost.model_seconds, 4),
            "reward_seconds": round(self.cost.reward_seconds, 4),
            "best_reward": self.best if np.isfinite(self.best) else None,
            "ess": self._ess_now(nodes, searches),
            "nodes": nodes,
        } | beside
        self.history.append(record)
        if self.run is not None and self.lost is None:
            self._write(self.run, wave, searches, record)
        return record

    def account(self, stats: Callable[[], dict[str, Any]]) -> None:
        """Leave what each worker does in the run folder, for those who look."""
        if self.run is not None and self.lost is None and time.perf_counter() - self._told >= WORKERS:
            self.run.leave_beside("workers.json", stats())
            self._told = time.perf_counter()

    def close(self, status: str | None, ended: Sequence[str], *, out_of_time: bool) -> None:
        """Let go of the run folder; without a status the run keeps its own."""
        if self.run is None:
            return
        if status is not None:
            self.run.config["out_of_time"] = out_of_time
            self.run.config |= {"ended": list(ended)} if ended else {}
        self.run.close(self.run.config["status"] if status is None else status)

    def _write(self, run: Run, wave: Wave, searches: Sequence[Search], record: dict[str, Any]) -> None:
        if not run.there:
            self._lose(run)
            return
        nodes = np.concatenate([records(i, s.tree, *wave.bounds[i]) for i, s in enumerate(searches)])
        self.slots = max(self.slots, int(nodes["slot"].max(initial=-1)) + 1)
        meta = {"history": record, "cost": self.cost.as_dict(), "searches": wave.states, "slots": self.slots}
        run.write(Block(wave.number, meta, nodes, np.concatenate(wave.hits)))

    def _lose(self, run: Run) -> None:
        """The run folder is gone: leave the result to the caller."""
        self.lost = (
            f"{run.path} was removed, moved or replaced while the search ran: it stopped there, and what it found is "
            "in this result alone"
        )
        logging.getLogger("treesearch").warning(self.lost)
        run.leave()

    def _ess_now(self, nodes: int, searches: Sequence[Search]) -> float:
        """ESS of the leaves, summed over tasks; as of the last time that the recorded nodes had grown by 10 %."""
        if nodes >= GROWTH * self._ess[0]:
            self._ess = nodes, float(sum(ess(s.readout().log_weights) for s in searches))
        return round(self._ess[1], 3)
