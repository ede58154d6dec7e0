"""Run folders: kill -9 and resume, growing, lag, dropped states."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

import treesearch as ts
from treesearch import api as loop
from treesearch.backends.exact.enumerable import MaskedChain
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian
from treesearch.errors import StoreError
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import RewardError, as_reward
from treesearch.runs.config import read_config
from treesearch.runs.log import read_blocks
from treesearch.session.rebuild import read_result

METHODS = {
    "best_of_n": ts.BestOfN(),
    "fk": ts.FeynmanKac(num_particles=16),
    "dts": ts.DiffusionTreeSampling(widening_c=1, widening_alpha=0.5, wave=8),
    "dts_lag": ts.DiffusionTreeSampling(widening_c=1, widening_alpha=0.5, wave=8, lag=1),
    "dts_star": ts.DiffusionTreeSearch(widening_c=1, widening_alpha=0.5, wave=8),
    "beam": ts.BeamSearch(),
    "tree_sampling": ts.TreeSampling(),
    "tree_search": ts.TreeSearch(wave=8),
}
TREE = ("parent", "t", "visits", "value", "reward", "log_w", "key")


def same_tree(a: ts.Tree, b: ts.Tree) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name in ("value", "reward")) for name in TREE
    )


def cut(path, size):
    """What a kill leaves behind: a log that ends anywhere, run.json that still says running."""
    with open(path / "tree.bin", "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kernel", [LinearGaussian(), GaussianMixture.ring(10)], ids=["gaussian", "ring"])
def test_a_log_cut_anywhere_resumes_to_the_same_tree(tmp_path, name, kernel):
    budget, reward = ts.Budget(nfe=900), linear(0.7)
    straight = ts.search(kernel, reward, METHODS[name], budget=budget, seed=3, store=tmp_path / "a", prompts=["x", "y"])
    size = (tmp_path / "a" / "tree.bin").stat().st_size
    for fraction in (0.0, 0.31, 0.62, 0.99):
        ts.search(
            kernel, reward, METHODS[name], budget=budget, seed=3, store=tmp_path / str(fraction), prompts=["x", "y"]
        )
        cut(tmp_path / str(fraction), max(12, int(size * fraction)))
        again = ts.resume(tmp_path / str(fraction), kernel, reward)
        for a, b in zip(straight.tasks, again.tasks, strict=True):
            assert same_tree(a.tree, b.tree)
            assert torch.equal(a.samples, b.samples)
            assert torch.equal(a.log_weights, b.log_weights)
        assert straight.cost.nfe == again.cost.nfe


@pytest.mark.parametrize("name", ["best_of_n", "fk", "dts", "dts_lag", "dts_star"])
def test_growing_a_finished_run_equals_a_straight_one(tmp_path, name):
    kernel, reward, method = LinearGaussian(), linear(0.7), METHODS[name]
    # Boundaries of whole waves, so that the first run was not cut short.
    first = {"best_of_n": 320, "fk": 1280}.get(name)
    if first is None:
        first = [s.cost.nfe for s in ts.stream(kernel, reward, method, budget=ts.Budget(nfe=4000))][10]
    ts.search(kernel, reward, method, budget=ts.Budget(nfe=first), store=tmp_path / "run")
    grown = ts.resume(tmp_path / "run", kernel, reward, budget=ts.Budget(nfe=4000))
    straight = ts.search(kernel, reward, method, budget=ts.Budget(nfe=4000))
    assert same_tree(grown.tree, straight.tree)
    assert grown.cost.nfe == straight.cost.nfe


SLOW = """
import sys, time, treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.base import as_reward
def slow(x):
    time.sleep(0.01)
    return 0.7 * x[:, 0]
