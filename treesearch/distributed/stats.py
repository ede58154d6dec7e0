"""Figures of a search's workers: utilisation, batch fill, queue depth, bytes moved."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from treesearch.distributed.bundles import Report


class Seen(NamedTuple):
    """A worker's latest report, and what it runs on."""

    report: Report
    node: str
    device: str


class Figures:
    """What is counted while a search runs."""

    def __init__(self) -> None:
        self.seen: dict[int, Seen] = {}  # by worker
        self.bytes_in = self.bytes_out = 0
        self.stolen_rows = self.given_again = 0
        self._began = time.monotonic()
        self._depth, self._samples = 0, 0

    def queued(self, rows: int) -> None:
        """So many rows wait to be sent."""
        self._depth, self._samples = self._depth + rows, self._samples + 1

    def summary(self, ready: int, workers: int) -> dict[str, Any]:
        """Of all workers together, of which so many are up: for the history and the progress line."""
        counters = [seen.report.counters for seen in self.seen.values()]
        return {
            "workers": ready,
            "busy": round(sum(c.seconds for c in counters) / self._wall() / max(1, workers), 4),
            "fill": round(sum(c.rows for c in counters) / max(1, sum(c.room for c in counters)), 4),
            "queue": round(self._depth / max(1, self._samples), 1),
            "mb_in": round(self.bytes_in / 1e6, 3),
            "mb_out": round(self.bytes_out / 1e6, 3),
        }

    def stats(self, ready: int, workers: int, restarts: int) -> dict[str, Any]:
        """The summary, what was done again, and the figures of each worker."""
        wall = self._wall()
        return self.summary(ready, workers) | {
            "stolen_rows": self.stolen_rows,
            "bundles_given_again": self.given_again,
            "processes_replaced": restarts,
            "by_worker": {number: _of_worker(seen, wall) for number, seen in self.seen.items()},
        }

    def _wall(self) -> float:
        return max(1e-9, time.monotonic() - self._began)


def _of_worker(seen: Seen, wall: float) -> dict[str, Any]:
    counters, memory = seen.report.counters, seen.report.memory
    return {
        "node": seen.node,
        "device": seen.device,
        "busy": round(counters.seconds / wall, 4),
        "fill": round(counters.rows / max(1, counters.room), 4),
        "nfe": counters.rows,
        "nfe_per_second": round(counters.rows / max(1e-9, counters.seconds), 1),
        "batch_size": seen.report.batch_size,
        "memory_mb": None if memory is None else round(memory / 2**20, 1),
    }
