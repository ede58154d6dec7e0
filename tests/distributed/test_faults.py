"""Whatever dies, hangs, raises or joins meanwhile: the tree of one process, or an error that says what was lost."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace

import pytest

import treesearch as ts
from tests.support import kernels
from tests.support.beds import BEDS
from tests.support.workers import DTS, FK, METHODS, alone, limit, run, same, sound, whole
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.distributed import leases, process
from treesearch.rewards.base import RewardError

WORKER = leases.Role("worker", None, 1, 0, 2)


class Killer(threading.Thread):
    """Kills processes of a pool that have something to do with SIGKILL at random moments, as long as two are ready."""

    def __init__(self, pool, kind, kills, seed=0):
        super().__init__(daemon=True)
        self.pool, self.kind, self.kills, self.draw = pool, kind, kills, random.Random(seed)
        self.killed, self.end = [], threading.Event()

    def run(self):
        while len(self.killed) < self.kills and not self.end.wait(self.draw.uniform(0.0, 0.2)):
            ready = [a for a in getattr(self.pool, self.kind) if a.ready is None and a.info["pid"] not in self.killed]
            busy = [a.info["pid"] for a in ready if a.leases]
            if len(ready) >= 2 and busy:
                self.killed.append(self.draw.choice(busy))
                os.kill(self.killed[-1], signal.SIGKILL)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.end.set()
        self.join()


KILLED = (FK(num_particles=40), DTS(wave=16), DTS(wave=32, mode="async"), ts.BestOfN(), DTS(wave=16, lag=1))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments(three, tmp_path, monkeypatch, kills):
    """Searches go on, slowly, until workers were killed; the tree and what it cost are those of one process."""
    limit(monkeypatch, three, max_failures=100)
    whole(three.pool)
    (tmp_path / "slow").touch()
    repeated = given_again = 0
    with Killer(three.pool, "workers", kills) as killer:
        for seed in count():
            method, kernel = KILLED[seed % len(KILLED)], kernels.Slow(seconds=0.005, folder=tmp_path)
            options = {"budget": ts.Budget(nfe=1600), "seed": seed, "batch_size": 8, "prompts": ["a", "b"]}
            found = ts.search(kernel, kernels.total, method, workers=three, **options)
            if method.mode == "wave":
                same(found, ts.search(BEDS["gaussian"], kernels.total, method, **options), where=f"{method}")
            else:
                sound(found, method)
            repeated += found.cost.repeated_nfe
            given_again += found.tasks[0].diagnostics["workers"]["bundles_given_again"]
            if len(killer.killed) == kills and seed >= len(KILLED) - 1:
                break
    assert given_again >= kills
    assert repeated > 0


def test_killed_scorers(scored, tmp_path, monkeypatch):
    limit(monkeypatch, scored, reward_tries=100)
    whole(scored.pool)
    reward = kernels.SlowReward(0.05)
    with Killer(scored.pool, "scorers", 1) as killer:
        for seed in count():
            options = {"budget": ts.Budget(nfe=2000), "seed": seed, "batch_size": 8}
            found = ts.search(BEDS["gaussian"], reward, ts.BestOfN(), workers=scored, **options)
            same(found, ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(), **options))
            if killer.killed:
                break
    whole(scored.pool)


def test_a_kernel_that_raises_once(three, tmp_path, caplog):
    kernel = kernels.RaisesOnce(folder=tmp_path)
    found = ts.search(kernel, kernels.total, FK(num_particles=30), budget=ts.Budget(nfe=300), workers=three)
    same(found, ts.search(BEDS["gaussian"], kernels.total, FK(num_particles=30), budget=ts.Budget(nfe=300)))
    assert (tmp_path / "raised").exists()
    assert found.cost.repeated_nfe > 0
    assert "a cosmic ray; the bundle is tried again" in caplog.text


def test_a_kernel_that_keeps_raising(three, tmp_path, monkeypatch):
    limit(monkeypatch, three, max_failures=3)
    kernel, prompts = kernels.RaisesOn(folder=tmp_path), ["fine", "also fine", "bad"]
    with pytest.raises(RuntimeError, match="no such weight") as caught:
        ts.search(kernel, kernels.total, ts.BestOfN(), prompts=prompts, budget=ts.Budget(nfe=300), workers=three)
    notes = "\n".join(caught.value.__notes__)
    assert "3 attempts at" in notes
    assert re.search(r"prompts \[.*'bad'\]", notes)  # which rows share its bundle depends on the workers' speeds
    assert "noise key" in notes
    same(run("gaussian", "fk", three), alone("gaussian", "fk"))  # the workers are of use to other searches


@pytest.mark.parametrize("where", ["kernel", "decode", "apart"])
@pytest.mark.parametrize("kind", kernels.RAISED)
def test_whatever_is_raised_is_named_with_its_traceback(request, monkeypatch, kind, where):
    """What would end a process, and what cannot travel, reaches the driver in words; no worker hangs or dies of it."""
    workers = request.getfixturevalue("scored" if where == "apart" else "three")
    limit(monkeypatch, workers, max_failures=1)
    limit(monkeypatch, workers, reward_tries=1)
    before, raises = workers.pool.restarts, kernels.Raises(kind, where)
    kernel, reward = (BEDS["gaussian"], raises) if where == "apart" else (raises, kernels.total)
    with pytest.raises((ts.WorkerError, ts.KernelError, RewardError), match=kernels.RAISED[kind][1]) as caught:
        ts.search(kernel, reward, ts.BestOfN(n=2), workers=workers)
    assert "on a worker" in "".join(caught.value.__notes__)
    assert "kernels.py" in "".join(caught.value.__notes__)
    assert workers.pool.restarts == before
    same(run("gaussian", "best of n", workers), alone("gaussian", "best of n"))


def test_a_kernel_that_ends_its_process_once(three, tmp_path):
    prompts, kernel = list("abcd"), kernels.Dies(folder=tmp_path)
    options = {"prompts": prompts, "budget": ts.Budget(nfe=400)}
    found = ts.search(kernel, kernels.total, METHODS["fk"], workers=three, **options)
    same(found, ts.search(BEDS["gaussian"], kernels.total, METHODS["fk"], **options))
    assert found.cost.repeated_nfe > 0


def test_rows_that_end_their_process_are_named(three, monkeypatch):
    """Bundles are halved until such rows are alone, so that the others' rows are done."""
    limit(monkeypatch, three, max_failures=3)
    prompts = ["a", "b", "deadly", "d"]
    with pytest.raises(ts.WorkerError, match=r"3 workers were lost over the same bundle, 1 rows.*'deadly'"):
        ts.search(
            kernels.Dies(), kernels.total, ts.BestOfN(n=1), prompts=prompts, workers=three, budget=ts.Budget(nfe=20)
        )
    same(run("gaussian", "fk", three), alone("gaussian", "fk"))


