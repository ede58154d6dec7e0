"""Which worker gets which rows: functions of rows, speeds and backlogs.

All workers should finish together, and their batches should be full. With Q evaluations queued and worker w, of speed
s_w, busy for b_w seconds more, it gets the water-filling share s_w·max(0, τ - b_w), where τ is such that the shares add
up to Q; a share of half a batch or more is cut to whole batches, one at least, and what is cut off goes out with the
next bundle, which shares passes with this one. No bundle is longer than `BUNDLE_SECONDS`, so that a long queue is dealt
out as workers come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from treesearch.distributed.bundles import Counters

BUNDLE_SECONDS = 1.0
BUNDLE_BYTES = 2**28  # states that a bundle may bring home
SMOOTH = 0.25  # weight of the latest measurement of a worker's speed
NEARLY = 0.15  # of a batch that a share may lack
ALIKE = 0.1  # a row more or less can cost a whole pass: small differences of speed are noise

F64 = NDArray[np.float64]


def water_fill(queued: float, backlog: F64, speed: F64) -> F64:
    """Shares (W,) of `queued` evaluations with which all workers that get any finish at the same time.

    Args:
        queued: evaluations to share out.
        backlog: seconds for which each worker is busy, (W,).
        speed: evaluations a second, (W,), positive.
    """
    order = np.argsort(backlog, kind="stable")
    b, s = backlog[order], speed[order]
    fill = np.cumsum(s) * b - np.cumsum(s * b)  # what the first k + 1 take before the next one would get any
    k = int(np.searchsorted(fill, queued, side="right"))
    level = (queued + (s[:k] * b[:k]).sum()) / s[:k].sum()
    return np.maximum(0.0, level - backlog) * speed


def whole_batches(shares: F64, batch: float) -> F64:
    """Shares cut to whole batches, up to a little above them; those below half a batch as they are.

    Args:
        shares: evaluations, (W,).
        batch: evaluations of a batch of whole rows.
    """
    return np.where(shares >= 0.5 * batch, np.maximum(1, np.floor(shares / batch + NEARLY)) * batch, shares)


def without_noise(speed: F64) -> F64:
    """Speeds of which those within `ALIKE` of the median are the median."""
    middle = np.median(speed)
    return np.where(np.abs(speed - middle) <= ALIKE * middle, middle, speed)


def smooth(old: float | None, new: float) -> float:
    """Running mean of a worker's speed, over the seconds of an evaluation: a slow one is believed at once."""
    return new if old is None else 1 / ((1 - SMOOTH) / old + SMOOTH / new)


class Speeds:
    """Evaluations a second of each worker in full batches, as far as they were measured."""

    def __init__(self) -> None:
        self._measured: dict[int, float] = {}
        self._full: set[int] = set()  # whose batches were full

    def learn(self, worker: int, new: Counters, *, first: bool) -> None:
        """Take in what a worker has done since it was last heard of, in this search for the first time or again."""
        if first and worker not in self._measured:  # the first bundle pays for loading and warming up
            return
        if new.full_rows > 0:
            old = self._measured.get(worker) if worker in self._full else None
            self._measured[worker] = smooth(old, new.full_rows / new.full_seconds)
            self._full.add(worker)
        elif worker not in self._full and new.room > 0:  # a pass takes much the same time however many rows are in it
            self._measured[worker] = smooth(self._measured.get(worker), new.room / new.seconds)

    def of(self, workers: Iterable[int]) -> dict[int, float]:
        """Of those workers that were measured, without noise."""
        there = [number for number in workers if number in self._measured]
        speeds = without_noise(np.array([self._measured[number] for number in there])) if there else []
        return dict(zip(there, map(float, speeds), strict=True))


def bundle_rows(speed: float, row: float, batch_size: int, state_bytes: int) -> int:
    """Rows that a bundle may have: whole batches, at least one, no more than `BUNDLE_SECONDS` of work and than fits.

    Args:
        speed: evaluations a second of the worker, 0 where it was not measured.
        row: evaluations of a row.
        batch_size: rows of a pass.
        state_bytes: of a state.
    """
    batches = int(speed * BUNDLE_SECONDS / row / batch_size)
    fits = BUNDLE_BYTES // max(1, state_bytes) // batch_size
    return max(1, min(batches, fits)) * batch_size


def seconds(nfe: Sequence[float], steps: Sequence[float], batch_size: int, speed: float) -> float:
    """What a worker takes for bundles: they share passes, and no row is faster than a pass a step.

    Args:
        nfe: evaluations of each bundle.
        steps: those of its longest row.
        batch_size: rows of a pass.
        speed: evaluations a second.
    """
    return max(sum(nfe), max(steps) * batch_size) / speed


def share_out(
    cost: F64,
    home: NDArray[np.int64],
    workers: NDArray[np.int64],
    free: NDArray[np.bool_],
    *,
    backlog: F64,
    speed: F64,
    most: F64,
    batch_size: int,
) -> NDArray[np.int64]:
    """The worker of each row, -1 for rows that stay queued: now, or because a worker that is not free has a share too.

    Args:
        cost, home: as of `deal`.
        workers: all that are there, (W,).
        free: whether they may take rows now, (W,).
        backlog, speed: as of `water_fill`.
        most: evaluations that each may be given at once, (W,).
        batch_size: rows of a pass.
    """
    batch = batch_size * float(cost.mean())
    shares = np.minimum(water_fill(cost.sum(), backlog, speed), most)
    if cost.sum() >= batch:
        shares = whole_batches(shares, batch)
    return deal(cost, home, workers[free].tolist(), shares[free])


def deal(cost: F64, home: NDArray[np.int64], workers: Sequence[int], shares: F64) -> NDArray[np.int64]:
    """The worker of each row, -1 for rows that stay queued.

    Rows go home as long as home has room; what is left, oldest first, fills the room of the others (work stealing).

    Args:
        cost: evaluations of each row, (n,).
        home: worker that a row would rather go to, -1 for none, (n,).
        workers: those that may take rows.
        shares: evaluations that each of them should take.
    """
    given = np.full(len(cost), -1)
    room = shares.astype(float).copy()
    for i, worker in enumerate(workers):
        mine = np.flatnonzero(home == worker)
        before = np.cumsum(cost[mine]) - cost[mine]
        mine = mine[before + cost[mine] / 2 <= room[i]]
        given[mine] = worker
        room[i] = max(0.0, room[i] - cost[mine].sum())
    rest = np.flatnonzero(given < 0)
    middle = np.cumsum(cost[rest]) - cost[rest] / 2
    slot = np.searchsorted(np.cumsum(room), middle, side="left")
    if shares.sum() >= cost.sum() * (1 - 1e-9):  # nothing is to stay: what rounding left over goes to the last
        slot = np.minimum(slot, len(workers) - 1)
    inside = slot < len(workers)
    given[rest[inside]] = np.asarray(workers)[slot[inside]]
    return given
