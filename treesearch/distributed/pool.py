"""The pool: the processes, and the one place where their answers are awaited."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from treesearch.distributed.cluster import Cluster, resources
from treesearch.distributed.leases import FETCH_SECONDS, Actor, Lease, Role, Tenant
from treesearch.distributed.process import TorchSettings
from treesearch.distributed.raised import Raised, brief, cause_of, pickling
from treesearch.distributed.scorer import Scorer
from treesearch.distributed.settings import Settings
from treesearch.distributed.sharing import Speeds
from treesearch.distributed.worker import Worker
from treesearch.errors import WorkerError
from treesearch.interrupts import interrupts_deferred

log = logging.getLogger("treesearch")

AHEAD = 2  # bundles under way at a worker: one that runs and one that follows without a gap


class Pool:
    """Processes of two kinds, workers and scorers."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._cluster = settings, Cluster(settings)
        self.numbers = itertools.count()
        self.tenants: list[Tenant[Any]] = []
        self.restarts = 0
        self.speeds: dict[tuple[int, int], Speeds] = {}  # by kernel and batch size
        self._shared: OrderedDict[tuple[str, int], tuple[Any, int, Any]] = OrderedDict()
        worker = Role("worker", ray.remote(Worker), settings.worker_cpus, settings.gpus_per_worker, AHEAD)
        cpus, gpus = settings.reward_worker_cpus, settings.gpus_per_reward_worker
        scorer = Role("reward worker", ray.remote(Scorer), cpus, gpus, 1)
        self.workers = [self._start(worker) for _ in range(settings.num_workers)]
        self.scorers = [self._start(scorer) for _ in range(settings.reward_workers)]

    @property
    def actors(self) -> list[Actor]:
        """All of them."""
        return [*self.workers, *self.scorers]

    def shutdown(self) -> None:
        """End every process; Ray too, if it was started for them."""
        for actor in self.actors:
            ray.kill(actor.handle)
        self.workers, self.scorers, self._shared = [], [], OrderedDict()
        self._cluster.leave()

    def enter(self, tenant: Tenant[Any]) -> None:
        """Serve a tenant from now on."""
        self.tenants.append(tenant)

    def leave(self, tenant: Tenant[Any]) -> None:
        """Serve it no more: its leases are dropped, whatever comes of them."""
        self.tenants.remove(tenant)
        for actor in self.actors:
            actor.leases = [lease for lease in actor.leases if lease.owner is not tenant]

    def share(self, what: str, made: Any) -> tuple[int, list[Any]]:
        """(number, [reference]) of a kernel or reward, put into the object store once; the last four are kept."""
        key = (what, id(made))
        if key not in self._shared:
            try:
                reference = ray.put(made)
            except Exception as error:
                raise WorkerError(
                    f"this {what} cannot travel to workers, give a ts.Recipe(factory, ...) that builds it there: "
                    f"{pickling(error)}"
                ) from error
            self._shared[key] = made, next(self.numbers), reference
            while len(self._shared) > 4:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        _, number, reference = self._shared[key]
        return number, [reference]

    def ask(self, actors: list[Actor], call: Any) -> Any:
        """The answer of any one of these processes to a small question; asked again if it dies."""
        last: Exception | None = None
        for _ in range(self.settings.max_failures):
            actor = self._any_ready(actors)
            try:
                answer = ray.get(call(actor.handle), timeout=self.settings.start_seconds)
            except RayTaskError as error:
                raise cause_of(error) from None
            except (RayError, GetTimeoutError) as error:
                last = error
                self.lost(actor, error)
                continue
            if isinstance(answer, Raised):
                raise answer.error()
            return answer
        raise WorkerError(f"{self.settings.max_failures} workers died of the same question: {brief(last)}")

    def _any_ready(self, actors: list[Actor]) -> Actor:
        while not (ready := [a for a in actors if a.ready is None]):
            self.greet(timeout=1.0)
            self._check_start()
        return min(ready, key=lambda a: len(a.leases))

    def _check_start(self) -> None:
        """Raises:
        WorkerError: none of the workers, or of the scorers, came up in time.
        """
        seconds = self.settings.start_seconds
        for actors in (self.workers, self.scorers):
            if not actors or any(a.ready is None for a in actors):
                continue
            if time.monotonic() - min(a.started for a in actors) > seconds:
                of = actors[0].role
                raise WorkerError(
                    f"no {of.name} was up within {seconds:g} s: each asks for {of.cpus:g} CPUs and {of.gpus:g} GPUs, "
                    f"and the cluster has {resources()}: ask for less, or give more start_seconds"
                )

    def greet(self, timeout: float) -> None:
        """Let processes that have come up join."""
        waiting = {a.ready: a for a in self.actors if a.ready is not None}
        if waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
            for reference in ready:
                self._join(waiting[reference])

    def _join(self, actor: Actor) -> None:
        try:
            actor.info = ray.get(actor.ready, timeout=FETCH_SECONDS)
            actor.ready = None
        except RayTaskError as error:
            raise WorkerError(f"a worker could not start: {cause_of(error)}") from error
        except (RayError, GetTimeoutError) as error:
            log.warning("a worker died before it was ready (%s): starting another", type(error).__name__)
            self._replace(actor)

    def _replace(self, actor: Actor) -> None:
        """Start another process in the place of one that is lost."""
        self.restarts += 1
        ray.kill(actor.handle)
        for actors in (self.workers, self.scorers):
            if actor in actors:
                actors[actors.index(actor)] = self._start(actor.role)

    def _start(self, role: Role) -> Actor:
        threads = max(1, int(role.cpus))
        handle = role.kind.options(
            num_cpus=role.cpus, num_gpus=role.gpus, max_restarts=0, max_task_retries=0, max_concurrency=AHEAD + 4
        ).remote(threads, TorchSettings())
        return Actor(role, next(self.numbers), handle, handle.hello.remote(), time.monotonic())

    @interrupts_deferred()
    def pump(self) -> None:
        """Send what can be sent, wait for one answer or for something to be due, and take in all that is there."""
        for tenant in self.tenants:
            tenant.dispatch()
        refs: dict[Any, Any] = {a.ready: a for a in self.actors if a.ready is not None}
        refs |= {lease.refs[0]: lease for a in self.actors for lease in a.leases}
        due = min([1.0, *(tenant.due() for tenant in self.tenants)])
        if not refs:
            time.sleep(min(due, 0.05))
        found, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0) if refs else ([], [])
        if not found and any(tenant.spare() for tenant in self.tenants):
            return
        if not found and refs:
            found, _ = ray.wait(list(refs), num_returns=1, timeout=due)
        for reference in found:
            of = refs[reference]
            if isinstance(of, Actor):
                self._join(of)
            else:
                self._take(of)
        self._watch()
        self._check_start()

    def _take(self, lease: Lease) -> None:
        """An answer, or word that none will come."""
        actor = next((a for a in self.actors if lease in a.leases), None)
        if actor is None:  # its process was replaced meanwhile, or its owner has left
            return
        try:
            answer: Any = ray.get(lease.refs[0], timeout=FETCH_SECONDS)
        except RayActorError as error:
            self.lost(actor, error)
        except (RayError, GetTimeoutError) as error:
            lease.owner.missed(lease, actor, error)
        else:
            actor.done(lease)
            lease.owner.received(lease, actor, answer)

    def lost(self, actor: Actor, error: Exception) -> None:
        """A process is gone, or given up: another one starts, and what was under way is its owners' to give again."""
        why = brief(error) if isinstance(error, WorkerError) else type(error).__name__
        log.warning("%s %d is gone (%s): its work is done again", actor.role.name, actor.number, why)
        leases, actor.leases = actor.leases, []
        self._replace(actor)
        for lease in leases:
            lease.owner.lost(lease, error)

    def _watch(self) -> None:
        """Replace processes that hang: no answer for too long, and no step forward either."""
        for actor in [a for a in self.actors if a.leases]:
            limit = actor.leases[0].owner.patience(actor)
            if actor.seconds() > limit and actor.hangs(limit):
                self.lost(actor, WorkerError(f"no answer for {actor.seconds():.0f} s"))
