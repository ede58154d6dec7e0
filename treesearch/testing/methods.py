"""Laws of methods: budget, cost, batch size, seed, noise, tasks, λ = 0, resumption."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.api import search
from treesearch.backends.base import Kernel, describe
from treesearch.budget import Budget
from treesearch.core.noise import root_key
from treesearch.core.tree import ROOT, Tree
from treesearch.errors import BudgetError
from treesearch.methods.base import AUTO, Method, Status
from treesearch.results.result import SearchResult, TaskResult
from treesearch.testing.chains import conditioning, noise
from treesearch.testing.compare import Room, require, same, same_result, same_task
from treesearch.testing.counting import Counting
from treesearch.testing.rewards import total
from treesearch.testing.stores import check_store


def check_method(method: Method, kernel: Kernel, reward: Callable[..., Any] = total, *, atol: float = 0.0) -> None:
    """Laws of a method: budget, cost, batch size, seed, noise, tasks, λ = 0, resumption.

    A method whose result depends on the order of arrival (mode="async") has those that do not compare results.
    """
    ordered = method.mode != "async" or getattr(method, "wave", 1) == 1
    steps, seed = describe(kernel).num_steps, 3
    check_budget(method, kernel, reward)

    def run(method: Method = method, tasks: int = 0, seed: int = seed, batch_size: int = 64) -> SearchResult:
        prompts = list(range(tasks)) or None
        budget = Budget(nfe=80 * steps * max(1, tasks))
        return search(kernel, reward, method, prompts=prompts, budget=budget, seed=seed, batch_size=batch_size)

    first = run()
    for size in (1, 7) if ordered else ():
        same_result(run(batch_size=size), first, atol, f"batch_size = {size}")
    shared = np.isin(run(seed=seed + 1).tree.key, first.tree.key).sum()
    require(not shared, f"another seed: expected other noise keys, got {shared} shared ones")
    check_edges(kernel, first.tasks[0], seed, atol)
    three = run(tasks=3).tasks
    check_noise([task.tree for task in three], steps)
    if method.lam != AUTO and ordered:  # a pilot looks at all tasks
        same_task(run(tasks=1).tasks[0], three[0], atol, "a task alone beside the same task among three")
    if "lam" in (field.name for field in fields(method)):
        calm = run(replace(method, lam=0.0))
        require(calm.log_z in (None, 0.0), f"log_z at lam = 0: expected 0 or None, got {calm.log_z}")
        check_edges(kernel, calm.tasks[0], seed, atol)
    if ordered:
        with tempfile.TemporaryDirectory() as folder:
            check_store(method, kernel, reward, folder, cuts=4, atol=atol)


def check_budget(method: Method, kernel: Kernel, reward: Callable[..., Any] = total) -> None:
    """Never more than the budget, hardly ever less, and what was spent is what the kernel saw."""
    spec = describe(kernel)
    unit, full = method.unit(spec), 100 * spec.num_steps
    if method.lam != AUTO and unit.nfe > 1:
        told = ""
        try:
            search(kernel, reward, method, budget=Budget(nfe=unit.nfe - 1))
        except BudgetError as error:
            told = str(error)
        require(
            str(unit.nfe) in told, f"a budget below {unit.name}: expected BudgetError with {unit.nfe}, got {told!r}"
        )
    for nfe in (max(unit.nfe, full), full + 1, 2 * full + spec.num_steps - 1):
        counted: Any = Counting(kernel)
        result = search(counted, reward, method, budget=Budget(nfe=nfe))
        spent = result.cost.nfe
        require(spent == counted.rows, f"cost.nfe: expected {counted.rows}, which the kernel counted, got {spent}")
        require(spent <= nfe, f"budget of {nfe} NFE: spent {spent}")
        done = result.status in (Status.FINISHED, Status.EXHAUSTED)
        require(done or spent >= 0.97 * nfe, f"budget of {nfe} NFE: expected at least 97 % spent, got {spent}")
        calls = search(kernel, reward, method, budget=Budget(nfe=nfe, reward_calls=nfe // 2)).cost.reward_calls
        require(calls <= nfe // 2, f"budget of {nfe // 2} reward calls: spent {calls}")


def check_noise(trees: Sequence[Tree], num_steps: int) -> None:
    """No two steps of any tree share their noise, the stream (key, t); drafts of one candidate begin at one x_T."""
    used = []
    for tree in trees:
        nodes = np.arange(1, len(tree))
        drafts = nodes[(tree.parent[1:] == ROOT) & (tree.t[1:] == num_steps) & ~np.isnan(tree.reward[1:])]
        again = np.setdiff1d(drafts, drafts[np.unique(tree.key[drafts], return_index=True)[1]])
        nodes = np.setdiff1d(nodes, again)
        t, above = tree.t[nodes].astype(int), tree.t[tree.parent[nodes]].astype(int)
        above[above == t] += 1  # a neighbour draws from the prior's stream
        steps = above - t
        level = np.repeat(above, steps) - (np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps))
        used.append(np.stack([np.repeat(tree.key[nodes], steps), level.astype(np.uint64)], 1))
    rows = np.concatenate(used)
    require(rows[:, 1].max() <= num_steps + 1, f"noise: expected t up to {num_steps + 1}, got {rows[:, 1].max()}")
    shared = len(rows) - len(np.unique(rows, axis=0))
    require(not shared, f"noise: expected {len(rows)} different (key, t), got {shared} shared ones")


def check_edges(kernel: Kernel, task: TaskResult, seed: int, atol: float = 0.0, number: int = 0) -> None:
    """Every sample is what the kernel itself draws along the sample's path, from the keys of the path."""
    tree, spec, states, z = task.tree, describe(kernel), dict[int, Any](), dict[int, Tensor]()
    key, got = root_key(seed, number), int(tree.key[ROOT])
    require(got == key, f"root key of task {number}: expected {key}, got {got}")
    cond = conditioning(kernel, None, np.array([number]))
    for node in range(1, len(tree)):
        x: Any = states.get(int(tree.parent[node]))
        keys, above = tree.key[[node]], int(tree.t[tree.parent[node]])
        if above == tree.t[node]:
            fresh = noise(spec, keys, spec.num_steps + 1)
            z[node] = math.cos(tree.angle) * z[int(tree.parent[node])] + math.sin(tree.angle) * fresh
            x = kernel.prior(z[node], cond)
        for t in range(above, int(tree.t[node]), -1):
            if t > spec.num_steps:
                z[node] = noise(spec, keys, t)
                x = kernel.prior(z[node], cond)
            else:
                x = kernel.transition(x, torch.tensor([t], device="cpu"), cond).sample(noise(spec, keys, t))
        states[node] = x
    want = kernel.decode(torch.cat([states[int(leaf)] for leaf in task.leaves]))
    same("samples beside the kernel's own steps along their paths", task.samples, want, Room(atol))