print("ready", flush=True)
method = {method}
ts.search(LinearGaussian(), as_reward(slow, name="slow"), method, budget=ts.Budget(nfe=4000), store=sys.argv[1])
"""


def whole(folder):
    """Whether a block is there to its end: a busy machine may be in the middle of the first one."""
    return any(True for _ in read_blocks(folder))


@pytest.mark.parametrize("name", ["fk", "dts", "tree_sampling", "tree_search"])
def test_kill_9_loses_at_most_the_wave_in_flight(tmp_path, name):
    method = METHODS[name]
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SLOW).format(method=f"ts.{method!r}"))
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    job = subprocess.Popen([sys.executable, str(script), str(folder)], env=environment, stdout=subprocess.PIPE)
    log, deadline = folder / "tree.bin", time.monotonic() + 600
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > 6_000 and whole(folder)):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    recorded = [block.meta["history"] for block, _ in read_blocks(folder)]
    assert recorded
    assert recorded[-1]["nfe"] < 4000
    slow = ts.search(LinearGaussian(), lambda x: 0.7 * x[:, 0], method, budget=ts.Budget(nfe=4000))
    again = ts.resume(folder, LinearGaussian(), named(lambda x: 0.7 * x[:, 0], "slow"))
    assert same_tree(slow.tree, again.tree)
    assert again.cost.nfe == slow.cost.nfe
    # Only the level that a population stood at is evaluated twice.
    assert again.cost.repeated_nfe <= {"fk": 256, "tree_sampling": 800}.get(name, 0)


def named(function, name):
    return as_reward(function, name=name)


@pytest.mark.parametrize("keep", ["frontier", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_dropped_states_are_recomputed_from_their_keys(name, keep):
    kernel, reward, budget = GaussianMixture.ring(10), linear(0.7), ts.Budget(nfe=1500)
    kept = ts.search(kernel, reward, METHODS[name], budget=budget)
    dropped = ts.search(kernel, reward, METHODS[name], budget=budget, keep_states=keep)
    assert same_tree(kept.tree, dropped.tree)
    assert torch.equal(kept.samples, dropped.samples)
    assert kept.cost.nfe == dropped.cost.nfe
    inner = (dropped.tree.t > 0) & (dropped.tree.slot >= 0)
    if keep == "none" or name in ("fk", "beam", "best_of_n"):
        assert not inner.any()
    if name.startswith("dts"):
        assert (dropped.cost.repeated_nfe > 0) == (keep == "none")


@pytest.mark.parametrize("prompts", [None, ["a", "b"]])
def test_a_population_in_progress_is_not_resumed_with_less_than_it_takes(tmp_path, prompts):
    def stop(snapshot):
        if snapshot.wave == 1:
            raise KeyboardInterrupt

    tasks, kernel, method = (
        len(prompts or [None]),
        LinearGaussian(),
        ts.FeynmanKac(num_particles=20, schedule=(4, 2, 0)),
    )
    whole = tasks * 20 * kernel.num_steps
    with pytest.raises(KeyboardInterrupt):
        ts.search(
            kernel,
            linear(),
            method,
            prompts=prompts,
            budget=ts.Budget(nfe=whole),
            store=tmp_path / "r",
            callbacks=[stop],
        )
    with pytest.raises(ts.BudgetError, match=f"give at least {whole}"):
        ts.resume(tmp_path / "r", kernel, linear(), budget=ts.Budget(nfe=whole - 1))
    assert ts.resume(tmp_path / "r", kernel, linear(), budget=ts.Budget(nfe=whole)).cost.nfe == whole


def blocks(folder):
    return [block for block, _ in read_blocks(folder)]


def test_a_run_that_is_read_tells_why_its_tasks_stopped(tmp_path):
    method, names = ts.BestOfN(n=4), ("nfe", "n")
    for name, budget in zip(names, (ts.Budget(nfe=15), ts.Budget()), strict=True):
        found = ts.search(LinearGaussian(), linear(0.7), method, budget=budget, store=tmp_path / name)
        again = read_result(read_config(tmp_path / name), blocks(tmp_path / name))
        assert again.tasks[0].status == found.tasks[0].status
    config = read_config(tmp_path / "n")
    assert config["ended"] == ["FINISHED"]
    with pytest.raises(StoreError, match="ended as 'NEVER'"):
        read_result(config | {"ended": ["NEVER"]}, blocks(tmp_path / "n"))


def test_an_interrupted_run_is_saved_and_says_so(tmp_path):
    seen = []

    def stop(snapshot):
        seen.append(snapshot.wave)
        if snapshot.wave == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ts.search(
            LinearGaussian(),
            linear(),
            METHODS["dts"],
            budget=ts.Budget(nfe=900),
            store=tmp_path / "r",
            callbacks=[stop],
        )
    assert read_config(tmp_path / "r")["status"] == "interrupted"
    assert len(list(read_blocks(tmp_path / "r"))) == 4
    straight = ts.search(LinearGaussian(), linear(), METHODS["dts"], budget=ts.Budget(nfe=900))
    assert same_tree(ts.resume(tmp_path / "r", LinearGaussian(), linear()).tree, straight.tree)


def test_states_survive_losslessly_over_several_shards(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from treesearch.runs import shards

    monkeypatch.setattr(shards.ShardStates.__init__, "__defaults__", (0, 300))
    kernel = MaskedChain.random(num_steps=6)
    result = ts.search(
        kernel, lambda x: x.double().sum(1), METHODS["dts"], budget=ts.Budget(nfe=600), store=tmp_path / "r"
    )
    memory = ts.search(kernel, lambda x: x.double().sum(1), METHODS["dts"], budget=ts.Budget(nfe=600))
    assert torch.equal(result.samples, memory.samples)
    shards = sorted((tmp_path / "r").glob("states-*.safetensors"))
    assert len(shards) > 3
    rows = torch.cat([load_file(s)["states"] for s in shards])
    assert len(rows) == (result.tree.slot >= 0).sum()
    assert torch.equal(rows[result.tree.slot[result.leaves]], result.samples)


class Anonymous:
    """The Gaussian chain without a fingerprint; counts its evaluations."""

    num_steps, state_shape, dtype = 5, (1,), torch.float64

    def __init__(self, mean):
        self._inner, self.calls = LinearGaussian(mean=mean), 0
        self.unread = iter(())  # no content to compare it by, so that an edge is walked again

    def prior(self, noise, cond=None):
        return self._inner.prior(noise)

    def transition(self, x, t, cond=None):
        self.calls += len(x)
        return self._inner.transition(x, t)

    def decode(self, x0):
        return x0


@pytest.mark.parametrize("keep", ["all", "frontier", "none"])
@pytest.mark.parametrize("name", ["best_of_n", "fk", "dts"])
def test_a_kernel_without_a_fingerprint_is_checked_within_the_budget(tmp_path, name, keep):
    method, store = METHODS[name], tmp_path / "r"
    first = ts.search(Anonymous(0.3), linear(), method, budget=ts.Budget(nfe=480), store=store, keep_states=keep)
    with pytest.raises(ts.StoreError, match="fingerprint"):
        ts.resume(store, Anonymous(0.4), linear(), budget=ts.Budget(nfe=900))
    kernel = Anonymous(0.3)
    more = ts.resume(store, kernel, linear(), budget=ts.Budget(nfe=900))
    assert kernel.calls == more.cost.nfe - first.cost.nfe + more.cost.repeated_nfe - first.cost.repeated_nfe
    assert 880 < more.cost.nfe <= 900


@pytest.mark.parametrize("waves", [1, 3])
def test_the_check_does_not_touch_the_budget_of_a_population_on_its_way(tmp_path, waves):
    method, budget = ts.FeynmanKac(num_particles=10), ts.Budget(nfe=50)
    ts.search(Anonymous(0.3), linear(), method, budget=budget, store=tmp_path / "r")
    ends = [end for _, end in read_blocks(tmp_path / "r")]
    cut(tmp_path / "r", ends[waves - 1])
    again = ts.resume(tmp_path / "r", Anonymous(0.3), linear())
    assert again.cost.nfe == 50
    assert again.cost.repeated_nfe == 10 + 1


def test_two_nameless_guides_are_told_apart(tmp_path):
    from treesearch.backends.base import Guided, shift_mean

    def guided(by):
        return Guided(LinearGaussian(), shift_mean(lambda x, t, law, cond: by * law.std))

    method = METHODS["dts"]
    ts.search(guided(0.3), linear(), method, budget=ts.Budget(nfe=300), store=tmp_path / "r")
    with pytest.raises(ts.StoreError, match="fingerprint"):
        ts.resume(tmp_path / "r", guided(-2.0), linear(), budget=ts.Budget(nfe=600))
    assert ts.resume(tmp_path / "r", guided(0.3), linear(), budget=ts.Budget(nfe=600)).cost.nfe <= 600


def test_reading_takes_work_in_proportion_to_the_run(tmp_path):
    """Seconds for a million nodes are in `make bench`; here calls of functions are counted, for n and 4 n."""

    def calls(nfe):
        folder, seen = tmp_path / str(nfe), []
        method = ts.DiffusionTreeSampling(wave=256)
        ts.search(LinearGaussian(), linear(), method, budget=ts.Budget(nfe=nfe), batch_size=256, store=folder)
        loop.open_session(folder, LinearGaussian(), linear(), look=True).close()  # compiles and imports once
        sys.setprofile(lambda frame, event, arg: seen.append(event))
        try:
            session = loop.open_session(folder, LinearGaussian(), linear(), look=True)
        finally:
            sys.setprofile(None)
        assert len(session.searches[0].tree) > nfe
        session.close()
        return len(seen)

    few, many = calls(11_000), calls(44_000)
    assert few < many < 5 * few


# Folders that fail at once, or vanish


@pytest.mark.parametrize("lam", [1.0, "auto"])
def test_a_run_that_failed_at_its_first_wave_is_begun_again_in_its_folder(tmp_path, lam):
    kernel, method, store = LinearGaussian(), ts.DiffusionTreeSampling(wave=8, lam=lam), tmp_path / "r"
    budget, made = ts.Budget(nfe=400), []
    for _ in range(2):
        with pytest.raises(RewardError, match="returned nan"):
            ts.search(kernel, named(lambda x: 0.7 * x[:, 0] * np.nan, "typo"), method, budget=budget, store=store)
        made += [read_config(store)["id"]] if store.exists() else []
    assert len(set(made)) == (2 if lam == 1.0 else 0)  # an automatic λ fails at its pilot, before there is a folder
    found = ts.search(kernel, linear(0.7), method, budget=budget, store=store)
    assert read_config(store)["status"] == "finished"
    assert same_tree(found.tree, ts.search(kernel, linear(0.7), method, budget=budget).tree)
    with pytest.raises(ts.StoreError, match="holds a run already"):
        ts.search(kernel, linear(0.7), method, budget=budget, store=store)
    assert same_tree(ts.resume(store, kernel, linear(0.7)).tree, found.tree)


def test_a_run_that_failed_at_its_first_wave_goes_on_with_the_reward_mended(tmp_path):
    kernel, budget, store = LinearGaussian(), ts.Budget(nfe=400), tmp_path / "r"
    with pytest.raises(RewardError, match="returned nan"):
        ts.search(kernel, named(lambda x: x[:, 0] * np.nan, "mine"), METHODS["fk"], budget=budget, store=store)
    mended = named(lambda x: 0.7 * x[:, 0], "mine")
    again, straight = ts.resume(store, kernel, mended), ts.search(kernel, mended, METHODS["fk"], budget=budget)
    assert same_tree(again.tree, straight.tree)
    assert again.cost.nfe == straight.cost.nfe


def removed(path):
    shutil.rmtree(path)


def moved(path):
    path.rename(path.with_name("elsewhere"))


def replaced(path):
    path.rename(path.with_name("elsewhere"))
    shutil.copytree(path.with_name("elsewhere"), path)


def without_log(path):
    (path / "tree.bin").unlink()


def without_states(path):
    next(path.glob("states-*")).unlink()


@pytest.mark.parametrize(
    ("name", "vanish"),
    [("dts", how) for how in (removed, moved, replaced, without_log, without_states)] + [("dts_lag", removed)],
)
def test_a_folder_that_vanishes_is_noticed_at_the_next_wave_and_costs_nobody_the_result(tmp_path, name, vanish, caplog):
    store, waves = tmp_path / "r", []

    def watch(snapshot):
        waves.append(snapshot.wave)
        if snapshot.wave == 2:
            vanish(store)

    kernel, budget, lag = LinearGaussian(), ts.Budget(nfe=300), METHODS[name].lag
    found = ts.search(kernel, linear(0.7), METHODS[name], budget=budget, store=store, callbacks=[watch])
    assert waves == list(range(4 + lag))
    assert found.store is None
    assert "was removed, moved or replaced while the search ran" in caplog.text
    assert any("what it found is in this result alone" in w for w in found.diagnostics["warnings"])
    straight = ts.search(kernel, linear(0.7), METHODS[name], budget=budget)
    assert torch.equal(found.samples, straight.samples[: len(found.samples)])
    if vanish is moved:
        assert ts.resume(tmp_path / "elsewhere", kernel, linear(0.7)).cost.nfe > found.cost.nfe
    if vanish is removed:
        assert not store.exists()
        ts.search(kernel, linear(0.7), METHODS[name], budget=budget, store=store)  # nothing holds it any more
