"""Workers on Ray: the tree of one process, whatever dies, hangs or joins meanwhile. One Ray for the whole file."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import kernels, laws
from tests.support.beds import BEDS, half_a_step
from tests.support.kernels import noted
from treesearch.backends.base import Guided, shift_mean
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS
from treesearch.distributed import leases, process
from treesearch.errors import UsageError
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import RewardError
from treesearch.runs import folder as runs

TESTS = Path(__file__).parents[1]
DTS, DTS_STAR, FK = ts.DiffusionTreeSampling, ts.DiffusionTreeSearch, ts.FeynmanKac
COLUMNS = ("parent", "t", "visits", "value", "reward", "log_w", "key")
KERNELS = BEDS | {"drifting": Guided(BEDS["gaussian"], shift_mean(half_a_step), "drift")}
NARROW = {"widening_c": 1.0, "widening_alpha": 0.5, "branch_at": (3, 2, 1)}
METHODS = {
    "best of n": ts.BestOfN(),
    "fk": FK(num_particles=8),
    "fk resampling at every level": FK(num_particles=8, ess_threshold=1.0, potential="max", schedule=(2, 1, 0)),
    "fk tempered": FK(num_particles=8, schedule=(2, 1, 0), tempering=(0.3, 0.6, 1.0)),
    "fk tempered by ess": FK(num_particles=8, tempering="ess", lam=2.0),
    "dts": DTS(wave=8, **NARROW),
    "dts lag 1": DTS(wave=8, lag=1, **NARROW),
    "dts star": DTS_STAR(wave=8, **NARROW),
    "beam": ts.BeamSearch(beam_width=2, branching=3),
    "dts, lambda chosen": DTS(wave=8, lam="auto", **NARROW),
    "tree sampling": ts.TreeSampling(),
    "tree search": ts.TreeSearch(wave=6),
}
DESCENTS = {
    "rollover": ts.RolloverBudget(quota=3, beside=4),
    "depth first": ts.DepthFirst(threshold=0.5, backtracks=3, depth=2, beside=4),
    "noise": ts.NoiseSearch(neighbours=6, rounds=3, initial=2),
}
WORKER = leases.Role("worker", None, 1, 0, 2)
HEAD = {"num_cpus": 10, "num_gpus": 1, "include_dashboard": False}
SYSTEM = {
    "enable_worker_prestart": False,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this file's own, away from any other on the machine."""
    folder = tempfile.mkdtemp(prefix="ts", dir="/tmp")  # paths of sockets are short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=HEAD | {"_system_config": SYSTEM})
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.CRITICAL)
        yield made
        ray.shutdown()
        made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def three(scored):  # those start meanwhile
    with ts.RayWorkers(3) as workers:
        yield workers


@pytest.fixture(scope="module")
def scored(cluster):
    """A worker, and two that score."""
    with ts.RayWorkers(1, reward_workers=2) as workers:
        yield workers


def limit(monkeypatch, workers, **changed):
    """Other limits for a pool that runs."""
    monkeypatch.setattr(workers.pool, "settings", replace(workers.pool.settings, **changed))


def whole(pool, seconds=600.0):
    """Wait until every process of a pool is there."""
    end = time.monotonic() + seconds
    while any(a.ready is not None for a in (*pool.workers, *pool.scorers)):
        assert time.monotonic() < end, "the workers did not come up"
        pool.greet(timeout=0.1)