def test_a_worker_that_hangs_is_replaced(three, tmp_path, monkeypatch):
    limit(monkeypatch, three, hang_seconds=2.0)
    whole(three.pool)
    before, kernel, budget = three.pool.restarts, kernels.HangsOnce(folder=tmp_path), ts.Budget(nfe=600)
    found = ts.search(kernel, kernels.total, METHODS["dts"], budget=budget, workers=three)
    same(found, ts.search(BEDS["gaussian"], kernels.total, METHODS["dts"], budget=budget))
    assert three.pool.restarts == before + 1


def test_a_slow_worker_is_not_hung(monkeypatch):
    """What counts is how long it has been at its step, as it says itself; one that says nothing is given a minute."""
    said = {}
    actor = leases.Actor(WORKER, 0, SimpleNamespace(pulse=SimpleNamespace(remote=lambda: said["seconds"])), None, 0.0)
    monkeypatch.setattr(leases.ray, "wait", lambda refs, timeout: (refs if said["answers"] else [], []))
    monkeypatch.setattr(leases.ray, "get", lambda ref, timeout: ref)
    for seconds, answers, hung in ((0.3, True, False), (1.1, True, True), (1.1, False, False)):
        said |= {"seconds": seconds, "answers": answers}
        actor.asked = -math.inf
        assert not actor.hangs(1.0)  # asked now
        assert actor.hangs(1.0) == hung
    actor.asked -= leases.PULSE_SECONDS
    assert actor.hangs(1.0)


