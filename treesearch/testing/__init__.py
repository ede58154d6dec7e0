"""Laws that every plug-in must obey, as functions to call from a test of your own kernel, reward or method.

    def test_my_kernel():
        check_kernel(MyKernel(), prompts=["a red cube"])

Each raises `CheckFailed`, an AssertionError, with what was expected and what came; it does so under `python -O` too.

The rows of a network differ in their last digits with the batch they are in, so comparisons across batches leave room,
`atol`. Without one it is what rounding explains: λ ε Σ_layers √n of the largest entry of the row, with ε of the
network's dtype, n the terms of a sum, λ = 4 (a sum of n terms misses by more with probability 2 exp(-λ²/2)), times the
steps of a chain and 1/α_t where a step divides by α_t. Kernels in closed form pass with atol=0.

Source: A New Approach to Probabilistic Rounding Error Analysis (Higham and Mary, 2019), theorem 2.4.
"""

from __future__ import annotations

import copy
import math
import os
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treesearch.api import open_session, resume, search, stream
from treesearch.backends.base import Kernel, Shared, Spec, Transition, Wrapper, describe, optional
from treesearch.budget import Budget
from treesearch.core.noise import child_keys, normals, root_key
from treesearch.core.tree import ROOT, Tree
from treesearch.errors import BudgetError, StoreError
from treesearch.methods.base import AUTO, Method, Status
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.diffusion_tree import DiffusionTreeSampling
from treesearch.methods.feynman_kac import FeynmanKac
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.values import flat
from treesearch.runs.folder import read_blocks


class CheckFailed(AssertionError):
    """A law that does not hold."""


def require(holds: Any, message: str) -> None:
    """Raise where a law does not hold: an `assert` would be gone under `python -O`."""
    if not holds:
        raise CheckFailed(message)


LAM = 4.0  # λ of the bound on rounding
UNSEEN = 256.0  # Σ √n of a network that cannot be looked into: eight layers of sums of 1,000 terms


@dataclass(frozen=True)
class Room:
    """How far two computations of the same rows may be apart: atol (1 + |want|) + share · max |row of want|."""

    atol: float = 0.0
    share: float = 0.0

    def times(self, factor: float) -> Room:
        """More of what rounding explains; what was asked for stays."""
        return Room(self.atol, self.share * factor)

    def of(self, want: Tensor) -> Tensor:
        """For each entry of want (n, ...), float64."""
        size = want.double().abs()
        largest = torch.where(size.isfinite(), size, 0.0).reshape(len(want), -1).amax(1)
        return self.atol * (1 + size) + self.share * largest.reshape(-1, *(1,) * (want.ndim - 1))


def rounding(kernel: Kernel) -> Room:
    """What rounding explains in one evaluation: λ u Σ √n of a row's largest entry, u half of ε."""
    weights = [w for network in _networks(kernel) for w in network.parameters()]
    length = sum(math.sqrt(math.prod(w.shape[1:])) for w in weights if w.ndim > 1)
    dtypes = [w.dtype for w in weights if w.is_floating_point()] + [describe(kernel, identify=False).dtype]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
    return Room(share=LAM * eps / 2 * max(length, UNSEEN))


def _networks(kernel: Any) -> Iterator[nn.Module]:
    """Networks that a kernel, the kernels that it wraps, or their pipelines hold."""
    if isinstance(kernel, Wrapper):
        yield from _networks(kernel.kernel)
    for value in (kernel, *getattr(kernel, "__dict__", {}).values()):
        parts = getattr(value, "components", None)  # of a pipeline
        held = (value, *parts.values()) if isinstance(parts, Mapping) else (value,)
        yield from (part for part in held if isinstance(part, nn.Module))


def _gain(kernel: Kernel, t: int) -> float:
    """How often more the rounding of a network's output counts in x̂_0: 1/α_t where it predicts ε."""
    chain = optional(kernel, "chain")
    alpha: Any = getattr(chain, "alpha", None)
    if getattr(getattr(chain, "schedule", None), "prediction", "") != "epsilon" or not isinstance(alpha, Tensor):
        return 1.0
    return 1 / float(alpha[t])