def eventually(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def same(found, alone, *, reward_calls=True, where=""):
    """Trees, samples, weights and what they cost are those of one process, bit for bit."""
    for i, (got, want) in enumerate(zip(found.tasks, alone.tasks, strict=True)):
        for column in COLUMNS:
            a, b = getattr(got.tree, column), getattr(want.tree, column)
            np.testing.assert_array_equal(a, b, f"{where} task {i}: {column}", strict=True)
        assert torch.equal(got.samples, want.samples)
        assert torch.equal(got.log_weights, want.log_weights)
        assert got.lam == want.lam
        assert got.status == want.status
    assert found.cost.nfe == alone.cost.nfe
    assert found.cost.reward_calls == alone.cost.reward_calls or not reward_calls


@functools.cache
def alone(bed, name, **options):
    return run(bed, name, None, **options)


def run(bed, name, workers, reward=kernels.total, prompts=("a", "b", "c"), **options):
    kernel, method = KERNELS[bed], METHODS[name]
    rollouts = 90 if method.lam == "auto" else 24
    budget = ts.Budget(nfe=len(prompts) * rollouts * kernel.num_steps)
    return ts.search(kernel, reward, method, prompts=prompts, budget=budget, workers=workers, **options)


# The tree of one process.


ALIKE = ("mixture", "ring", "gaussian-3d")  # in what workers do, to others
EACH = [pytest.param(bed, marks=pytest.mark.slow) if bed in ALIKE else bed for bed in KERNELS]


@pytest.mark.parametrize("bed", EACH)
def test_three_workers_make_the_tree_of_one_process(three, bed):
    for name in METHODS:
        if METHODS[name].lam == "auto" and bed in ("discrete", "masked"):
            continue  # a third of their samples have the highest reward: there is no λ to choose
        found = run(bed, name, three)
        same(found, alone(bed, name), where=name)
        assert len(found.tasks[2].samples) > 5


def descend(workers, **options):
    """Transitions that are drawn from again and again stay where they were made; a stolen row evaluates its own."""
    options = {"prompts": ["a", "b"], "budget": ts.Budget(nfe=240), "batch_size": 8} | options
    for name, method in DESCENTS.items():
        found, want = (
            ts.search(KERNELS["drifting"], kernels.total, method, workers=w, **options) for w in (workers, None)
        )
        same(found, want, where=name)
        assert want.cost.repeated_nfe == 0
        assert found.cost.repeated_nfe == found.tasks[0].diagnostics["workers"]["stolen_rows"], name


def test_descents_do_too(three):
    descend(three)


def fewer(workers):
    for name, bed in zip(METHODS, [*KERNELS, *KERNELS], strict=False):
        same(run(bed, name, workers), alone(bed, name), where=f"{name} on {bed}")


def test_one_worker_does_too(cluster):
    with ts.RayWorkers(1) as workers:
        fewer(workers)
        descend(workers, keep_states="none")


def test_two_workers_that_share_a_gpu_do_too_and_leave_the_cpus(three, scored):
    import ray

    free = HEAD["num_cpus"] - 6  # six processes of other pools
    eventually(lambda: ray.available_resources()["CPU"] == free, 30)
    with ts.RayWorkers(2, gpus_per_worker=0.5) as workers:
        whole(workers.pool)
        assert [a.info["gpu_ids"] for a in workers.pool.workers] == [["0"], ["0"]]
        eventually(lambda: ray.available_resources().get("GPU", 0) == 0, 10)
        assert ray.available_resources()["CPU"] == free  # for tasks of other kinds
        for name in ("fk", "dts"):
            same(run("gaussian", name, workers), alone("gaussian", name), where=name)


@pytest.mark.parametrize("keep", ["frontier", "none"])
def test_states_that_are_not_kept(three, keep):
    for name in ("fk", "fk resampling at every level", "dts", "dts lag 1", "beam"):
        found, want = (run("gaussian-3d", name, w, keep_states=keep, batch_size=4) for w in (three, None))
        same(found, want, where=name)
        same(found, alone("gaussian-3d", name), where=name)


@pytest.mark.parametrize("options", [{"batch_invariant": True, "batch_size": 7}, {"batch_size": 1}, {"batch_size": 5}])
def test_batches_change_nothing(three, options):
    for name in ("best of n", "fk", "dts star"):
        same(run("mixture", name, three, **options), alone("mixture", name), where=name)


@pytest.mark.parametrize("name", ["fk", "dts", "dts lag 1", "dts star", "beam"])
def test_every_snapshot_is_that_of_one_process(three, name):
    """What a callback sees after a wave does not depend on what is under way already."""

    def look(seen, snapshot):
        record = {k: v for k, v in snapshot.record.items() if k not in ("seconds", "workers")}
        found = snapshot.result()
        # Not the status: it tells what was asked, and with workers the next wave has been.
        tasks = [(task.rewards.tolist(), task.log_weights.tolist()) for task in found.tasks]
        seen.append((record, tasks, snapshot.best_reward, snapshot.cost.nfe, found.cost.reward_calls))

    seen = {three: [], None: []}
    for workers, snapshots in seen.items():
        run("gaussian", name, workers, batch_size=8, callbacks=[functools.partial(look, snapshots)])
    assert seen[three] == seen[None]


def test_one_task_without_prompts(three):
    for name in ("best of n", "fk", "dts"):
        found, want = (
            ts.search(BEDS["ring"], kernels.total, METHODS[name], budget=ts.Budget(nfe=450), workers=w)
            for w in (three, None)
        )
        same(found, want)


@pytest.mark.parametrize("name", ["best of n", "fk", "dts", "dts star"])
def test_scorers_change_nothing(scored, name):
    for bed in ("gaussian", "drifting", "discrete"):
        found = run(bed, name, scored)
        same(found, alone(bed, name), reward_calls=bed != "discrete", where=bed)
        assert found.tasks[0].diagnostics["workers"]["rewards"]["attempts"] > 0


@pytest.mark.parametrize("name", ["fk", "tree sampling", "beam"])
def test_declared_values_are_those_of_one_process_with_workers_and_with_scorers(three, scored, name):
    """What the kernel knows is not scored again, and samples are."""
    for way in ("valued(gaussian, linear(0.5), {0}:worth)", "tds(gaussian, linear(0.5), value={0}:worth)"):
        kernel = ts.Recipe(way.format("tests.support.kernels"))
        here = kernel.kernel()
        options = {"method": METHODS[name], "prompts": ["a", "b"], "budget": ts.Budget(nfe=240)}
        want = ts.search(here, here.scores, **options)
        assert want.cost.reward_calls == sum(len(task.leaves) for task in want.tasks)
        for workers in (three, scored):
            for one, reward in ((kernel, ts.Recipe("linear(0.5)")), (here, here.scores)):
                same(ts.search(one, reward, workers=workers, **options), want, where=way)
            with pytest.raises(UsageError, match=r"values of reward 'linear.0.5.', the search is for 'linear.0.6.'"):
                ts.search(kernel, ts.Recipe("linear(0.6)"), workers=workers, **options)


def test_workers_are_told_what_one_of_them_measured(three, tmp_path):
    """Its pilot runs once a search: here for an object, in one worker for a recipe."""
    files = [str(tmp_path / name) for name in ("alone", "object", "recipe")]
    here = [kernels.steered(file) for file in files[:2]]
    options = {"method": METHODS["fk"], "budget": ts.Budget(nfe=32)}
    want = ts.search(here[0], here[0].scores, **options)
    same(ts.search(here[1], here[1].scores, workers=three, **options), want)
    recipe = ts.Recipe(kernels.steered, {"file": files[2]})
    seen = ts.Recipe(kernels.seen, {"file": files[2]})
    found = ts.search(recipe, seen, workers=three, **options)
    same(found, want)
    assert found.diagnostics["measured"] == {"nfe": 32}
    own, *others = ([int(pid) for pid in noted(file)] for file in files)
    assert own == others[0] == [os.getpid()]
    assert len(others[1]) == 1
    assert others[1] != own


@pytest.mark.parametrize("keep", ["all", "frontier", "none"])
@pytest.mark.parametrize("name", ["best of n", "fk", "dts lag 1"])
def test_a_run_changes_hands(three, tmp_path, name, keep):
    kernel, reward = BEDS["gaussian"], kernels.total
    half, full = ts.Budget(nfe=3 * 40), ts.Budget(nfe=3 * 160)
    options = {"prompts": ["a", "b", "c"], "keep_states": keep}
    want = ts.search(kernel, reward, METHODS[name], budget=half, store=tmp_path / "want", **options)
    want = ts.resume(tmp_path / "want", kernel, reward, budget=full)
    for first, second in ((three, None), (None, three), (three, three)):
        store = tmp_path / f"{first}{second}"
        ts.search(kernel, reward, METHODS[name], budget=half, store=store, workers=first, **options)
        found = ts.resume(store, kernel, reward, budget=full, workers=second)
        same(found, want, where=f"{first} {second}")


def test_a_kernel_without_a_fingerprint_is_checked_on_a_worker(three, tmp_path):
    kernel, other = kernels.Nameless(BEDS["gaussian"]), kernels.Nameless(KERNELS["drifting"])
    ts.search(kernel, kernels.total, METHODS["dts"], budget=ts.Budget(nfe=100), store=tmp_path / "run", workers=three)
    with pytest.raises(ts.StoreError, match="does not reproduce"):
        ts.resume(tmp_path / "run", other, kernels.total, budget=ts.Budget(nfe=200), workers=three)
    assert three.pool.tenants == []  # the one that failed is gone as well
    found = ts.resume(tmp_path / "run", kernel, kernels.total, budget=ts.Budget(nfe=200), workers=three)
    assert 195 < found.cost.nfe <= 200


def sound(found, method):
    """An asynchronous result: nothing under way, values, visits and cost as its leaves and edges give them."""
    edges = 0
    for task in found.tasks:
        tree, extra = task.tree, task.diagnostics
        assert extra["unobserved"] == 0
        assert not np.isnan(tree.value).any()
        laws.values_add_up(tree, method.lam)
        laws.visits_add_up(tree, extra["iterations"])
        edges += int((np.minimum(tree.t[tree.parent[1:]], 5) - tree.t[1:]).sum())
    assert found.cost.nfe == edges


# Faults.


class Killer(threading.Thread):
    """Kills ready processes of a pool with SIGKILL at random moments, as long as two are ready."""

    def __init__(self, pool, kind, kills, seed=0):
        super().__init__(daemon=True)
        self.pool, self.kind, self.kills, self.draw = pool, kind, kills, random.Random(seed)
        self.killed, self.end = [], threading.Event()

    def run(self):
        while len(self.killed) < self.kills and not self.end.wait(self.draw.uniform(0.0, 0.2)):
            ready = [a.info["pid"] for a in getattr(self.pool, self.kind) if a.ready is None]
            ready = [pid for pid in ready if pid not in self.killed]
            if len(ready) >= 2:
                self.killed.append(self.draw.choice(ready))
                os.kill(self.killed[-1], signal.SIGKILL)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.end.set()
        self.join()


KILLED = (FK(num_particles=40), DTS(wave=16), DTS(wave=32, mode="async"), ts.BestOfN(), DTS(wave=16, lag=1))


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
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
            if len(killer.killed) == kills and seed >= len(KILLED):
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
def test_whatever_is_raised_is_named_with_its_traceback(three, scored, monkeypatch, kind, where):
    """What would end a process, and what cannot travel, reaches the driver in words; no worker hangs or dies of it."""
    workers = scored if where == "apart" else three
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


def test_rewards_of_a_guide_are_handed_on(three):
    """Kernel and reward travel apart; that they share the reward is told."""
    reward = linear(0.8)
    arguments = TDS(BEDS["gaussian"], reward), reward, ts.FeynmanKac(num_particles=8)
    found, here = (ts.search(*arguments, budget=ts.Budget(nfe=120), workers=w) for w in (three, None))
    same(found, here)
    assert found.cost.reward_calls == here.cost.reward_calls > 120


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
def test_a_node_comes_late_and_is_lost_with_its_samples(cluster, tmp_path, monkeypatch):
    """One GPU here, one on a node that comes during the search and goes while what it made waits for its rewards."""
    from ray.experimental import get_object_locations

    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)  # only in the main thread
    model = LinearGaussian(dim=4000)  # states are too large for the driver's memory: they stay on their node
    kernel, reward = kernels.Slow(model, 0.02, folder=tmp_path), kernels.GatedReward(str(tmp_path))
    options = {"budget": ts.Budget(nfe=5 * 1600), "batch_size": 4}
    (tmp_path / "slow").touch()
    made, end = [], threading.Event()

    def until(condition):
        stop = time.monotonic() + 240
        while not condition() and not end.is_set():
            assert time.monotonic() < stop
            time.sleep(0.01)

    def places(ref):
        return get_object_locations([ref])[ref]["node_ids"]

    def meddle(pool):
        """A node comes; rewards are held up until some of its samples wait; it goes."""
        try:
            node = cluster.add_node(num_cpus=1, num_gpus=1)
            until(lambda: all(a.ready is None for a in pool.workers))
            made.extend(a.info["node"] for a in pool.workers)
            (tmp_path / "closed").touch()
            until(lambda: any(node.node_id in places(w.ref) for w in list(pool.tenants[0]._waiting) if w.at))
            cluster.remove_node(node, allow_graceful=False)
        finally:
            (tmp_path / "slow").unlink()
            (tmp_path / "open").touch()
            end.wait(240)  # Ray's processes end with the thread that started them

    with ts.RayWorkers(2, gpus_per_worker=1, reward_workers=1) as workers:
        workers.pool.ask(workers.pool.workers, lambda a: a.hello.remote())
        assert [a.ready is None for a in workers.pool.workers].count(True) == 1
        meddler = threading.Thread(target=meddle, args=(workers.pool,))
        meddler.start()
        try:
            found = ts.search(kernel, reward, ts.BestOfN(), workers=workers, **options)
        finally:
            end.set()
            meddler.join()
    assert len(set(made)) == 2
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


