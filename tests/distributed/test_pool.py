"""The pool by itself: a Ray of this file's own making answers, and tenants note what they are told."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.exceptions import ObjectLostError, RayActorError

from treesearch.backends.base import Spec
from treesearch.budget import Cost
from treesearch.core.tree import Tree
from treesearch.distributed import pool as pools
from treesearch.distributed import rewards as services
from treesearch.distributed.bundles import Reply
from treesearch.distributed.bundling import Kept, job_of
from treesearch.distributed.leases import Lease
from treesearch.distributed.pool import Pool
from treesearch.distributed.rewards import Rewards
from treesearch.distributed.settings import Settings
from treesearch.engine.segments import Segments
from treesearch.errors import WorkerError

SPEC = Spec(5, (1,), (1,), (True,) * 6, torch.device("cpu"), torch.float64, None)


class Handle:
    """A process that is up at once and answers what `FakeRay.answers` says."""

    def __init__(self, ray):
        self.ray = ray
        self.hello = self.pulse = self.score = SimpleNamespace(remote=self.call)
        self.asked = []

    def call(self, *args):
        self.asked.append(args)
        return self.ray.new()


class FakeRay:
    """References are numbers; those in `answers` are ready, an exception among them is raised."""

    def __init__(self):
        self.numbers, self.answers, self.killed = itertools.count(), {}, []

    def new(self, answer=None):
        reference = next(self.numbers)
        if answer is not None:
            self.answers[reference] = answer
        return reference

    def remote(self, kind):
        def start(*args):
            handle = Handle(self)
            handle.hello = SimpleNamespace(remote=lambda: self.new({"pid": 1}))
            return handle

        return SimpleNamespace(options=lambda **how: SimpleNamespace(remote=start))

    def wait(self, refs, num_returns=1, timeout=None):
        return [r for r in refs if r in self.answers][:num_returns], []

    def get(self, reference, timeout=None):
        if isinstance(answer := self.answers[reference], Exception):
            raise answer
        return answer

    def kill(self, handle):
        self.killed.append(handle)


class Tenant:
    """Notes what it is told, in order."""

    def __init__(self, pool, seconds=1e9):
        self.pool, self.seconds, self.told, self.work = pool, seconds, [], []

    def dispatch(self):
        self.told.append("dispatch")

    def due(self):
        return 0.0

    def spare(self):
        return bool(self.work) and self.work.pop() is None

    def patience(self, actor):
        return self.seconds

    def received(self, lease, actor, answer):
        self.told.append(("received", lease, answer))

    def missed(self, lease, actor, error):
        self.told.append(("missed", lease, error))
        actor.done(lease)

    def lost(self, lease, error):
        self.told.append(("lost", lease, str(error)))

    def lend(self, actor, answer=None, **how):
        lease = Lease(owner=self, refs=(self.pool.ray.new(answer),), **how)
        actor.take(lease)
        return lease


@pytest.fixture
def ray(monkeypatch):
    made = FakeRay()
    monkeypatch.setattr(pools, "ray", made)
    monkeypatch.setattr(services, "ray", made)
    monkeypatch.setattr(pools, "Cluster", lambda settings: SimpleNamespace(leave=lambda: None))
    return made


@pytest.fixture
def pool(ray):
    made = Pool(Settings(num_workers=2, reward_workers=1))
    made.ray = ray
    made.pump()
    assert all(actor.free for actor in made.actors)
    return made


def tenants(pool, count=2):
    made = [Tenant(pool) for _ in range(count)]
    for tenant in made:
        pool.enter(tenant)
    return made


def test_an_answer_is_its_owner_s(pool):
    one, other = tenants(pool)
    worker = pool.workers[0]
    mine, theirs = one.lend(worker, "a"), other.lend(worker, "b")
    still = other.lend(pool.scorers[0])
    assert not worker.free  # two are ahead
    pool.pump()
    assert one.told == ["dispatch", ("received", mine, "a")]
    assert other.told == ["dispatch", ("received", theirs, "b")]
    assert worker.leases == []
    assert pool.scorers[0].leases == [still]
    assert not pool.scorers[0].free  # one is ahead


def test_a_lease_of_a_tenant_that_has_left_is_dropped(pool):
    """Its answer is taken by nobody, and its process is free for others."""
    gone, stays = tenants(pool)
    worker = pool.workers[0]
    gone.lend(worker, "late")
    dead = gone.lend(worker, RayActorError())
    kept = stays.lend(pool.workers[1])
    pool.leave(gone)
    assert worker.free
    assert pool.workers[1].leases == [kept]
    pool.pump()
    pool._take(dead)  # an answer that was on its way when it left
    assert gone.told == []
    assert stays.told == ["dispatch"]
    assert pool.restarts == 0


def test_a_process_that_dies_gives_its_leases_back(pool, ray, caplog):
    one, other = tenants(pool)
    worker = pool.workers[1]
    first, second = one.lend(worker, RayActorError()), other.lend(worker)
    with caplog.at_level(logging.WARNING):
        pool.pump()
    assert [told[:2] for told in one.told[1:]] == [("lost", first)]
    assert [told[:2] for told in other.told[1:]] == [("lost", second)]
    assert ray.killed == [worker.handle]
    assert pool.workers[1] is not worker
    assert pool.restarts == 1
    assert caplog.messages == [f"worker {worker.number} is gone (RayActorError): its work is done again"]


def test_an_answer_that_is_lost_leaves_its_process(pool):
    (one,) = tenants(pool, 1)
    lost = one.lend(pool.workers[0], ObjectLostError("ab", None, "here"))
    pool.pump()
    assert [told[:2] for told in one.told[1:]] == [("missed", lost)]
    assert pool.workers[0].leases == []
    assert pool.restarts == 0


def test_a_process_is_given_up_when_its_owner_s_patience_ends(pool, monkeypatch, caplog):
    (one,) = tenants(pool, 1)
    worker = pool.workers[0]
    slow = one.lend(worker)
    monkeypatch.setattr(type(worker), "hangs", lambda self, limit: True)
    pool.pump()
    assert one.told == ["dispatch"]
    one.seconds = 30.0
    worker.began -= 100.0
    pool.pump()
    assert one.told[2:] == [("lost", slow, "no answer for 100 s")]
    assert "is gone (no answer for 100 s): its work is done again" in caplog.text


def test_what_runs_alone_has_its_process_to_itself(pool):
    (one,) = tenants(pool, 1)
    worker = pool.workers[0]
    lease = one.lend(worker, "done", alone=True)
    assert not worker.open
    pool.pump()
    assert one.told[-1] == ("received", lease, "done")
    assert worker.free


def test_spare_moments_come_after_answers(pool):
    (one,) = tenants(pool, 1)
    one.work = [None, None]
    one.lend(pool.workers[0], "a")
    pool.pump()
    assert len(one.work) == 2
    pool.pump()
    assert len(one.work) == 1


# The service of rewards is such a tenant.


class Customer:
    def __init__(self):
        self.arrived, self.again = [], []

    def arrive(self, job, rows, rewards):
        self.arrived += [(int(row), float(reward)) for row, reward in zip(rows, rewards, strict=True)]

    def give_again(self, parts, failures):
        self.again.append(([rows.tolist() for _, rows in parts], failures))


@pytest.fixture
def service(pool):
    """Four samples of nodes 1 to 4 wait to be scored, two of them equal."""
    tree = Tree(5, 0)
    nodes = tree.append(np.zeros(4, int), np.zeros(4, int), np.arange(4, dtype=np.uint64))
    segments = Segments(np.zeros(4, int), nodes, nodes)
    job = job_of(0, [(0, segments)], [tree], SPEC, Kept())
    made = Rewards(Customer(), pool, ["setup"], 7, 64, [tree])
    pool.enter(made)
    none = np.empty(0)
    unknown = np.full(4, np.nan)
    reply = Reply(1, none, none, unknown, Cost(nfe=20), None, digests=[b"a", b"b", b"a", None])
    made.add([(job, np.arange(4))], 2, "samples", reply)
    made._waiting[0].since = 0.0  # it has waited long enough
    return made


def test_rewards_that_the_kernel_knew_have_arrived(service):
    """A guide's rows come with theirs; samples are of the others."""
    job, none = service._waiting[0].job[0], np.empty(0)
    reply = Reply(2, none, none, np.array([np.nan, 0.5, np.nan, 0.25]), Cost(), None, digests=[b"c", None])
    service.add([(job, np.arange(4))], 2, "samples", reply)
    assert service.customer.arrived == [(1, 0.5), (3, 0.25)]
    assert service._waiting[-1].row.tolist() == [0, 2]
    known = Reply(3, none, none, np.ones(4), Cost(), None)
    waiting = len(service._waiting)
    service.add([(job, np.arange(4))], 2, None, known)
    assert len(service._waiting) == waiting