def total(samples: Any) -> Tensor:
    """A reward for tensors: the sum of a sample's entries."""
    return flat(torch.as_tensor(samples, device="cpu").double()).sum(1)


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
        path.append(kernel.transition(path[-1], torch.full((n,), t, device="cpu"), cond).sample(noise(spec, keys, t)))
    return path


# Kernels


def check_kernel(
    kernel: Kernel,
    prompts: Sequence[Any] | None = None,
    *,
    rows: int = 16,
    atol: float | None = None,
    proposal: bool = False,
) -> None:
    """Laws of a kernel.

    Args:
        kernel: the kernel.
        prompts: conditioning to try it with; rows take them in turn.
        rows: states at each level.
        atol: how far a row may move with its batch, None for what rounding explains.
        proposal: whether its steps carry log p/q (a guided kernel); otherwise `log_weight` must be zero.

    Raises:
        CheckFailed: a law does not hold; the message names it, the rows and the gap.
    """
    spec, room = describe(kernel), rounding(kernel) if atol is None else Room(atol)
    task = np.arange(rows) % len(prompts) if prompts is not None else np.zeros(rows, np.int64)
    cond = conditioning(kernel, prompts, task)
    keys = [np.arange(rows, dtype=np.uint64) + np.uint64(1000 * k) for k in range(2)]
    state = torch.random.get_rng_state()
    path = [_check_prior(kernel, spec, cond, keys)]
    for t in range(spec.num_steps, 0, -1):
        path.append(_check_step(kernel, spec, path[-1], t, cond, keys, room, proposal))
    _check_mixed_levels(kernel, spec, path, cond, keys[0], room)
    for n in (1, rows):
        got = len(kernel.decode(path[-1][:n]))
        require(got == n, f"decode: expected {n} samples of {n} states, got {got}")
    again = describe(kernel).fingerprint
    require(spec.fingerprint == again, f"fingerprint: expected {spec.fingerprint!r} twice, got {again!r}")
    same = torch.equal(state, torch.random.get_rng_state())
    require(same, "the kernel drew from torch's global generator: expected all randomness from `noise`")
    _check_search_keeps_p(kernel, spec, prompts, room.times(spec.num_steps))


def _check_prior(kernel: Kernel, spec: Spec, cond: dict[str, Any], keys: list[np.ndarray]) -> Tensor:
    one, other = (noise(spec, k, spec.num_steps + 1) for k in keys)
    x, want = kernel.prior(one, cond), (len(one), *spec.state_shape)
    require(tuple(x.shape) == want, f"prior: expected shape {want}, got {tuple(x.shape)}")
    require(x.dtype == spec.dtype, f"prior: expected kernel.dtype {spec.dtype}, got {x.dtype}")
    _same("prior: two calls with one noise", kernel.prior(one, cond), x)
    _agrees(spec.stochastic[0], x, kernel.prior(other, cond), 0)
    return x