# Rewards of their own.


def test_rewards_are_batched_across_tasks_and_known_by_content(scored, tmp_path):
    reward = kernels.NotingReward(str(tmp_path / "calls"))
    prompts = [f"prompt {i % 3}" for i in range(6)]
    options = {"prompts": prompts, "budget": ts.Budget(nfe=6 * 60), "batch_size": 16}
    found = ts.search(BEDS["discrete"], reward, ts.BestOfN(), workers=scored, **options)
    same(found, ts.search(BEDS["discrete"], kernels.total, ts.BestOfN(), **options), reward_calls=False)
    calls = [json.loads(line) for line in noted(tmp_path / "calls")]
    assert max(len(set(call)) for call in calls) > 1  # of several tasks
    distinct = {(p, x) for p, task in zip(prompts, found.tasks, strict=True) for x in task.samples.flatten().tolist()}
    assert sum(map(len, calls)) == found.cost.reward_calls == len(distinct)
    assert found.tasks[0].diagnostics["workers"]["rewards"]["cache_hits"] == 6 * 20 - len(distinct)


def test_without_a_cache_every_sample_is_scored(scored, tmp_path, monkeypatch):
    limit(monkeypatch, scored, reward_cache=0)
    reward = kernels.NotingReward(str(tmp_path / "calls"))
    options = {"prompts": ["a", "b"], "budget": ts.Budget(nfe=120)}
    found = ts.search(BEDS["discrete"], reward, ts.BestOfN(), workers=scored, **options)
    same(found, ts.search(BEDS["discrete"], kernels.total, ts.BestOfN(), **options))
    assert sum(len(json.loads(line)) for line in noted(tmp_path / "calls")) == 40


