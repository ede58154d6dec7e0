"""How fast the workers of a search are, and how busy."""

from __future__ import annotations

from dataclasses import dataclass

from treesearch.distributed import sharing
from treesearch.distributed.bundles import Counters
from treesearch.distributed.bundling import Parts
from treesearch.distributed.leases import Actor, Lease
from treesearch.distributed.pool import Pool
from treesearch.distributed.sharing import Speeds


@dataclass(eq=False, kw_only=True)
class Loan(Lease):
    """A bundle under way; its references are to the reply, the states and the samples."""

    number: int
    parts: Parts
    nfe: float
    steps: float  # of its longest row
    failures: int


class Loads:
    """What workers take for their loans.

    Args:
        pool: the workers.
        speeds: theirs, as far as they were measured.
        batch_size: rows of a pass.
        state_bytes: of a state.
    """

    def __init__(self, pool: Pool, speeds: Speeds, batch_size: int, state_bytes: int) -> None:
        self.pool, self.batch_size, self.state_bytes = pool, batch_size, state_bytes
        self._speeds = speeds
        self._refresh()

    def learn(self, actor: Actor, new: Counters, *, first: bool) -> None:
        """Take in what a worker has done since it was last heard of, in this search for the first time or again."""
        self._speeds.learn(actor.number, new, first=first)
        self._refresh()

    def _refresh(self) -> None:
        self._speed_of = self._speeds.of(a.number for a in self.pool.workers)

    def backlog(self) -> float:
        """Seconds until a worker would begin new work; 0 before anything was measured."""
        waiting = [self.busy(a) for a in self.pool.workers if a.ready is None]
        return min(waiting, default=0.0) if self._speed_of else 0.0

    def expected(self, actor: Actor) -> float:
        """Seconds that a worker's loans should take; 0 before anything was measured."""
        return self._seconds(actor) if self._speed_of else 0.0

    def busy(self, actor: Actor) -> float:
        """Seconds until a worker has done what it was given."""
        return max(0.0, self._seconds(actor) - actor.seconds()) if actor.leases else 0.0

    def speed(self, actor: Actor) -> float:
        """Evaluations a second in full batches, without noise; like the others' before it was measured."""
        others = self._speed_of.values()
        return self._speed_of.get(actor.number, sum(others) / len(others) if others else 1.0)

    def bundle_rows(self, actor: Actor, row: float) -> int:
        """Rows of `row` evaluations each that a bundle for this worker may have."""
        return sharing.bundle_rows(self._speed_of.get(actor.number, 0.0), row, self.batch_size, self.state_bytes)

    def _seconds(self, actor: Actor) -> float:
        loans = [lease for lease in actor.leases if isinstance(lease, Loan)]
        return sharing.seconds([o.nfe for o in loans], [o.steps for o in loans], self.batch_size, self.speed(actor))
