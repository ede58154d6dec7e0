"""What a search has under way at workers: rows go out as bundles, which are leases, and come back or are lost.

A worker that dies, hangs or leaves with its node gives its leases back, and they are done again elsewhere: noise is
keyed by path, so with the same draws. Evaluations lost so count as `repeated_nfe`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.budget import Cost
from treesearch.core.tree import NONE, Tree
from treesearch.distributed import bundling, sharing
from treesearch.distributed.bundles import Bundle, Reply, Report, size
from treesearch.distributed.bundling import Job, Kept, Parts, column
from treesearch.distributed.landing import Landing
from treesearch.distributed.leases import Actor, Tenant
from treesearch.distributed.loads import Loads, Loan
from treesearch.distributed.pool import Pool
from treesearch.distributed.raised import Raised, brief
from treesearch.distributed.rewards import Rewards
from treesearch.distributed.sharing import Speeds
from treesearch.distributed.stats import Figures, Seen
from treesearch.engine.segments import Ids, Segments
from treesearch.engine.states import LostStates, forget
from treesearch.errors import KernelError, WorkerError
from treesearch.rewards.base import RewardError

log = logging.getLogger("treesearch")


class Lender:
    """The tenant of a pool that has bundles run.

    Args:
        pool: the processes.
        setup: reference to what workers need to know.
        scoring: reference to what scorers need to know; None where workers score.
        search: number of the search.
        spec, trees, prompts, batch_size: of the search.
        landing: states that come home.
        speeds: those of the workers.
        figures: count what happens.
    """

    def __init__(
        self,
        pool: Pool,
        setup: list[Any],
        scoring: list[Any] | None,
        search: int,
        spec: Spec,
        trees: Sequence[Tree],
        *,
        prompts: Sequence[Any] | None,
        batch_size: int,
        landing: Landing,
        speeds: Speeds,
        figures: Figures,
    ) -> None:
        self.pool, self.search, self.spec, self.trees, self.prompts = pool, search, spec, trees, prompts
        self.batch_size, self.landing, self.figures = batch_size, landing, figures
        self.rewards = None if scoring is None else Rewards(self, pool, scoring, search, batch_size, trees)
        self.jobs: list[Job] = []
        self._arrived: Parts = []
        self._kept = Kept()
        self._setup, self._numbers = setup, itertools.count()
        self._again: deque[tuple[Parts, int]] = deque()  # bundles that failed, and how often
        self._forget: dict[int, list[int]] = {}  # by worker: bundles whose transitions are needed no more
        self.loads = Loads(pool, speeds, batch_size, spec.state_bytes)
        self._warned: set[str] = set()  # what kernels raised
        for tenant in self._tenants():
            pool.enter(tenant)

    def close(self) -> None:
        """Leave the pool."""
        for tenant in self._tenants():
            self.pool.leave(tenant)
        self.jobs = []

    def _tenants(self) -> list[Tenant[Any]]:
        """Samples are sent to be scored before bundles are sent."""
        return [self] if self.rewards is None else [self.rewards, self]

    def add(self, wave: int, work: Sequence[tuple[int, Segments]]) -> None:
        """Queue a wave of (task, segments)."""
        self.jobs.append(bundling.job_of(wave, work, self.trees, self.spec, self._kept))

    def settle(self, job: Job) -> Cost:
        """A wave has arrived: transitions that it drew from are needed no more. Returns what it cost."""
        self.jobs.remove(job)
        for worker, bundle in job.uses:
            self._forget.setdefault(worker, []).append(bundle)
        return job.cost

    def collect(self, wave: int | None = None) -> Parts:
        """Rows that have arrived since, of a wave or of all."""
        taken = [part for part in self._arrived if wave in (None, part[0].wave)]
        self._arrived = [part for part in self._arrived if wave not in (None, part[0].wave)]
        return taken

    @property
    def waiting(self) -> bool:
        """Whether waves are under way and none of their rows has arrived since."""
        return bool(self.jobs) and not self._arrived

    # What is sent.

    def dispatch(self) -> None:
        """Send bundles to workers that have room."""
        self._lend_again()
        there = [a for a in self.pool.workers if a.open]
        free = np.array([a.free for a in there], np.bool_)
        if not free.any() or not (queued := self._queued()):
            return
        cost = np.maximum(1e-3, column(queued, "nfe"))
        row = float(cost.mean())
        self.figures.queued(len(cost))
        given = sharing.share_out(
            cost,
            column(queued, "kept")[:, 0],
            np.array([a.number for a in there]),
            free,
            backlog=np.array([self.loads.busy(a) for a in there]),
            speed=np.array([self.loads.speed(a) for a in there]),
            most=np.array([self.loads.bundle_rows(a, row) * row for a in there]),
            batch_size=self.batch_size,
        )
        for actor in [a for a, takes in zip(there, free, strict=True) if takes]:
            if mine := bundling.chosen(queued, given == actor.number):
                self._lend_queued(actor, mine)

    def _queued(self) -> Parts:
        """Rows that nobody was given yet."""
        return [(job, np.flatnonzero(job.queued)) for job in self.jobs if job.queued.any()]

    def _lend_again(self) -> None:
        """Send bundles that failed, those that did so by their own fault to a worker that does nothing beside."""
        while self._again:
            parts, failures = self._again[0]
            able = [a for a in self.pool.workers if a.free and not (failures and a.leases)]
            if not able:
                break
            self._again.popleft()
            self._lend(min(able, key=self.loads.busy), parts, failures)

    def _lend_queued(self, actor: Actor, parts: Parts) -> None:
        for job, rows in parts:
            job.queued[rows] = False
            self.figures.stolen_rows += int(((job.kept[rows, 0] != NONE) & (job.kept[rows, 0] != actor.number)).sum())
        self._lend(actor, parts, 0)

    def _lend(self, actor: Actor, parts: Parts, failures: int) -> None:
        """Send rows to a worker as one bundle."""
        bundle = self._bundle(actor, parts)
        refs = actor.handle.run.options(num_returns=3).remote(self._setup, self.search, bundle)
        loan = Loan(
            owner=self,
            refs=tuple(refs),
            alone=failures > 0,
            number=bundle.number,
            parts=parts,
            nfe=bundling.nfe_of(parts),
            steps=float(max(job.nfe[rows].max() for job, rows in parts)),
            failures=failures,
        )
        actor.take(loan)
        self.figures.bytes_out += size(bundle)

    def _bundle(self, actor: Actor, parts: Parts) -> Bundle:
        """The rows as they travel."""
        try:
            bundle = bundling.pack(
                parts,
                actor.number,
                self.trees,
                self.landing.states,
                self.spec.num_steps,
                number=next(self._numbers),
                settle=self.landing.settle,
                forget=tuple(self._forget.get(actor.number, ())),
            )
        except LostStates as lost:
            forget(lost, [tree.slot for tree in self.trees])
            return self._bundle(actor, parts)
        self._forget.pop(actor.number, None)
        return bundle

    # What comes back.

    def patience(self, actor: Actor) -> float:
        """Seconds that a worker may take: ten times what its leases should, and `hang_seconds` more."""
        return self.pool.settings.hang_seconds + 10 * self.loads.expected(actor)

    def due(self) -> float:
        """Nothing is to be done before an answer comes."""
        return math.inf

    def spare(self) -> bool:
        """Bring home the states of a bundle, so that no worker waits for it; whether there were any."""
        if not self.landing:
            return False
        self.landing.land()
        return True

    def received(self, loan: Loan, actor: Actor, answer: tuple[Reply, Report] | Raised) -> None:
        """Enter a reply into the trees, or take in that the bundle raised."""
        if isinstance(answer, Raised):
            self._failed(loan, actor, answer.error())
            return
        reply, report = answer
        self._learn(actor, report)
        self.figures.bytes_in += size(reply)
        owner, nodes = bundling.nodes_of(loan.parts)
        self.landing.add(loan.refs[1], owner[reply.stored], nodes[reply.stored])
        for i in np.unique(owner):
            mine = owner == i
            self.trees[i].log_w[nodes[mine]] = reply.log_w[mine]
        self._keep(loan, actor)
        bundling.charge(loan.parts, reply.cost)
        if self.rewards is not None:
            self.rewards.add(loan.parts, loan.failures, loan.refs[2], reply)
            return
        begin = 0
        for job, rows in loan.parts:
            self.arrive(job, rows, reply.reward[begin : begin + len(rows)])
            begin += len(rows)

    def _learn(self, actor: Actor, report: Report) -> None:
        """Take in what a worker reports of itself."""
        for text in report.said:
            log.warning("worker %d: %s", actor.number, text)
        seen = self.figures.seen.get(actor.number)
        new = report.counters.less(seen.report.counters) if seen else report.counters
        self.loads.learn(actor, new, first=seen is None)
        self.figures.seen[actor.number] = Seen(report, actor.info["node"], actor.info["device"])

    def _keep(self, loan: Loan, actor: Actor) -> None:
        """Note where the transitions are that ended segments."""
        task, last, hold = (column(loan.parts, name) for name in ("task", "last", "hold"))
        for i in np.unique(task[hold]):
            rows = np.flatnonzero((task == i) & hold)
            where = np.column_stack([np.full(len(rows), actor.number), np.full(len(rows), loan.number), rows])
            self._kept.add(int(i), last[rows], where)

    def arrive(self, job: Job, rows: Ids, rewards: NDArray[np.float64]) -> None:
        """Rows of a wave have their rewards."""
        for i in np.unique(job.task[rows]):
            of = job.task[rows] == i
            self.trees[i].reward[job.last[rows[of]]] = rewards[of]
        job.left -= len(rows)
        self._arrived.append((job, rows))

    # What fails.

    def _failed(self, loan: Loan, actor: Actor, error: Exception) -> None:
        """A bundle raised: broken contracts end the search, anything else is tried again.

        Raises:
            WorkerError: it failed too often.
        """
        if isinstance(error, (RewardError, KernelError, TypeError)):
            raise error
        failures = loan.failures + 1
        if failures >= self.pool.settings.max_failures:
            error.add_note(f"{failures} attempts at {self._inputs(loan)}")
            raise error
        name = type(error).__name__
        if (text := f"{name}: {brief(error)}") not in self._warned:
            log.warning("worker %d: %s; the bundle is tried again", actor.number, text)
        self._warned.add(text)
        self.give_again(loan.parts, failures)

    def missed(self, loan: Loan, actor: Actor, error: Exception) -> None:
        """The answer was lost with its node: not the bundle's fault."""
        actor.done(loan)
        self.give_again(loan.parts, loan.failures)

    def lost(self, loan: Loan, error: Exception) -> None:
        """A bundle's worker is gone.

        Raises:
            WorkerError: that happened to this bundle too often.
        """
        failures = loan.failures + 1
        if failures >= self.pool.settings.max_failures:
            raise WorkerError(
                f"{failures} workers were lost over the same bundle, {self._inputs(loan)}: {brief(error)}"
            ) from error
        self.give_again(loan.parts, failures)

    def give_again(self, parts: Parts, failures: int) -> None:
        """Queue a bundle once more; one that failed in two halves, so that rows that kill end up alone."""
        self.figures.given_again += 1
        for job, rows in parts:
            job.kept[rows] = NONE
        parts[0][0].cost.repeated_nfe += int(bundling.nfe_of(parts))
        n = sum(len(rows) for _, rows in parts)
        for part in bundling.halves(parts, n // 2) if failures and n > 1 else [parts]:
            self._again.append((part, failures))

    def _inputs(self, loan: Loan) -> str:
        return bundling.inputs(loan.parts, self.trees, self.prompts)