def test_a_failing_reward_is_asked_again_with_growing_pauses(scored, tmp_path):
    reward, budget = kernels.FailingReward(str(tmp_path / "calls"), 2), ts.Budget(nfe=100)
    found = ts.search(BEDS["gaussian"], reward, ts.BestOfN(), budget=budget, workers=scored, batch_size=100)
    same(found, ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(), budget=budget))
    times = [float(line) for line in noted(tmp_path / "calls")]
    assert times[1] - times[0] >= 0.1
    assert times[2] - times[1] > 1.5 * (times[1] - times[0])


def test_a_reward_that_always_fails_ends_the_search(scored, tmp_path, monkeypatch):
    limit(monkeypatch, scored, reward_tries=2)
    reward = kernels.FailingReward(str(tmp_path / "calls"), 1000)
    with pytest.raises(RewardError, match=r"service unavailable.*node \d+ \(t = 0\) of task 0"):
        ts.search(BEDS["gaussian"], reward, ts.BestOfN(n=4), workers=scored)
    assert len(noted(tmp_path / "calls")) == 2


@pytest.mark.parametrize("where", ["beside", "apart"])
def test_a_broken_contract_is_not_tried_again(three, scored, tmp_path, where):
    reward, workers = kernels.NanReward(str(tmp_path / "calls")), {"beside": three, "apart": scored}[where]
    with pytest.raises(RewardError, match=r"returned nan.*\[node (\d+) \(t = 0\) of task 1") as caught:
        ts.search(BEDS["gaussian"], reward, ts.BestOfN(n=2), prompts=["a", "b"], workers=workers)
    assert "of task 0" not in str(caught.value)
    assert sum(map(int, noted(tmp_path / "calls"))) <= 4  # every sample once


