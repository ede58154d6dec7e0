"""Measurements on the user's own kernel: what a search will cost, and how much of the bare speed it keeps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from treesearch import api as loop
from treesearch.backends.base import Shared, Spec, bare, describe, optional
from treesearch.budget import INFINITE, Budget, Pace, Share
from treesearch.core.noise import child_keys, normals, root_key
from treesearch.core.tree import Tree
from treesearch.engine.asking import without_graph
from treesearch.methods import BestOfN, TreeSearch
from treesearch.rewards.base import Reward
from treesearch.session.session import Session

ROUNDS = 3


@without_graph()
def estimate(session: Session) -> dict[str, Any]:
    """NFE, memory and seconds of a search, from two batches of network calls and one of rewards (never counted).

    Of a kernel whose plan does not fit the device only the plan: nothing else could be measured.
    """
    session.check_budget()
    spec, kernel, size = session.spec, session.kernel, session.options.batch_size
    budget, tasks = session.budget, session.num_tasks
    keys = child_keys(np.array([session.keys[0]], np.uint64), spec.num_steps + 1, np.arange(size), at_root=True)
    noise = torch.from_numpy(normals(keys, np.full(size, spec.num_steps + 1), int(np.prod(spec.noise_shape))))
    noise = noise.reshape(size, *spec.noise_shape).to(spec.device)
    prompts = None if session.prompts is None else list(session.prompts)
    encoded = kernel.encode(prompts) if prompts else None
    plan = _memory(session)
    if plan.get("fits") is False:
        return plan
    rows = torch.zeros(size, dtype=torch.int64, device=spec.device)
    cond = {k: v.value if isinstance(v, Shared) else v[rows] for k, v in (encoded or {}).items()} | {"task": rows}
    x = kernel.prior(noise, cond)
    levels = torch.full((size,), spec.num_steps, device=spec.device)
    law, per_nfe = _timed(lambda: kernel.transition(x, levels, cond), size)
    sampled = session.reward.input == "sample"
    samples, per_decode = _timed(lambda: (kernel.decode if sampled else partial(bare, kernel))(law.endpoint), size)
    per_reward = per_decode + _scoring(session, samples)
    unit, pace = session.method.unit(spec), Pace(per_nfe, per_reward)
    units = min(budget.share(tasks).units(unit.nfe, unit.reward_calls), getattr(session.method, "n", None) or INFINITE)
    ends: dict[str, str] = {}
    if budget.seconds is not None:
        timed = Share(pace=pace, seconds=budget.seconds).in_time(tasks * unit.nfe, tasks * unit.reward_calls)
        ends = {"ends_by": "seconds" if timed < units else "another limit than seconds"}
        units = max(1, min(units, timed))
    elif units > INFINITE // 10**6:  # no limit that counts
        units = 1
    nfe, rewards = units * unit.nfe * tasks, units * unit.reward_calls * tasks
    rollouts = nfe // spec.num_steps
    new, read = _at_most(session, nfe)
    nodes = new + tasks
    row = Tree(1, root_key(0, 0)).bytes_per_node
    return {
        "nfe": nfe,
        "full_rollouts": rollouts,
        "ms_per_nfe": round(1e3 * per_nfe, 3),
        "ms_per_reward": round(1e3 * per_reward, 3),
        "ms_of_it_decoding": round(1e3 * per_decode, 3),
        **({"reward_calls_at_most": read} if read else {"reward_calls": rewards}),
        "seconds": round(seconds := pace.of(nfe, max(read, rewards)), 1),
        "seconds_of_it_rewards": round(seconds - nfe * per_nfe, 1),
        **ends,
        "nodes_at_most": nodes,
        "megabytes_at_most": round(nodes * (row + spec.state_bytes) / 2**20, 1),
    } | plan


def _timed(run: Callable[[], Any], rows: int) -> tuple[Any, float]:
    """What something comes to at its second run, and the seconds of a row: until a device has done it."""
    _done(run())
    began = time.perf_counter()
    found = _done(run())
    return found, (time.perf_counter() - began) / rows


def _done(found: Any) -> Any:
    """What was asked for, once it is there: devices compute on after a call."""
    made = found if isinstance(found, torch.Tensor) else getattr(found, "endpoint", None)
    if made is not None:
        made.flatten()[:1].cpu()
    return found


def _scoring(session: Session, samples: Any) -> float:
    """Seconds of a reward, by samples that no cache knows: the first of them loads what there is to load."""
    prompt = None if session.prompts is None else list(session.prompts)[:1]
    seconds = 0.0
    for part in [samples[:1], samples[1:]] if len(samples) > 1 else [samples]:
        began = time.perf_counter()
        session.reward(part, None if prompt is None else prompt * len(part))
        seconds = (time.perf_counter() - began) / len(part)
    return seconds


def _at_most(session: Session, nfe: int) -> tuple[int, int]:
    """New nodes and reward calls that a budget of predicted NFE pays for at most, from what the cheapest of each costs;
    0 reward calls where the unit of the method says how many there are."""
    method, spec, limits = session.method, session.spec, session.budget
    spent = nfe if limits.nfe is None else limits.nfe
    calls = INFINITE if limits.reward_calls is None else limits.reward_calls
    if isinstance(method, TreeSearch):
        return _of_trees(method, spec, spent, calls)
    rungs = getattr(method, "rungs", ())
    if not rungs:
        return nfe // spec.num_steps * (1 if isinstance(method, BestOfN) else 6), 0
    candidates = getattr(method, "n", None)  # a node at every rung, and one more where it is finished
    most = INFINITE if candidates is None else candidates * session.num_tasks * (len(rungs) + 1)
    paid = INFINITE if limits.nfe is None and min(most, calls) < INFINITE else spent
    most = min(most, calls, paid // spec.draft_prices(rungs[0])[-1])
    return most, most


def _of_trees(method: TreeSearch, spec: Spec, nfe: int, calls: int) -> tuple[int, int]:
    """That of TreeSearch: looks cost an evaluation at least, ways down by where they begin, drafts by their level."""
    if method.looks != "none":
        return min(nfe, calls), min(nfe, calls)
    levels = np.array([spec.num_steps + 1, *method.levels(spec), 0])
    start = np.minimum(levels[:-1], spec.num_steps)
    nodes = math.floor(nfe * float((np.arange(len(start), 0, -1) / start).max()))
    if method.draft is None:
        return nodes, 0
    gap = start - np.minimum(levels[1:], spec.num_steps)
    prices = (gap + np.array(spec.draft_prices(method.draft))[levels[1:]])[:-2]
    drafts = nfe // max(1, int(prices.min(initial=spec.num_steps)))
    return max(drafts, nodes), min(max(drafts, nfe // int(start[-1])), calls)


def _memory(session: Session) -> dict[str, Any]:
    """Bytes on the device and whether it has them, for kernels that can plan them."""
    plan = optional(session.kernel, "memory_plan")
    if plan is None:
        return {}
    backward = any(session.spec.backward_per_nfe)
    found = plan(session.options.batch_size, prompts=session.prompts or [""], backward=backward)
    if found is None:
        return {}
    return {"memory": found.lines()} | ({} if found.fits is None else {"fits": found.fits})


@without_graph()
def bare_loop(kernel: Any, batch_size: int, batches: int, reward: Reward | None = None, seed: int = 0) -> int:
    """The plain denoising loop of a kernel with torch's own noise, decode and reward at its end; returns its NFE."""
    spec = describe(kernel)
    draw = torch.Generator().manual_seed(seed)
    task = torch.zeros(batch_size, dtype=torch.int64, device=spec.device)
    for _ in range(batches):
        x = kernel.prior(torch.randn(batch_size, *spec.noise_shape, generator=draw).to(spec.device), {"task": task})
        for t in range(spec.num_steps, 0, -1):
            noise = torch.randn(batch_size, *spec.noise_shape, generator=draw).to(spec.device)
            levels = torch.full((batch_size,), t, device=spec.device)
            x = kernel.transition(x, levels, {"task": task}).sample(noise)
        if reward is not None:
            reward(kernel.decode(x) if reward.input == "sample" else bare(kernel, x))
    return batches * batch_size * spec.num_steps


def speed(kernel: Any, reward: Reward, batch_sizes: tuple[int, ...], batches: int = 2) -> list[dict[str, Any]]:
    """NFE/s of the bare loop and of best-of-N by batch size; interleaved rounds, medians."""
    out = []
    for size in batch_sizes:
        nfe = size * batches * kernel.num_steps
        timed: dict[str, list[float]] = {"bare": [], "search": []}
        for round_ in range(ROUNDS + 1):
            for name in timed:
                began = time.perf_counter()
                if name == "bare":
                    bare_loop(kernel, size, batches, reward)
                else:
                    loop.search(kernel, reward, BestOfN(), budget=Budget(nfe=nfe), batch_size=size, progress=False)
                if round_:  # the first warms up
                    timed[name].append(nfe / (time.perf_counter() - began))
        bare, search = (statistics.median(timed[name]) for name in ("bare", "search"))
        out.append({"batch_size": size, "bare": bare, "search": search, "ratio": search / bare})
    return out
