"""Workers on Ray make the tree of one process, bit for bit, however many there are and whatever they keep."""

from __future__ import annotations

import functools
import json
import os

import pytest
import torch

import treesearch as ts
from tests.support import kernels
from tests.support.beds import BEDS
from tests.support.kernels import noted
from tests.support.workers import (
    DESCENTS,
    KERNELS,
    METHODS,
    alone,
    eventually,
    run,
    same,
    whole,
)
from treesearch.backends.chains.inversion import invert
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS
from treesearch.backends.roots import Rooted
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.analytic import linear
from treesearch.rewards.channels import Channels

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


def test_drafts_are_made_there_too(three):
    mean, cov = torch.zeros(3, 2).double(), torch.eye(6).double()
    kernel = GaussianTrajectories(mean, cov, channels=Channels(1, 1), num_steps=10)
    held = ts.TreeSampling(draft=3)
    for method in (ts.BestOfN(draft=(2, 5)), ts.BestOfN(draft=2, floor=0.2), ts.TreeSearch(draft=3), held):
        options = {"prompts": ["a", "b"], "budget": ts.Budget(nfe=2_400), "batch_size": 8}
        found, want = (ts.search(kernel, kernels.total, method, workers=w, **options) for w in (three, None))
        same(found, want, where=str(method))
        assert 0 < found.cost.draft_nfe == want.cost.draft_nfe < want.cost.nfe


def test_pictures_are_tasks_there_too(three):
    states = GaussianStates(torch.zeros(1, 2, 2), 0.3 * torch.eye(4), num_steps=8)
    images = torch.linspace(-0.8, 0.8, 12).view(3, 1, 2, 2)
    keep = torch.tensor([[True, True], [False, False]]).expand(1, 2, 2)
    path = invert(states, images)
    edits = Rooted(Clamp(states, keep, path), path, level=5)
    options = {"prompts": ["a", "b", "c"], "budget": ts.Budget(nfe=150), "batch_size": 8}
    found, want = (ts.search(edits, kernels.total, ts.TreeSearch(), workers=w, **options) for w in (three, None))
    same(found, want)
    for task, image in zip(found.tasks, images, strict=True):
        assert torch.equal(task.samples[:, keep], image[keep].expand(len(task.samples), -1))


def test_descents_do_too(three):
    descend(three)


def test_one_worker_does_too(three, monkeypatch):
    whole(three.pool)
    monkeypatch.setattr(three.pool, "workers", three.pool.workers[:1])
    for name, bed in zip(METHODS, [*KERNELS, *KERNELS], strict=False):
        found = run(bed, name, three)
        same(found, alone(bed, name), where=f"{name} on {bed}")
        assert len(found.tasks[0].diagnostics["workers"]["by_worker"]) == 1
    descend(three, keep_states="none")


def test_two_workers_that_share_a_gpu_do_too_and_leave_the_cpus(free):
    import ray

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
        record = {k: v for k, v in snapshot.record.items() if not k.endswith("seconds") and k != "workers"}
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
    by_worker = json.loads((tmp_path / "run" / "workers.json").read_text("utf-8"))["by_worker"]
    assert set(by_worker) <= {"0", "1", "2"}
    assert all(one["nfe"] <= 100 for one in by_worker.values())
    with pytest.raises(ts.StoreError, match="does not reproduce"):
        ts.resume(tmp_path / "run", other, kernels.total, budget=ts.Budget(nfe=200), workers=three)
    assert three.pool.tenants == []  # the one that failed is gone as well
    found = ts.resume(tmp_path / "run", kernel, kernels.total, budget=ts.Budget(nfe=200), workers=three)
    assert 195 < found.cost.nfe <= 200


def test_rewards_of_a_guide_are_handed_on(three):
    """Kernel and reward travel apart; that they share the reward is told."""
    reward = linear(0.8)
    arguments = TDS(BEDS["gaussian"], reward), reward, ts.FeynmanKac(num_particles=8)
    found, here = (ts.search(*arguments, budget=ts.Budget(nfe=120), workers=w) for w in (three, None))
    same(found, here)
    assert found.cost.reward_calls == here.cost.reward_calls > 120


def test_walks_to_lost_states_do_not_overfill_batches(three):
    found = run("ring", "dts", three, keep_states="none", batch_size=2)
    assert found.cost.repeated_nfe > 0
    assert all(0 < record["workers"]["fill"] <= 1 for record in found.history)
