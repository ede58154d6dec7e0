"""Searches on workers beside those of one process: methods and beds, how they are run and compared."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import numpy as np
import torch

import treesearch as ts
from tests.support import kernels, laws
from tests.support.beds import BEDS, half_a_step
from treesearch.backends.base import Guided, shift_mean

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