def _check_step(
    kernel: Kernel, spec: Spec, x: Tensor, t: int, cond: dict[str, Any], keys: list[np.ndarray], room: Room, q: bool
) -> Tensor:
    n, before, level = len(x), x.clone(), torch.full((len(x),), t, device="cpu")
    one, other = (noise(spec, k, t) for k in keys)
    law = kernel.transition(x, level, cond)
    require(isinstance(law, Transition), f"transition: expected the methods of Transition, got {type(law).__name__}")
    y = law.sample(one)
    for name, got in (("sample", y), ("endpoint", law.endpoint)):
        require(got.shape == x.shape, f"{name} at t = {t}: expected shape {tuple(x.shape)}, got {tuple(got.shape)}")
    require(y.dtype == spec.dtype, f"sample at t = {t}: expected {spec.dtype}, got {y.dtype}")
    require(torch.isfinite(y.double()).all(), f"sample at t = {t}: expected finite states")
    _same(f"sample at t = {t}: two calls with one noise", law.sample(one), y)
    _same(f"transition at t = {t} wrote into its input", x, before)
    _agrees(spec.stochastic[t], y, law.sample(other), t)
    log_q, log_w = law.log_prob(y), law.log_weight(y)
    for name, got in (("log_prob", log_q), ("log_weight", log_w)):
        require(got.shape == (n,), f"{name} at t = {t}: expected shape ({n},), got {tuple(got.shape)}")
        finite = torch.isfinite(got).all()
        require(finite, f"{name} of the law's own sample at t = {t}: expected finite, got {_short(got.tolist())}")
    zeros = f"log_weight at t = {t}: expected zeros of a base kernel, got {_short(log_w.tolist())}"
    require(q or not log_w.any(), zeros)
    mean, std = getattr(law, "mean", None), getattr(law, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.shape == y.shape and (std > 0).all():
        _check_density(f"log_prob at t = {t} beside N(mean, std²)", log_q, y, mean, std)
    pick = torch.tensor([0, 0, n - 1, n // 2], device="cpu")
    picked = {k: v[pick] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
    alone = kernel.transition(x[pick], level[pick], picked)
    _same(
        f"take with repeats at t = {t}",
        law.take(pick).sample(other[:4]),
        alone.sample(other[:4]),
        room.times(_gain(kernel, t)),
    )
    return y


def _check_density(what: str, log_q: Tensor, x: Tensor, mean: Tensor, std: Tensor) -> None:
    """log N(x; mean, std²): a sum of D terms, each with the rounding of (x - mean)/std in the dtype of log_q or x."""
    z, size = (x.double() - mean.double()) / std.double(), torch.maximum(x.abs(), mean.abs()).double()
    terms = -0.5 * z**2 - std.double().log() - 0.5 * math.log(2 * math.pi)
    eps = max(torch.finfo(v.dtype).eps for v in (log_q, x))
    parts = 0.5 * z**2 + std.double().log().abs() + 1
    room = LAM * eps * (math.sqrt(z[0].numel()) * parts + (z * size / std.double()).abs()).flatten(1).sum(1)
    _same(what, log_q.double(), terms.flatten(1).sum(1), room)


def _check_mixed_levels(
    kernel: Kernel, spec: Spec, path: list[Tensor], cond: dict[str, Any], keys: np.ndarray, room: Room
) -> None:
    """Rows of one call may have different t: each must come out as it does alone."""
    n = len(keys)
    t = torch.arange(n, device="cpu") % spec.num_steps + 1
    x = torch.stack([path[spec.num_steps - int(level)][i] for i, level in enumerate(t)])
    draws = torch.cat([noise(spec, keys[[i]], int(level)) for i, level in enumerate(t)])
    law = kernel.transition(x, t, cond)
    together = law.sample(draws)
    for i in range(n):
        row = {k: v[[i]] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
        one = kernel.transition(x[[i]], t[[i]], row)
        where = f"row {i} at t = {int(t[i])} in a batch of mixed levels, beside the row alone"
        near = room.times(_gain(kernel, int(t[i])))
        _same(f"sample: {where}", together[[i]], one.sample(draws[[i]]), near)
        _same(f"endpoint: {where}", law.endpoint[[i]], one.endpoint, near)


def _check_search_keeps_p(kernel: Kernel, spec: Spec, prompts: Sequence[Any] | None, room: Room) -> None:
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
            _same(f"{type(method).__name__} with lam = 0, task {i}, beside the bare chain", task.samples, want, room)


def _indifferent(samples: Any) -> Tensor:
    return torch.zeros(len(samples), device="cpu")


# Rewards


def check_reward(
    reward: Reward | Callable[..., Any],
    samples: Any,
    prompts: Sequence[Any] | None = None,
    *,
    atol: float | None = None,
) -> None:
    """Laws of a reward; give different prompts, or a misplaced one goes unseen.

    Args:
        reward: the reward.
        samples: at least three.
        prompts: one a sample.
        atol: how far a reward may move with its batch, None for what rounding explains in float32.

    Raises:
        CheckFailed: a law does not hold.
        ValueError: too few samples to compare.
    """
    reward, n = as_reward(reward), len(samples)
    if n < 3:
        raise ValueError(f"expected at least three samples to compare, got {n}")
    before = copy.deepcopy(samples)

    def score(rows: Sequence[int]) -> Tensor:
        chosen = (
            samples[torch.tensor(rows, device="cpu")] if isinstance(samples, Tensor) else [samples[i] for i in rows]
        )
        return reward(chosen, None if prompts is None else [prompts[i] for i in rows])

    try:
        whole = reward(samples, prompts)  # shape, NaN and +inf are checked by Reward itself
    except RewardError as error:
        raise CheckFailed(str(error)) from error
    largest = whole[whole.isfinite()].abs().max() if whole.isfinite().any() else torch.tensor(0.0, device="cpu")
    unit = torch.finfo(torch.float32).eps / 2
    room = Room(share=LAM * unit * UNSEEN).of(largest.expand(n)) if atol is None else Room(atol)
    _same("reward wrote into its samples", samples, before)
    _same("reward: two calls with the same samples", score(range(n)), whole, room)
    _same("reward of n single rows beside one batch", torch.cat([score([i]) for i in range(n)]), whole, room)
    _same("reward of two parts beside one batch", torch.cat([score(range(2)), score(range(2, n))]), whole, room)
    back = list(range(n))[::-1]
    _same("reward of the rows in reverse order, turned back", score(back).flip(0), whole, room)


# Methods and stores


@dataclass
class Tally:
    """Network evaluations: of one state each, and in how many calls."""

    rows: int = 0
    calls: int = 0


@dataclass(frozen=True, eq=False)
class Counting(Wrapper):
    """A kernel that counts its own network evaluations and has a fingerprint."""

    seen: Tally = field(default_factory=Tally)

    @property
    def fingerprint(self) -> str:
        return optional(self.kernel, "fingerprint") or "conformance"

    @property
    def rows(self) -> int:
        return self.seen.rows

    @property
    def calls(self) -> int:
        return self.seen.calls

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Transition:
        self.seen.rows += len(x)
        self.seen.calls += 1
        return self.kernel.transition(x, t, cond)


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
    """No two steps of any tree share their noise, the stream (key, t)."""
    used = []
    for tree in trees:
        t, above = tree.t[1:].astype(int), tree.t[tree.parent[1:]].astype(int)
        above[above == t] += 1  # a neighbour draws from the prior's stream
        steps = above - t
        level = np.repeat(above, steps) - (np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps))
        used.append(np.stack([np.repeat(tree.key[1:], steps), level.astype(np.uint64)], 1))
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
    _same("samples beside the kernel's own steps along their paths", task.samples, want, Room(atol))


def check_store(
    method: Method,
    kernel: Kernel,
    reward: Callable[..., Any],
    folder: str | os.PathLike[str],
    *,
    cuts: int = 8,
    atol: float = 0.0,
) -> None:
    """A run cut at any byte, with a damaged state or stopped half-way ends like a straight one; damage is refused."""
    counted: Any = Counting(kernel)
    kernel, folder = counted, Path(folder)
    whole, budget = folder / "whole", Budget(nfe=80 * describe(kernel).num_steps)
    straight = search(kernel, reward, method, budget=budget, seed=5)
    same_result(search(kernel, reward, method, budget=budget, seed=5, store=whole), straight, atol, "with a store")
    log, ends = (whole / "tree.bin").read_bytes(), [end for _, end in read_blocks(whole)]
    require(ends[-1] == len(log), f"tree.bin: expected whole blocks up to byte {len(log)}, got {ends[-1]}")
    cut = {f"log cut at byte {at}": log[:at] for at in np.linspace(12, len(log) - 1, cuts, dtype=int).tolist()}
    cut["log cut between two waves"] = log[: ends[len(ends) // 3]]
    spots = [at for at in (ends[0] + 4, ends[0] + 60) if at < len(log)]  # in a header, in what follows it
    damaged = {f"log with a flipped bit in byte {at}": flipped(log, at) for at in spots}
    damaged["log without its second wave"] = log[: ends[0]] + log[ends[min(1, len(ends) - 1)] :]
    for i, (what, data) in enumerate((cut | damaged).items()):
        copy = folder / f"damaged-{i}"
        shutil.copytree(whole, copy)
        (copy / "tree.bin").write_bytes(data)
        if what in damaged and len(ends) > 2:
            _refused(copy, kernel, reward, what)
        else:
            same_result(resume(copy, kernel, reward), straight, atol, what)
    for i, shard in enumerate(sorted(whole.glob("states-*"))):
        copy = folder / f"states-{i}"
        shutil.copytree(whole, copy)
        (copy / shard.name).write_bytes(flipped(shard.read_bytes(), shard.stat().st_size - 1))
        same_result(resume(copy, kernel, reward), straight, atol, f"{shard.name} with a flipped bit")
    for snapshot in stream(kernel, reward, method, budget=budget, seed=5, store=folder / "stopped"):
        if snapshot.wave + 1 >= len(ends) // 2:
            break
    same_result(resume(folder / "stopped", kernel, reward), straight, atol, "stopped half-way")
    session = open_session(whole, kernel, reward)
    stored = session.states.get(session.searches[0].tree.slot[straight.leaves])
    if session.run is not None:
        session.run.close("finished")
    _same("stored states beside the samples", kernel.decode(stored), straight.samples)


def flipped(data: bytes, at: int) -> bytes:
    """Bytes with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _refused(folder: Path, kernel: Kernel, reward: Callable[..., Any], what: str) -> None:
    try:
        resume(folder, kernel, reward)
    except StoreError:
        return
    require(False, f"{what}: expected a StoreError, got a result")


def same_result(got: SearchResult, want: SearchResult, atol: float = 0.0, where: str = "a second run") -> None:
    """Two searches found the same trees at the same cost."""
    for name in ("nfe", "reward_calls"):
        a, b = getattr(got.cost, name), getattr(want.cost, name)
        require(a == b, f"{where}: cost.{name}: expected {b}, got {a}")
    for a, b in zip(got.tasks, want.tasks, strict=True):
        same_task(a, b, atol, where)


def same_task(got: TaskResult, want: TaskResult, atol: float = 0.0, where: str = "a second run") -> None:
    """Two tasks have the same tree, samples and weights."""
    for name in ("parent", "t", "key", "visits"):
        a, b = getattr(got.tree, name), getattr(want.tree, name)
        if not np.array_equal(a, b):
            raise CheckFailed(f"{where}: tree.{name}: {_differing(a, b)}")
    for name in ("value", "reward", "log_w"):
        a, b = torch.from_numpy(getattr(got.tree, name)), torch.from_numpy(getattr(want.tree, name))
        _same(
            f"{where}: tree.{name}", a, b, Room(max(atol, 1e-12))
        )  # a rebuilt value sums its children in another order
    _same(f"{where}: samples", got.samples, want.samples, Room(atol))
    _same(f"{where}: log_weights", got.log_weights, want.log_weights, Room(max(atol, 1e-12)))


def _same(what: str, got: Any, want: Any, room: Room | Tensor = Room()) -> None:
    """Raise where rows differ by more than the room, which may be one number for each row."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        if list(got) != list(want):
            raise CheckFailed(f"{what}: {_differing(got, want)}")
        return
    require(got.shape == want.shape, f"{what}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
    one, other = got.double().reshape(len(got), -1), want.double().reshape(len(want), -1)
    allowed = (room.of(want) if isinstance(room, Room) else room[:, None]).to(other).reshape(len(want), -1)
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs())
    far = ~same & ~(gap <= allowed)
    if far.any():
        raise CheckFailed(f"{what}: {_far_rows(one, other, gap, allowed.expand(gap.shape), far)}")


def _far_rows(got: Tensor, want: Tensor, gap: Tensor, allowed: Tensor, far: Tensor) -> str:
    """Which rows (n, entries) are too far apart, and the widest gap."""
    rows = far.any(1).nonzero().flatten().tolist()
    over = torch.where(far, gap.nan_to_num(math.inf, math.inf), -1.0)
    row, entry = divmod(int(over.argmax()), max(1, gap.shape[1]))
    return (
        f"{len(rows)} of {len(got)} rows differ ({_short(rows)}), most in row {row}, entry {entry}: expected "
        f"{float(want[row, entry]):.7g}, got {float(got[row, entry]):.7g}, a gap of {float(gap[row, entry]):.2g} where "
        f"{float(allowed[row, entry]):.2g} is allowed"
    )


def _differing(got: Any, want: Any) -> str:
    """Where two sequences differ first."""
    if len(got) != len(want):
        return f"expected {len(want)} entries, got {len(got)}"
    rows = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    first = rows[0]
    return (
        f"{len(rows)} of {len(want)} differ ({_short(rows)}): expected {_short(want[first])}, got {_short(got[first])}"
    )


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _agrees(stochastic: bool, one: Tensor, other: Tensor, t: int) -> None:
    differ = not torch.equal(one, other)
    gave = "different states" if differ else "the same states"
    require(differ == stochastic, f"stochastic[{t}] is {stochastic}, but two noises gave {gave}")
