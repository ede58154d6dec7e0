"""Rewards of their own, clocks, interrupts, figures and input of workers on Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import deque

import numpy as np
import pytest

import treesearch as ts
from tests.support import kernels, laws
from tests.support.beds import BEDS
from tests.support.kernels import noted
from tests.support.workers import DTS, DTS_STAR, FK, KERNELS, METHODS, alone, limit, run, same, sound, whole
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.errors import UsageError
from treesearch.rewards.base import RewardError
from treesearch.runs import folder as runs

# Rewards of their own.


@pytest.mark.parametrize("name", ["best of n", "fk", "dts", "dts star"])
def test_scorers_change_nothing(scored, name):
    for bed in ("gaussian", "drifting", "discrete"):
        found = run(bed, name, scored)
        same(found, alone(bed, name), reward_calls=bed != "discrete", where=bed)
        assert found.tasks[0].diagnostics["workers"]["rewards"]["attempts"] > 0


@pytest.mark.parametrize("pool", ["three", "scored"])
@pytest.mark.parametrize("name", ["fk", "tree sampling", "beam"])
def test_declared_values_are_those_of_one_process_with_workers_and_with_scorers(pool, request, name):
    """What the kernel knows is not scored again, and samples are."""
    workers = request.getfixturevalue(pool)
    for way in ("valued(gaussian, linear(0.5), {0}:worth)", "tds(gaussian, linear(0.5), value={0}:worth)"):
        kernel = ts.Recipe(way.format("tests.support.kernels"))
        here = kernel.kernel()
        options = {"method": METHODS[name], "prompts": ["a", "b"], "budget": ts.Budget(nfe=240)}
        want = ts.search(here, here.scores, **options)
        assert want.cost.reward_calls == sum(len(task.leaves) for task in want.tasks)
        for one, reward in ((kernel, ts.Recipe("linear(0.5)")), (here, here.scores)):
            same(ts.search(one, reward, workers=workers, **options), want, where=way)
        with pytest.raises(UsageError, match=r"values of reward 'linear.0.5.', the search is for 'linear.0.6.'"):
            ts.search(kernel, ts.Recipe("linear(0.6)"), workers=workers, **options)


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


@pytest.mark.parametrize("pool", ["three", "scored"])
def test_a_broken_contract_is_not_tried_again(pool, request, tmp_path):
    reward, workers = kernels.NanReward(str(tmp_path / "calls")), request.getfixturevalue(pool)
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


@pytest.mark.parametrize("pool", ["three", "scored"])
@pytest.mark.parametrize("kind", [DTS, DTS_STAR])
def test_asynchronous_trees_obey_the_laws(pool, request, kind):
    method = kind(wave=24, mode="async", widening_c=1.0, widening_alpha=0.5)
    kernel, workers = kernels.Slow(KERNELS["drifting"], 0.001), request.getfixturevalue(pool)
    options = {"prompts": ["a", "b"], "budget": ts.Budget(nfe=1500), "batch_size": 8}
    found = ts.search(kernel, kernels.total, method, workers=workers, **options)
    sound(found, method)
    assert all(task.diagnostics["staleness"]["max"] > 0 for task in found.tasks)
    assert 1500 - 2 * 5 < found.cost.nfe <= 1500
    assert found.history[-1]["staleness"] > 0


# Clocks and interrupts.


@pytest.mark.parametrize("method", [ts.BestOfN(), DTS(wave=64), DTS(wave=64, mode="async")], ids=["n", "dts", "async"])
def test_a_clock_ends_a_search(three, method):
    """Not before its time, but for a bundle that would not fit, although the first rows are slower than those of a full
    batch; without the clock it would never end. How much later depends on who else wants the cores, and is no test."""
    whole(three.pool)
    kernel = kernels.Slow(seconds=0.01, row=0.0005)
    found = ts.search(kernel, kernels.total, method, budget=ts.Budget(seconds=1.5), batch_size=32, workers=three)
    bundle = 1.0  # what a worker is given at most, in seconds
    assert 1.5 - bundle < found.cost.seconds
    assert len(found.samples)


def interrupt(pool, wave):
    """Ctrl-C while the given wave is under way."""
    end = time.monotonic() + 600
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
