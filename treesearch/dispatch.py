"""Which worker gets which rows.

All workers should finish together, and their batches should be full. A queue that gives no worker a full batch is split
by water-filling: with Q evaluations queued and worker w, of speed s_w, busy for b_w seconds more, it gets
s_w·max(0, τ - b_w), where τ is such that the shares add up to Q. A longer queue is cut into equal pieces, the fewest
that are no larger than a batch and as many for each worker, and each piece in turn goes to the worker that would be
done with it first (list scheduling): a row too many costs a pass as long as that of a full batch. No bundle is longer
than `BUNDLE_SECONDS`, so that a long queue is dealt out as workers come back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BUNDLE_SECONDS = 1.0
SMOOTH = 0.25  # weight of the latest measurement of a worker's speed
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


def pieces(queued: float, batch: float, backlog: F64, speed: F64, most: F64) -> F64:
    """Shares (W,) of `queued` evaluations in pieces of nearly a batch each; a worker with `most` gets no further piece.

    Args:
        queued: evaluations to share out, at least a batch for each worker.
        batch: evaluations of a batch of whole rows.
        backlog, speed: as of `water_fill`.
        most: limit of each share.
    """
    workers = len(backlog)
    count = workers * math.ceil(queued / (workers * batch) - 1e-9)
    size, shares = queued / count, np.zeros(workers)
    ends = [(backlog[w] + size / speed[w], w) for w in range(workers)]
    heapq.heapify(ends)
    for _ in range(count):
        end, w = heapq.heappop(ends)
        shares[w] += size
        if shares[w] + size <= most[w] * (1 + 1e-9):
            heapq.heappush(ends, (end + size / speed[w], w))
        if not ends:
            break
    return shares


def level(speed: F64) -> F64:
    """Speeds without their noise: those within `ALIKE` of the median are the median."""
    middle = np.median(speed)
    return np.where(np.abs(speed - middle) <= ALIKE * middle, middle, speed)


def smooth(old: float | None, new: float) -> float:
    """Running mean of a worker's speed."""
    return new if old is None else (1 - SMOOTH) * old + SMOOTH * new


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
