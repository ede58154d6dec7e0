"""Which worker gets which rows.

All workers should finish together, and their batches should be full. With Q evaluations queued and worker w, of speed
s_w, busy for b_w seconds more, it gets the water-filling share s_w·max(0, τ - b_w), where τ is such that the shares add
up to Q; a share of half a batch or more is cut to whole batches, one at least, and what is cut off goes out with the
next bundle, which shares passes with this one. No bundle is longer than `BUNDLE_SECONDS`, so that a long queue is dealt
out as workers come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BUNDLE_SECONDS = 1.0
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


def level(speed: F64) -> F64:
    """Speeds without their noise: those within `ALIKE` of the median are the median."""
    middle = np.median(speed)
    return np.where(np.abs(speed - middle) <= ALIKE * middle, middle, speed)


def smooth(old: float | None, new: float) -> float:
    """Running mean of a worker's speed, over the seconds of an evaluation: a slow one is believed at once."""
    return new if old is None else 1 / ((1 - SMOOTH) / old + SMOOTH / new)


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