def test_equal_samples_are_scored_once(pool, service, ray):
    pool.pump()
    (call,) = pool.scorers[0].leases
    assert pool.scorers[0].handle.asked[-1][2] == [(["samples"], None, [0, 1, 3])]
    ray.answers[call.refs[0]] = np.array([1.0, 2.0, 3.0]), 3, 1, 0.3
    pool.pump()
    assert sorted(service.customer.arrived) == [(0, 1.0), (1, 2.0), (2, 1.0), (3, 3.0)]
    assert service.stats() == {"attempts": 1, "cache_hits": 1, "workers_lost": 0}


def test_samples_of_a_scorer_that_died_go_to_another_until_too_many_have(pool, service, ray):
    for died in range(1, pool.settings.reward_tries):
        pool.pump()
        (call,) = pool.scorers[0].leases
        ray.answers[call.refs[0]] = RayActorError()
        pool.pump()
        assert service.workers_lost == died
        assert pool.scorers[0].leases == []
        assert service._waiting[0].at == [0, 1, 3]
        service._waiting[0].since = 0.0
        pool.pump()  # the next one is up
    pool.pump()
    (call,) = pool.scorers[0].leases
    ray.answers[call.refs[0]] = RayActorError()
    text = r"4 reward workers were lost over the same samples, node 1 \(t = 0\) of task 0, node 2 .*, node 4"
    with pytest.raises(WorkerError, match=text):
        pool.pump()


def test_samples_that_are_lost_are_made_again(service):
    service._make_again(service._waiting[0], [0, 1, 3])
    assert service.customer.again == [([[0, 1, 3]], 2)]
    assert service._waiting[0].at == [2]  # equal to one that was lost: now it is asked itself
