"""Laws that every plug-in must obey, as functions to call from a test of your own kernel, reward or method.

    def test_my_kernel():
        check_kernel(MyKernel(), prompts=["a red cube"])

Each raises AssertionError with what was expected and what came. `atol` is the room that a network needs because its
rows differ in the last digits with the batch they are in; kernels in closed form pass with atol=0.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.base import Kernel, Shared, Spec, Transition, describe
from rewards.base import Reward, as_reward
from treesearch.budget import Budget
from treesearch.errors import BudgetError
from treesearch.loop import open_session, resume, search, stream
from treesearch.methods.base import AUTO, Method, Status
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.diffusion_tree import DiffusionTreeSampling
from treesearch.methods.feynman_kac import FeynmanKac
from treesearch.noise import child_keys, normals, root_key
from treesearch.result import SearchResult, TaskResult
from treesearch.runs import read_blocks
from treesearch.tree import ROOT, Tree


def total(samples: Any) -> Tensor:
    """A reward for tensors: the sum of a sample's entries."""
    return torch.as_tensor(samples).double().flatten(1).sum(1)


def noise(spec: Spec, keys: np.ndarray, t: int) -> Tensor:
    """Standard normals (n, *noise_shape) of the step t -> t - 1; t = T + 1 for the prior."""
    draws = normals(keys, np.full(len(keys), t), math.prod(spec.noise_shape))
    return torch.from_numpy(draws).reshape(len(keys), *spec.noise_shape).to(spec.device)


def conditioning(kernel: Kernel, prompts: Sequence[Any] | None, task: np.ndarray) -> dict[str, Any]:
    """What the engine hands to the kernel for rows of the given tasks."""
    rows, encoded = torch.from_numpy(task), (kernel.encode(prompts) if prompts is not None else None) or {}
    return {k: v.value if isinstance(v, Shared) else v[rows] for k, v in encoded.items()} | {"task": rows}


def bare_chain(
    kernel: Kernel, n: int, *, seed: int = 0, task: int = 0, prompts: Sequence[Any] | None = None
) -> list[Tensor]:
    """States x_T, ..., x_0 of a task's first n rollouts: the loop that a search must not change."""
    spec = describe(kernel)
    root = np.array([root_key(seed, task)], np.uint64)
    keys = child_keys(root, spec.num_steps + 1, np.arange(n), at_root=True)
    cond = conditioning(kernel, prompts, np.full(n, task))
    path = [kernel.prior(noise(spec, keys, spec.num_steps + 1), cond)]
    for t in range(spec.num_steps, 0, -1):
        path.append(kernel.transition(path[-1], torch.full((n,), t), cond).sample(noise(spec, keys, t)))
    return path


# Kernels


def check_kernel(
    kernel: Kernel, prompts: Sequence[Any] | None = None, *, rows: int = 16, atol: float = 1e-5, proposal: bool = False
) -> None:
    """Laws of a kernel.

    Args:
        kernel: the kernel.
        prompts: conditioning to try it with; rows take them in turn.
        rows: states at each level.
        atol: how far a row may move with its batch.
        proposal: whether its steps carry log p/q (a guided kernel); otherwise `log_weight` must be zero.
    """
    spec = describe(kernel)
    task = np.arange(rows) % len(prompts) if prompts is not None else np.zeros(rows, np.int64)
    cond = conditioning(kernel, prompts, task)
    keys = [np.arange(rows, dtype=np.uint64) + np.uint64(1000 * k) for k in range(2)]
    state = torch.random.get_rng_state()
    path = [_check_prior(kernel, spec, cond, keys)]
    for t in range(spec.num_steps, 0, -1):
        path.append(_check_step(kernel, spec, path[-1], t, cond, keys, atol, proposal))
    _check_mixed_levels(kernel, spec, path, cond, keys[0], atol)
    for n in (1, rows):
        got = len(kernel.decode(path[-1][:n]))
        assert got == n, f"decode: expected {n} samples of {n} states, got {got}"
    again = describe(kernel).fingerprint
    assert spec.fingerprint == again, f"fingerprint: expected {spec.fingerprint!r} twice, got {again!r}"
    same = torch.equal(state, torch.random.get_rng_state())
    assert same, "the kernel drew from torch's global generator: expected all randomness from `noise`"
    _check_search_keeps_p(kernel, spec, prompts, atol)


def _check_prior(kernel: Kernel, spec: Spec, cond: dict[str, Any], keys: list[np.ndarray]) -> Tensor:
    one, other = (noise(spec, k, spec.num_steps + 1) for k in keys)
    x, want = kernel.prior(one, cond), (len(one), *spec.state_shape)
    assert tuple(x.shape) == want, f"prior: expected shape {want}, got {tuple(x.shape)}"
    assert x.dtype == spec.dtype, f"prior: expected kernel.dtype {spec.dtype}, got {x.dtype}"
    _same("prior: two calls with one noise", kernel.prior(one, cond), x, 0)
    _agrees(spec.stochastic[0], x, kernel.prior(other, cond), 0)
    return x


