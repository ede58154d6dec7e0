"""The reward service of a search: samples wait in a window, scorers are asked, answers are remembered."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayTaskError

from treesearch.core.tree import Tree
from treesearch.distributed.bundles import Reply, as_numpy
from treesearch.distributed.bundling import Job, Parts
from treesearch.distributed.leases import Actor, Lease
from treesearch.distributed.pool import Pool
from treesearch.distributed.raised import Raised, brief, cause_of
from treesearch.distributed.settings import Settings
from treesearch.engine.segments import Ids
from treesearch.errors import WorkerError
from treesearch.rewards.base import RewardError


class Customer(Protocol):
    """Whose samples they are: the engine of a search."""

    def arrive(self, job: Job, rows: Ids, rewards: NDArray[np.float64], /) -> None:
        """Rows of a job have their rewards."""
        ...

    def give_again(self, parts: Parts, failures: int, /) -> None:
        """Rows are to be run again; their bundle has failed so often."""
        ...


@dataclass(eq=False)
class Waiting:
    """Samples of a bundle that wait for their rewards."""

    ref: Any  # to all samples of the bundle
    dtype: Any
    digests: Sequence[bytes | None]
    job: NDArray[np.object_]
    row: Ids  # within its job
    at: list[int]  # those still to be sent
    since: float  # when they came; later than now while they pause after a failure
    bundle_failures: int  # how often their bundle had failed before they were made
    failures: int = 0

    @property
    def task(self) -> Ids:
        return np.array([job.task[row] for job, row in zip(self.job, self.row, strict=True)])

    def names(self, at: list[int], trees: Sequence[Tree]) -> list[str]:
        """What errors call samples."""
        return [self.job[i].name(int(self.row[i]), trees) for i in at]


@dataclass(eq=False, kw_only=True)
class Call(Lease):
    """Samples at a scorer."""

    parts: list[tuple[Waiting, list[int]]]


class Rewards:
    """The reward service of a search: samples of all its tasks wait in a window, equal ones are scored once.

    Args:
        customer: whose samples they are.
        pool: the processes.
        setup: reference to what scorers need to know.
        search: number of the search.
        batch_size: samples that are scored at once.
        trees: of the search, for messages.
    """

    def __init__(
        self, customer: Customer, pool: Pool, setup: list[Any], search: int, batch_size: int, trees: Sequence[Tree]
    ) -> None:
        self.customer, self.pool, self._setup = customer, pool, setup
        self.search, self.batch_size, self.trees = search, batch_size, trees
        self.attempts = self.hits = self.workers_lost = 0
        self._waiting: list[Waiting] = []
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._pending: dict[bytes, list[tuple[Waiting, int]]] = {}  # samples equal to one that is being scored

    @property
    def limits(self) -> Settings:
        """What was asked of it."""
        return self.pool.settings

    def stats(self) -> dict[str, int]:
        """What was asked of scorers, what was known already, and how many of them were lost."""
        return {"attempts": self.attempts, "cache_hits": self.hits, "workers_lost": self.workers_lost}

    def add(self, parts: Parts, failures: int, ref: Any, reply: Reply) -> None:
        """Take the samples of a bundle; rows whose rewards the kernel knew have arrived.

        Args:
            parts: its rows.
            failures: how often it had failed.
            ref: to the samples, of the rows without a reward.
            reply: what tells them apart.
        """
        row = np.concatenate([rows for _, rows in parts])
        job = np.empty(len(row), object)
        job[:] = [job for job, rows in parts for _ in rows]
        open_ = np.isnan(reply.reward)
        self._arrive(job[~open_], row[~open_], reply.reward[~open_])
        row, job = row[open_], job[open_]
        if not len(row):
            return
        digests = reply.digests if self.limits.reward_cache else [None] * len(row)
        waiting = Waiting(ref, reply.dtype, digests, job, row, [], time.monotonic(), failures)
        self._waiting.append(waiting)
        known = []
        for i, digest in enumerate(digests):
            if digest is not None and digest in self._cache:
                self._cache.move_to_end(digest)
                known.append((i, self._cache[digest]))
            elif digest is not None and digest in self._pending:
                self._pending[digest].append((waiting, i))
            else:
                waiting.at.append(i)
                if digest is not None:
                    self._pending[digest] = []
        self.hits += len(known)
        self._enter(waiting, [i for i, _ in known], [value for _, value in known])

    def score(self, task: Ids, samples: Any) -> NDArray[np.float64]:
        """Rewards of samples apart from those that wait, by any one scorer."""
        dtype = samples.dtype if isinstance(samples, torch.Tensor) else None
        ref = ray.put(as_numpy(samples) if isinstance(samples, torch.Tensor) else samples)
        parts, rows = [([ref], dtype, list(range(len(task))))], task.tolist()
        tries = self.limits.reward_tries
        pool = self.pool
        found = pool.ask(pool.scorers, lambda a: a.score.remote(self._setup, self.search, parts, rows, tries, True))
        return found[0]

    def dispatch(self) -> None:
        """Give scorers what waits, once it fills a batch or has waited for the window."""
        self._waiting = [w for w in self._waiting if w.at]
        for scorer in [s for s in self.pool.scorers if s.free]:
            now, parts, room = time.monotonic(), [], self.batch_size
            able = [w for w in self._waiting if w.at and w.since <= now]
            rows = sum(len(w.at) for w in able)
            if not rows or (rows < room and now < min(w.since for w in able) + self.limits.reward_window):
                return
            for waiting in able:
                if room > 0:
                    parts.append((waiting, waiting.at[:room]))
                    waiting.at = waiting.at[room:]
                    room -= len(parts[-1][1])
            self._send(scorer, parts)

    def _send(self, scorer: Actor, parts: list[tuple[Waiting, list[int]]]) -> None:
        sent = [([w.ref], w.dtype, at) for w, at in parts]
        tasks = [int(task) for w, at in parts for task in w.task[np.array(at)]]
        ref = scorer.handle.score.remote(self._setup, self.search, sent, tasks, self.limits.reward_tries)
        scorer.take(Call(owner=self, refs=(ref,), parts=parts))

    def due(self) -> float:
        """Seconds until there is something to send or to give up on."""
        now, times = time.monotonic(), []
        if any(s.free for s in self.pool.scorers):  # otherwise an answer comes first
            times = [w.since + self.limits.reward_window - now for w in self._waiting if w.at]
        mine = [s for s in self.pool.scorers if any(lease.owner is self for lease in s.leases)]
        times += [max(0.1, self.limits.reward_seconds - s.seconds()) for s in mine]
        return max(0.0, min(times, default=1.0))

    def spare(self) -> bool:
        """Nothing waits for a spare moment."""
        return False

    def patience(self, actor: Actor) -> float:
        """Seconds that a reward may take for a batch."""
        return self.limits.reward_seconds

    def received(self, call: Call, actor: Actor, answer: Any) -> None:
        """Enter the answer of a scorer.

        Raises:
            RewardError: the reward broke its contract, or raised at every attempt.
        """
        if isinstance(answer, Raised):
            raise self._named(call, answer.error())
        values, calls, attempts, seconds = answer
        self.attempts += attempts
        begin, each = 0, seconds / max(1, sum(len(at) for _, at in call.parts))
        for waiting, at in call.parts:
            found = values[begin : begin + len(at)].tolist()
            begin += len(at)
            for job in waiting.job[at]:
                job.cost.reward_seconds += each
            for job in dict.fromkeys(waiting.job[at]):  # what a cache of the reward's own saved is the last one's
                mine = min(calls, int((waiting.job[at] == job).sum()))
                job.cost.reward_calls, calls = job.cost.reward_calls + mine, calls - mine
            self._enter(waiting, at, found)
            for i, value in zip(at, found, strict=True):
                self._remember(waiting.digests[i], value)

    def missed(self, call: Call, actor: Actor, error: Exception) -> None:
        """Samples could not be fetched: they are made again. A scorer that does not answer for another reason goes."""
        if not isinstance(error, RayTaskError):
            self.pool.lost(actor, error)
            return
        actor.done(call)
        cause = cause_of(error)
        if not isinstance(cause, ObjectLostError):
            raise self._named(call, cause) from None
        for waiting, at in call.parts:
            self._make_again(waiting, at)

    def _enter(self, waiting: Waiting, at: list[int], values: list[float]) -> None:
        """Rewards of samples: their rows have arrived."""
        self._arrive(waiting.job[at], waiting.row[at], np.array(values))

    def _arrive(self, job: NDArray[np.object_], row: Ids, values: NDArray[np.float64]) -> None:
        """Rows of jobs have their rewards."""
        for one in dict.fromkeys(job):
            mine = job == one
            self.customer.arrive(one, row[mine], values[mine])

    def _remember(self, digest: bytes | None, value: float) -> None:
        if digest is None:
            return
        self._cache[digest] = value
        while len(self._cache) > self.limits.reward_cache:
            self._cache.popitem(last=False)
        for waiting, i in self._pending.pop(digest, []):
            self.hits += 1
            self._enter(waiting, [i], [value])

    def _named(self, call: Call, error: Exception) -> Exception:
        """A reward's error with the nodes that it is about."""
        if not isinstance(error, RewardError):
            return error
        names = [name for waiting, at in call.parts for name in waiting.names(at, self.trees)]
        rows = error.rows[:4] or range(min(4, len(names)))
        named = RewardError(f"{error} [{', '.join(names[i] for i in rows)}]", error.rows)
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        return named

    def lost(self, call: Call, error: Exception) -> None:
        """A scorer died or hung: another one is asked, after a pause that grows.

        Raises:
            WorkerError: that happened to the same samples too often.
        """
        self.workers_lost += 1
        for waiting, at in call.parts:
            waiting.failures += 1
            if waiting.failures >= self.limits.reward_tries:
                raise WorkerError(
                    f"{waiting.failures} reward workers were lost over the same samples, "
                    f"{', '.join(waiting.names(at, self.trees)[:4])}: {brief(error)}"
                ) from error
            waiting.at = at + waiting.at
            waiting.since = time.monotonic() + 0.1 * 2**waiting.failures
            self._wait(waiting)

    def _make_again(self, waiting: Waiting, at: list[int]) -> None:
        """Samples were lost before they were scored: their rows are run again."""
        lost, waiting.at = sorted({*at, *waiting.at}), []
        for digest in [waiting.digests[i] for i in lost]:
            for other, i in self._pending.pop(digest, []) if digest is not None else []:
                other.at.append(i)
                self._wait(other)
        parts: Parts = [(job, waiting.row[lost][waiting.job[lost] == job]) for job in dict.fromkeys(waiting.job[lost])]
        for job, mine in parts:
            job.cost.nfe -= int(job.nfe[mine].sum())  # it counts when it is run again
        self.customer.give_again(parts, waiting.bundle_failures)

    def _wait(self, waiting: Waiting) -> None:
        if waiting not in self._waiting:
            self._waiting.append(waiting)