def test_waiting_for_a_core_is_not_hanging(monkeypatch):
    waited = 0.0
    monkeypatch.setattr(process.host, "waited", lambda thread: waited)
    clock = process.Clock()
    clock.beat()
    time.sleep(0.2)
    assert clock.seconds() > 0.19
    waited = clock.seconds() - 0.05
    assert 0.05 <= clock.seconds() < 0.05 + time.monotonic() - clock._since - waited
    clock.beat()
    assert clock.seconds() < time.monotonic() - clock._since + 1e-3


@pytest.mark.slow
def test_a_node_comes_late_and_is_lost_with_its_samples(cluster, tmp_path):
    """One GPU here, one on a node that comes during the search and goes while what it made waits for its rewards."""
    from ray.experimental import get_object_locations

    model = LinearGaussian(dim=4000)  # states are too large for the driver's memory: they stay on their node
    kernel, reward = kernels.Slow(model, 0.02, folder=tmp_path), kernels.GatedReward(str(tmp_path))
    options = {"budget": ts.Budget(nfe=5 * 1600), "batch_size": 4}
    (tmp_path / "slow").touch()

    def until(condition):
        stop = time.monotonic() + 240
        while not condition() and not running.done():
            assert time.monotonic() < stop
            time.sleep(0.01)

    def places(ref):
        return get_object_locations([ref])[ref]["node_ids"]

    with ts.RayWorkers(2, gpus_per_worker=1, reward_workers=1) as workers, ThreadPoolExecutor(1) as thread:
        pool = workers.pool
        pool.ask(pool.workers, lambda a: a.hello.remote())
        assert [a.ready is None for a in pool.workers].count(True) == 1
        running = thread.submit(ts.search, kernel, reward, ts.BestOfN(), workers=workers, **options)
        try:  # here, for Ray starts nodes in the main thread only: a node comes, its samples wait for rewards, it goes
            node = cluster.add_node(num_cpus=1, num_gpus=1)
            until(lambda: all(a.ready is None for a in pool.workers))
            made = {a.info["node"] for a in pool.workers}
            (tmp_path / "closed").touch()
            until(lambda: any(node.node_id in places(w.ref) for w in list(pool.tenants[0]._waiting) if w.at))
            cluster.remove_node(node, allow_graceful=False)
        finally:
            (tmp_path / "slow").unlink()
            (tmp_path / "open").touch()
        found = running.result()
    assert len(made) == 2
    assert found.cost.repeated_nfe > 0
    same(found, ts.search(model, kernels.total, ts.BestOfN(), **options))


def test_no_room_for_any_worker_is_an_error(cluster):
    with (
        ts.RayWorkers(1, gpus_per_worker=7, start_seconds=1.0) as workers,
        pytest.raises(ts.WorkerError, match=r"no worker was up within 1 s: each asks for 0 CPUs and 7 GPUs"),
    ):
        ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(n=4), workers=workers)


# Memory.


def test_a_worker_without_memory_halves_its_batch_and_says_so(three, caplog):
    options = {"budget": ts.Budget(nfe=2000), "batch_size": 16}
    found = ts.search(kernels.Hungry(), kernels.total, ts.BestOfN(), workers=three, **options)
    same(found, ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(), **options))
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said
    assert len(said) == len(set(said))
    assert {w["batch_size"] for w in found.diagnostics["workers"]["by_worker"].values()} == {4}