def test_a_reward_that_hangs_is_asked_elsewhere(scored, tmp_path, monkeypatch):
    limit(monkeypatch, scored, reward_seconds=2.0)
    reward, budget = kernels.HangingReward(str(tmp_path / "hung")), ts.Budget(nfe=300)
    found = ts.search(BEDS["gaussian"], reward, METHODS["dts"], budget=budget, workers=scored)
    same(found, ts.search(BEDS["gaussian"], kernels.total, METHODS["dts"], budget=budget))
    assert found.diagnostics["workers"]["rewards"]["workers_lost"] == 1


# Without waves.


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", [DTS, DTS_STAR])
def test_asynchronous_trees_obey_the_laws(three, scored, kind, apart):
    method = kind(wave=24, mode="async", widening_c=1.0, widening_alpha=0.5)
    kernel, workers = kernels.Slow(KERNELS["drifting"], 0.001), scored if apart else three
    options = {"prompts": ["a", "b"], "budget": ts.Budget(nfe=1500), "batch_size": 8}
    found = ts.search(kernel, kernels.total, method, workers=workers, **options)
    sound(found, method)
    assert all(task.diagnostics["staleness"]["max"] > 0 for task in found.tasks)
    assert 1500 - 2 * 5 < found.cost.nfe <= 1500
    assert found.history[-1]["staleness"] > 0