def _check_step(
    kernel: Kernel, spec: Spec, x: Tensor, t: int, cond: dict[str, Any], keys: list[np.ndarray], atol: float, q: bool
) -> Tensor:
    n, before, level = len(x), x.clone(), torch.full((len(x),), t)
    one, other = (noise(spec, k, t) for k in keys)
    law = kernel.transition(x, level, cond)
    assert isinstance(law, Transition), f"transition: expected the methods of Transition, got {type(law).__name__}"
    y = law.sample(one)
    for name, got in (("sample", y), ("endpoint", law.endpoint)):
        assert got.shape == x.shape, f"{name} at t = {t}: expected shape {tuple(x.shape)}, got {tuple(got.shape)}"
    assert y.dtype == spec.dtype, f"sample at t = {t}: expected {spec.dtype}, got {y.dtype}"
    assert torch.isfinite(y.double()).all(), f"sample at t = {t}: expected finite states"
    _same(f"sample at t = {t}: two calls with one noise", law.sample(one), y, 0)
    _same(f"transition at t = {t} wrote into its input", x, before, 0)
    _agrees(spec.stochastic[t], y, law.sample(other), t)
    log_q, log_w = law.log_prob(y), law.log_weight(y)
    for name, got in (("log_prob", log_q), ("log_weight", log_w)):
        assert got.shape == (n,), f"{name} at t = {t}: expected shape ({n},), got {tuple(got.shape)}"
        finite = torch.isfinite(got).all()
        assert finite, f"{name} of the law's own sample at t = {t}: expected finite, got {got.tolist()}"
    assert q or not log_w.any(), f"log_weight at t = {t}: expected zeros of a base kernel, got {log_w.tolist()}"
    mean, std = getattr(law, "mean", None), getattr(law, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.shape == y.shape and (std > 0).all():
        z = (y.double() - mean.double()) / std.double()
        want = (-0.5 * z**2 - std.double().log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        _same(f"log_prob at t = {t} beside N(mean, std²)", log_q.double(), want, max(atol, 1e-6) * max(1, y[0].numel()))
    pick = torch.tensor([0, 0, n - 1, n // 2])
    picked = {k: v[pick] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
    alone = kernel.transition(x[pick], level[pick], picked)
    _same(f"take with repeats at t = {t}", law.take(pick).sample(other[:4]), alone.sample(other[:4]), atol)
    return y


def _check_mixed_levels(
    kernel: Kernel, spec: Spec, path: list[Tensor], cond: dict[str, Any], keys: np.ndarray, atol: float
) -> None:
    """Rows of one call may have different t: each must come out as it does alone."""
    n = len(keys)
    t = torch.arange(n) % spec.num_steps + 1
    x = torch.stack([path[spec.num_steps - int(level)][i] for i, level in enumerate(t)])
    draws = torch.cat([noise(spec, keys[[i]], int(level)) for i, level in enumerate(t)])
    law = kernel.transition(x, t, cond)
    together = law.sample(draws)
    for i in range(n):
        row = {k: v[[i]] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
        one = kernel.transition(x[[i]], t[[i]], row)
        where = f"row {i} at t = {int(t[i])} in a batch of mixed levels, beside the row alone"
        _same(f"sample: {where}", together[[i]], one.sample(draws[[i]]), atol)
        _same(f"endpoint: {where}", law.endpoint[[i]], one.endpoint, atol)


def _check_search_keeps_p(kernel: Kernel, spec: Spec, prompts: Sequence[Any] | None, atol: float) -> None:
    methods: list[Method] = [BestOfN(lam=0.0)]
    if all(spec.branchable(t) for t in range(1, spec.num_steps + 1)):
        # Without resampling: proposals rightly resample on their p/q.
        methods += [FeynmanKac(num_particles=4, lam=0.0, ess_threshold=0.0), DiffusionTreeSampling(lam=0.0, wave=5)]
    tasks = 1 if prompts is None else len(prompts)
    for method in methods:
        budget = Budget(nfe=12 * spec.num_steps * tasks)
        found = search(kernel, _indifferent, method, prompts=prompts, budget=budget, batch_size=5)
        for i, task in enumerate(found.tasks):
            want = kernel.decode(bare_chain(kernel, 12, task=i, prompts=prompts)[-1])
            _same(f"{type(method).__name__} with lam = 0, task {i}, beside the bare chain", task.samples, want, atol)


def _indifferent(samples: Any) -> Tensor:
    return torch.zeros(len(samples))


# Rewards


def check_reward(
    reward: Reward | Callable[..., Any], samples: Any, prompts: Sequence[Any] | None = None, *, atol: float = 1e-5
) -> None:
    """Laws of a reward on at least three samples; give different prompts, or a misplaced one goes unseen."""
    reward, n = as_reward(reward), len(samples)
    assert n >= 3, f"expected at least three samples to compare, got {n}"
    before = copy.deepcopy(samples)

    def score(rows: Sequence[int]) -> Tensor:
        chosen = samples[torch.tensor(rows)] if isinstance(samples, Tensor) else [samples[i] for i in rows]
        return reward(chosen, None if prompts is None else [prompts[i] for i in rows])

    whole = reward(samples, prompts)  # shape, NaN and +inf are checked by Reward itself
    _same("reward wrote into its samples", samples, before, 0)
    _same("reward: two calls with the same samples", score(range(n)), whole, atol)
    _same("reward of n single rows beside one batch", torch.cat([score([i]) for i in range(n)]), whole, atol)
    _same("reward of two parts beside one batch", torch.cat([score(range(2)), score(range(2, n))]), whole, atol)
    back = list(range(n))[::-1]
    _same("reward of the rows in reverse order, turned back", score(back).flip(0), whole, atol)


# Methods and stores


class Counting:
    """A kernel that counts its own network evaluations and has a fingerprint."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.rows, self.calls = kernel, 0, 0
        self.fingerprint = getattr(kernel, "fingerprint", None) or "conformance"

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Transition:
        self.rows += len(x)
        self.calls += 1
        return self.kernel.transition(x, t, cond)

    def __getattr__(self, name: str) -> Any:
        if name == "kernel" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.kernel, name)


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
    assert not shared, f"another seed: expected other noise keys, got {shared} shared ones"
    check_edges(kernel, first.tasks[0], seed, atol)
    three = run(tasks=3).tasks
    check_noise([task.tree for task in three], steps)
    if method.lam != AUTO and ordered:  # a pilot looks at all tasks
        same_task(run(tasks=1).tasks[0], three[0], atol, "a task alone beside the same task among three")
    if "lam" in (field.name for field in fields(method)):
        calm = run(replace(method, lam=0.0))
        assert calm.log_z in (None, 0.0), f"log_z at lam = 0: expected 0 or None, got {calm.log_z}"
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
        assert str(unit.nfe) in told, f"a budget below {unit.name}: expected BudgetError with {unit.nfe}, got {told!r}"
    for nfe in (max(unit.nfe, full), full + 1, 2 * full + spec.num_steps - 1):
        counted: Any = Counting(kernel)
        result = search(counted, reward, method, budget=Budget(nfe=nfe))
        spent = result.cost.nfe
        assert spent == counted.rows, f"cost.nfe: expected {counted.rows}, which the kernel counted, got {spent}"
        assert spent <= nfe, f"budget of {nfe} NFE: spent {spent}"
        done = result.status in (Status.FINISHED, Status.EXHAUSTED)
        assert done or spent >= 0.97 * nfe, f"budget of {nfe} NFE: expected at least 97 % spent, got {spent}"
        calls = search(kernel, reward, method, budget=Budget(nfe=nfe, reward_calls=nfe // 2)).cost.reward_calls
        assert calls <= nfe // 2, f"budget of {nfe // 2} reward calls: spent {calls}"


def check_noise(trees: Sequence[Tree], num_steps: int) -> None:
    """No two steps of any tree share their noise, the stream (key, t)."""
    used = []
    for tree in trees:
        t, above = tree.t[1:].astype(int), tree.t[tree.parent[1:]].astype(int)
        above[above == t] += 1  # a neighbour draws from the prior's stream
        steps = above - t
        level = np.repeat(above, steps) - (np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps))
        used.append(np.stack([np.repeat(tree.key[1:], steps), level.astype(np.uint64)], 1))
    rows = np.concatenate(used)
    assert rows[:, 1].max() <= num_steps + 1
    shared = len(rows) - len(np.unique(rows, axis=0))
    assert not shared, f"noise: expected {len(rows)} different (key, t), got {shared} shared ones"


def check_edges(kernel: Kernel, task: TaskResult, seed: int, atol: float = 0.0, number: int = 0) -> None:
    """Every sample is what the kernel itself draws along the sample's path, from the keys of the path."""
    tree, spec, states, z = task.tree, describe(kernel), dict[int, Any](), dict[int, Tensor]()
    key, got = root_key(seed, number), int(tree.key[ROOT])
    assert got == key, f"root key of task {number}: expected {key}, got {got}"
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
                x = kernel.transition(x, torch.tensor([t]), cond).sample(noise(spec, keys, t))
        states[node] = x
    want = kernel.decode(torch.cat([states[int(leaf)] for leaf in task.leaves]))
    _same("samples beside the kernel's own steps along their paths", task.samples, want, atol)


def check_store(
    method: Method,
    kernel: Kernel,
    reward: Callable[..., Any],
    folder: str | os.PathLike[str],
    *,
    cuts: int = 8,
    atol: float = 0.0,
) -> None:
    """A run cut or damaged at any byte, or stopped after a wave, ends like a straight one; states are lossless."""
    counted: Any = Counting(kernel)
    kernel, folder = counted, Path(folder)
    whole, budget = folder / "whole", Budget(nfe=80 * describe(kernel).num_steps)
    straight = search(kernel, reward, method, budget=budget, seed=5)
    same_result(search(kernel, reward, method, budget=budget, seed=5, store=whole), straight, atol, "with a store")
    log, ends = (whole / "tree.bin").read_bytes(), [end for _, end in read_blocks(whole)]
    assert ends[-1] == len(log), f"tree.bin: expected whole blocks up to byte {len(log)}, got {ends[-1]}"
    damaged = {f"log cut at byte {at}": log[:at] for at in np.linspace(12, len(log) - 1, cuts, dtype=int).tolist()}
    damaged["log cut between two waves"] = log[: ends[len(ends) // 3]]
    damaged["log without its second wave"] = log[: ends[0]] + log[ends[min(1, len(ends) - 1)] :]
    for at in (ends[0] + 4, ends[0] + 60):  # in a header, in what follows it
        flipped = bytes(byte ^ 1 for byte in log[at : at + 1])
        damaged[f"log with a flipped bit in byte {at}"] = log[:at] + flipped + log[at + 1 :]
    for i, (what, data) in enumerate(damaged.items()):
        shutil.copytree(whole, folder / f"damaged-{i}")
        (folder / f"damaged-{i}" / "tree.bin").write_bytes(data)
        same_result(resume(folder / f"damaged-{i}", kernel, reward), straight, atol, what)
    for snapshot in stream(kernel, reward, method, budget=budget, seed=5, store=folder / "stopped"):
        if snapshot.wave + 1 >= len(ends) // 2:
            break
    same_result(resume(folder / "stopped", kernel, reward), straight, atol, "stopped half-way")
    session = open_session(whole, kernel, reward)
    stored = session.states.get(session.searches[0].tree.slot[straight.leaves])
    if session.run is not None:
        session.run.close("finished")
    _same("stored states beside the samples", kernel.decode(stored), straight.samples, 0)


def same_result(got: SearchResult, want: SearchResult, atol: float = 0.0, where: str = "a second run") -> None:
    """Two searches found the same trees at the same cost."""
    for name in ("nfe", "reward_calls"):
        a, b = getattr(got.cost, name), getattr(want.cost, name)
        assert a == b, f"{where}: cost.{name}: expected {b}, got {a}"
    for a, b in zip(got.tasks, want.tasks, strict=True):
        same_task(a, b, atol, where)


def same_task(got: TaskResult, want: TaskResult, atol: float = 0.0, where: str = "a second run") -> None:
    """Two tasks have the same tree, samples and weights."""
    for name in ("parent", "t", "key", "visits"):
        a, b = getattr(got.tree, name), getattr(want.tree, name)
        assert np.array_equal(a, b), f"{where}: tree.{name}: expected {b}, got {a}"
    for name in ("value", "reward", "log_w"):
        a, b = torch.from_numpy(getattr(got.tree, name)), torch.from_numpy(getattr(want.tree, name))
        _same(f"{where}: tree.{name}", a, b, max(atol, 1e-12))  # a rebuilt value sums its children in another order
    _same(f"{where}: samples", got.samples, want.samples, atol)
    _same(f"{where}: log_weights", got.log_weights, want.log_weights, max(atol, 1e-12))


def _same(what: str, got: Any, want: Any, atol: float) -> None:
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        assert list(got) == list(want), f"{what}: expected {want}, got {got}"
        return
    assert got.shape == want.shape, f"{what}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
    close = torch.isclose(got.double(), want.double(), rtol=atol, atol=atol, equal_nan=True)
    if not close.all():
        row = int((~close).nonzero()[0, 0])
        raise AssertionError(f"{what}: expected {want[row].tolist()} in row {row}, got {got[row].tolist()}")


def _agrees(stochastic: bool, one: Tensor, other: Tensor, t: int) -> None:
    differ = not torch.equal(one, other)
    gave = "different states" if differ else "the same states"
    assert differ == stochastic, f"stochastic[{t}] is {stochastic}, but two noises gave {gave}"