# Clocks and interrupts.


@pytest.mark.parametrize("method", [ts.BestOfN(), DTS(wave=64), DTS(wave=64, mode="async")], ids=["n", "dts", "async"])
def test_a_clock_ends_a_search(three, method):
    """Not before its time, but for a bundle that would not fit; without the clock it would never end. How much later
    depends on who else wants the cores, and is no test."""
    whole(three.pool)
    kernel = kernels.Slow(seconds=0.01, row=0.0005)
    found = ts.search(kernel, kernels.total, method, budget=ts.Budget(seconds=1.5), batch_size=32, workers=three)
    bundle = 1.0  # what a worker is given at most, in seconds
    assert 1.5 - bundle < found.cost.seconds
    assert len(found.samples)


def interrupt(pool, wave):
    """Ctrl-C while the given wave is under way."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        jobs = [job.wave for tenant in list(pool.tenants) for job in tenant.jobs]
        if jobs and max(jobs) >= wave and any(a.leases for a in pool.workers):
            time.sleep(0.08)  # a wave takes 0.25 s
            os.kill(os.getpid(), signal.SIGINT)
            break
        time.sleep(0.002)
    while pool.tenants and time.monotonic() < end + 30:
        time.sleep(0.01)
    if pool.tenants:
        os.kill(os.getpid(), signal.SIGINT)  # it hangs: let the test fail


@pytest.mark.parametrize("mode", ["wave", "async"])
@pytest.mark.parametrize("what", ["drop", "drain"])
def test_an_interrupted_run_goes_on(three, tmp_path, monkeypatch, what, mode):
    limit(monkeypatch, three, on_interrupt=what)
    whole(three.pool)
    method, budget = DTS(wave=16, mode=mode), ts.Budget(nfe=400)
    kernel, store = kernels.Slow(seconds=0.05), tmp_path / "run"
    thread = threading.Thread(target=interrupt, args=(three.pool, 3))
    thread.start()
    with pytest.raises(KeyboardInterrupt):  # a search would return what there is
        deque(ts.stream(kernel, kernels.total, method, budget=budget, store=store, workers=three), 0)
    thread.join()
    monkeypatch.undo()
    opened, blocks = runs.Run.open(store)
    opened.close(opened.config["status"])
    if mode == "wave":
        assert [b.wave for b in blocks] == list(range(3 + (what == "drain")))
    if what == "drain":  # all that was selected is in the log
        assert not np.isnan(np.concatenate([b.nodes["reward"][b.nodes["t"] == 0] for b in blocks])).any()
    found = ts.resume(store, BEDS["gaussian"], kernels.total, workers=three)
    assert 400 - 5 < found.cost.nfe <= 400
    if mode == "wave":
        same(found, ts.search(BEDS["gaussian"], kernels.total, method, budget=budget))
    else:
        laws.values_add_up(found.tree, method.lam)
        laws.visits_add_up(found.tree, found.diagnostics["iterations"])


def test_a_stream_that_is_left_leaves_the_workers_free(three):
    for snapshot in ts.stream(
        BEDS["gaussian"], kernels.total, METHODS["dts"], budget=ts.Budget(nfe=2000), workers=three
    ):
        if snapshot.wave == 2:
            break
    del snapshot
    assert three.pool.tenants == []
    same(run("gaussian", "fk", three), alone("gaussian", "fk"))


# Load and figures.


@pytest.mark.slow
def test_workers_are_loaded_by_their_speed(three, tmp_path):
    """Each level of a population is dealt out at once: in shares of equal size, all would wait for the slow one."""
    whole(three.pool)
    kernel, budget = kernels.OneSlow(folder=tmp_path), ts.Budget(nfe=240 * 5 * 6)
    found = ts.search(kernel, kernels.total, FK(num_particles=240), budget=budget, batch_size=8, workers=three)
    slow = {int(pid): flag == "True" for pid, flag in map(str.split, noted(tmp_path / "pids"))}
    nfe = {a.info["pid"]: found.diagnostics["workers"]["by_worker"][a.number]["nfe"] for a in three.pool.workers}
    (least,) = (nfe[pid] for pid in nfe if slow[pid])
    assert sum(nfe.values()) == found.cost.nfe + found.cost.repeated_nfe
    assert all(n > 2.5 * least for pid, n in nfe.items() if not slow[pid]), nfe


def test_figures_of_the_workers(three):
    whole(three.pool)
    kernel = kernels.Slow(LinearGaussian(dim=100), 0.005)
    found = ts.search(
        kernel, kernels.total, FK(num_particles=96), budget=ts.Budget(nfe=96 * 30), workers=three, batch_size=8
    )
    stats = found.diagnostics["workers"]
    for figures in (stats, found.history[-1]["workers"]):
        assert figures["workers"] == 3
        assert 0.3 < figures["busy"] <= 1
        assert 0.9 < figures["fill"] <= 1
        assert figures["queue"] > 0
        assert 0.8 * 96 * 30 < figures["mb_in"] / (100 * kernel.dtype.itemsize / 1e6) < 2 * 96 * 30
        assert figures["mb_out"] > 0
    assert stats["processes_replaced"] >= 0
    assert stats["bundles_given_again"] == 0
    assert len(stats["by_worker"]) == 3
    assert sum(w["nfe"] for w in stats["by_worker"].values()) == found.cost.nfe + found.cost.repeated_nfe
    for figures in stats["by_worker"].values():
        assert 0 < figures["busy"] <= 1
        assert 0 < figures["fill"] <= 1
        assert 0 < figures["nfe_per_second"] < 8 / 0.005
        assert 50 < figures["memory_mb"] < 4000


def test_walks_to_lost_states_do_not_overfill_batches(three):
    found = run("ring", "dts", three, keep_states="none", batch_size=2)
    assert found.cost.repeated_nfe > 0
    assert all(0 < record["workers"]["fill"] <= 1 for record in found.history)


# Bad input.


@pytest.mark.parametrize("given", [3, "auto", [1]])
def test_workers_that_are_none(given, tmp_path):
    with pytest.raises(TypeError, match=r"expected ts\.RayWorkers"):
        ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(n=4), workers=given)
    ts.search(BEDS["gaussian"], kernels.total, ts.BestOfN(n=4), store=tmp_path / "run")
    with pytest.raises(TypeError, match=r"expected ts\.RayWorkers"):
        ts.resume(tmp_path / "run", BEDS["gaussian"], kernels.total, workers=given)
    with pytest.raises(TypeError, match=r"expected ts\.RayWorkers"):
        next(ts.stream(BEDS["gaussian"], kernels.total, ts.BestOfN(n=4), workers=given))


def test_workers_that_are_not_running():
    with pytest.raises(ts.WorkerError, match="not running"):
        _ = ts.RayWorkers(2).pool


def test_a_kernel_that_cannot_travel(three):
    kernel = kernels.Wrapped()
    kernel.lock = threading.Lock()
    with pytest.raises(ts.WorkerError, match=r"give a ts.Recipe\(factory, ...\) that builds it there: cannot pickle"):
        ts.search(kernel, kernels.total, ts.BestOfN(n=4), workers=three)


def test_a_recipe_that_fails_says_why(three):
    with pytest.raises(ZeroDivisionError, match="a factory that fails"):
        ts.search(ts.Recipe(kernels.failing), kernels.total, ts.BestOfN(n=4), workers=three)


@pytest.mark.parametrize("pool", ["three", "scored"])
def test_what_a_reward_on_workers_says_of_prompts(pool, request):
    workers, prompts = request.getfixturevalue(pool), ["short", "a long one"]
    found = ts.search(BEDS["gaussian"], ts.Recipe(kernels.cutting), ts.BestOfN(n=4), prompts=prompts, workers=workers)
    assert kernels.cutting().remarks_on(prompts)[1][0] in found.tasks[1].diagnostics["warnings"]
    assert not any("cutting" in w for w in found.tasks[0].diagnostics["warnings"])


def test_errors_of_kernels_are_raised_at_once(three, tmp_path):
    with pytest.raises(ts.KernelError, match="endpoint of shape"):
        ts.search(kernels.Misshapen(folder=tmp_path), kernels.total, ts.BestOfN(n=1), workers=three)
    assert len(noted(tmp_path / "calls")) == 1
