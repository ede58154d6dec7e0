"""What the search costs beside the model: `make bench`.

    a  search NFE/s over the bare denoising loop of the shipped model, batch 32: best-of-N, FK and the trees
    b  32 tasks x FK with 4 particles over the bare loop at full batch, and prompt by prompt
    c  descents (select, expand, run a trivial kernel, back up) per second of a tree of 10^5 nodes, and its growth
    d  share of the run folder in a search's time; time to read 10^6 nodes back

Every ratio compares two things timed in turn within this process; the figure is the median of the rounds' ratios. Both
sides decode and score the same number of samples. Absolute speeds are printed for scale only.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import treesearch as ts
from treesearch import api as loop
from treesearch.backends.base import Gaussian, describe
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.methods.settings import spaced_levels
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.images.classifier import even
from treesearch.runs import folder as runs
from treesearch.runs.shards import ShardStates

MACHINE = "2 shared CPU cores"


@dataclass(frozen=True)
class Args:
    """Arguments."""

    parts: str = "abcd"
    """which parts to run"""
    rounds: int = 5
    """timed rounds of each ratio, after one that warms up"""
    nodes: int = 1_000_000
    """largest tree of parts c and d"""
    out: Path = Path("runs/results/bench.json")
    """figures as JSON"""


@dataclass(frozen=True)
class Adds:
    """A kernel of a few adds over two floats: what is left is the search."""

    num_steps: int = 5
    state_shape = (2,)
    fingerprint = "adds"

    def prior(self, noise: Tensor, cond: Any = None) -> Tensor:
        return noise

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Gaussian:
        return Gaussian(0.9 * x, torch.full((len(x), 1), 0.3), x)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def bare(kernel: Any, reward: Reward, batch: int, rollouts: int, levels: tuple[int, ...] = (0,)) -> float:
    """NFE/s of the plain loop with torch's noise; decode and reward at each of `levels`."""
    draw, began, done = torch.Generator().manual_seed(0), time.perf_counter(), 0
    while done < rollouts:
        n = min(batch, rollouts - done)
        x = kernel.prior(torch.randn(n, *kernel.state_shape, generator=draw))
        for t in range(kernel.num_steps, 0, -1):
            law = kernel.transition(x, torch.full((n,), t))
            if t in levels:
                reward(kernel.decode(law.endpoint))
            x = law.sample(torch.randn(n, *kernel.state_shape, generator=draw))
        reward(kernel.decode(x))
        done += n
    return rollouts * kernel.num_steps / (time.perf_counter() - began)


def searched(kernel: Any, reward: Reward, method: Any, nfe: int, batch: int, tasks: int | None = None) -> float:
    """NFE/s of a search."""
    began = time.perf_counter()
    prompts = None if tasks is None else list(range(tasks))
    result = ts.search(kernel, reward, method, prompts=prompts, budget=ts.Budget(nfe=nfe), batch_size=batch)
    return result.cost.nfe / (time.perf_counter() - began)


def ratio(rounds: int, base: Callable[[], float], other: Callable[[], float]) -> dict[str, float]:
    """Medians of interleaved rounds."""
    pairs = [(base(), other()) for _ in range(rounds + 1)][1:]
    return {
        "bare_nfe_per_s": statistics.median(a for a, _ in pairs),
        "search_nfe_per_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "lowest": min(b / a for a, b in pairs),
        "highest": max(b / a for a, b in pairs),
    }


def part_a(args: Args) -> dict[str, Any]:
    """Overhead on the shipped model at batch 32."""
    kernel, reward, rollouts = mnist_kernel(25), even(), 128
    nfe = rollouts * kernel.num_steps
    scored = ts.TreeSampling().levels(describe(kernel))
    cases = {
        "best_of_n": (ts.BestOfN(), (0,), 0.95),
        "fk": (ts.FeynmanKac(), spaced_levels(kernel.num_steps, 5, top=False), 0.95),
        "dts_wave_64": (ts.DiffusionTreeSampling(wave=64), (0,), 0.90),
        "tree_sampling": (ts.TreeSampling(), scored, 0.90),
        "tree_search_wave_64": (ts.TreeSearch(wave=64), (0,), 0.90),
    }
    out = {}
    for name, (method, levels, target) in cases.items():
        found = ratio(
            args.rounds,
            lambda levels=levels: bare(kernel, reward, 32, rollouts, levels),
            lambda method=method: searched(kernel, reward, method, nfe, 32),
        )
        out[name] = found | {"target": target}
    return out


def part_b(args: Args) -> dict[str, Any]:
    """Many small searches at once, and one after another."""
    kernel, reward, tasks, particles = mnist_kernel(25), as_reward(lambda x, prompts=None: even()(x)), 32, 4
    levels, rollouts = spaced_levels(25, 5, top=False), tasks * particles
    method = ts.FeynmanKac(num_particles=particles)

    def together() -> float:
        return searched(kernel, reward, method, rollouts * 25, 64, tasks)

    def apart() -> float:
        began = time.perf_counter()
        for task in range(tasks):
            ts.search(kernel, reward, method, prompts=[task], budget=ts.Budget(nfe=particles * 25), batch_size=64)
        return rollouts * 25 / (time.perf_counter() - began)

    def base() -> float:
        return bare(kernel, reward, 64, rollouts, levels)

    return {
        "32_tasks_x_fk_4": ratio(args.rounds, base, together) | {"target": 0.90},
        "prompt_by_prompt": ratio(max(1, args.rounds // 2), base, apart),
    }


def descents(method: Any, sizes: list[int], num_steps: int = 5) -> dict[int, float]:
    """Seconds per descent around each tree size: the waves in which the tree passes from 80 % to 120 % of it."""
    kernel, reward = Adds(num_steps), as_reward(lambda x: x.sum(1))
    marks: list[tuple[int, int, float]] = []
    began = time.perf_counter()
    limit = ts.Budget(nfe=10**12)
    for snapshot in ts.stream(kernel, reward, method, budget=limit, batch_size=method.wave):
        marks.append((snapshot.record["nodes"], method.wave * (snapshot.wave + 1), time.perf_counter() - began))
        if marks[-1][0] > 1.2 * sizes[-1]:
            break
    nodes, done, seconds = (np.array(column) for column in zip(*marks, strict=True))
    out = {}
    for size in sizes:
        a, b = np.searchsorted(nodes, (0.8 * size, 1.2 * size))
        b = min(b, len(nodes) - 1)
        out[size] = float((seconds[b] - seconds[a]) / (done[b] - done[a]))
    return out


def part_c(args: Args) -> dict[str, Any]:
    """Descents per second and how the time of one grows with the tree."""
    sizes = [10_000, 100_000] + ([args.nodes] if args.nodes > 100_000 else [])
    cases = {
        "boltzmann": (ts.DiffusionTreeSampling(wave=256), 20_000, 2.0),
        "uct": (ts.DiffusionTreeSearch(wave=256), 10_000, 4.0),
    }
    out = {}
    for name, (method, target, growth) in cases.items():
        descents(method, [10_000])  # compiles
        runs_ = [descents(method, sizes) for _ in range(3)]
        seconds = {size: statistics.median(r[size] for r in runs_) for size in sizes}
        out[name] = {
            "descents_per_s_at_1e5": 1 / seconds[100_000],
            "target": target,
            "growth": statistics.median(r[sizes[-1]] / r[10_000] for r in runs_),
            "growth_target": growth,
            "growth_between": [10_000, sizes[-1]],
            "microseconds": {str(size): 1e6 * s for size, s in seconds.items()},
        }
    budget, reward = ts.Budget(nfe=400_000), as_reward(lambda x: x.sum(1))
    grown = ts.search(Adds(), reward, ts.DiffusionTreeSampling(wave=256), budget=budget, batch_size=256)
    out["bytes_per_node"], out["bytes_per_node_target"] = grown.tree.bytes_per_node, 64
    long_chain = descents(ts.DiffusionTreeSampling(wave=256), [10_000], num_steps=100)
    out["boltzmann_100_steps_descents_per_s_at_1e4"] = 1 / long_chain[10_000]
    return out


def part_d(args: Args) -> dict[str, Any]:
    """The run folder: its share of a search's time, and reading a large tree back."""
    folder = Path(tempfile.mkdtemp())
    spent = {"store": 0.0}
    undo = [_timed(runs.Run, "write", spent), _timed(ShardStates, "put", spent), _timed(runs.Run, "create", spent)]
    shares = []
    try:
        for i, method in enumerate(
            (ts.BestOfN(), ts.FeynmanKac(), ts.DiffusionTreeSampling(), ts.DiffusionTreeSearch())
        ):
            spent["store"], began = 0.0, time.perf_counter()
            ts.search(mnist_kernel(25), even(), method, budget=ts.Budget(nfe=5_000), store=folder / f"share{i}")
            shares.append(spent["store"] / (time.perf_counter() - began))
    finally:
        for restore in undo:
            restore()
    reward = as_reward(lambda x: x.sum(1), name="sum")
    wave = ts.DiffusionTreeSampling(wave=256)
    for snapshot in ts.stream(Adds(), reward, wave, budget=ts.Budget(nfe=10**12), batch_size=256, store=folder / "big"):
        if snapshot.record["nodes"] >= args.nodes:
            break
    times = []
    for _ in range(3):
        began = time.perf_counter()
        session = loop.open_session(folder / "big", Adds(), reward, look=True)
        times.append(time.perf_counter() - began)
        session.close()
    shutil.rmtree(folder)
    return {
        "store_share_of_search": {"median": statistics.median(shares), "largest": max(shares), "target": 0.05},
        "resume_nodes": args.nodes,
        "resume_seconds": {"median": statistics.median(times), "target": 5.0},
    }


def _timed(owner: type, name: str, spent: dict[str, float]) -> Callable[[], None]:
    """Add the time of a method to `spent`; returns what undoes it."""
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, staticmethod) else original

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent["store"] += time.perf_counter() - began

    setattr(owner, name, staticmethod(wrapper) if isinstance(original, staticmethod) else wrapper)
    return lambda: setattr(owner, name, original)


def show(found: dict[str, Any], indent: str = "") -> None:
    """Print nested figures."""
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:<28}{value:.4g}" if isinstance(value, float) else f"{indent}{key:<28}{value}")


def main() -> None:
    """Run the parts and write the figures."""
    args = tyro.cli(Args)
    parts = {"a": part_a, "b": part_b, "c": part_c, "d": part_d}
    found = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    found |= {"machine": MACHINE, "threads": torch.get_num_threads(), "rounds": args.rounds}
    for name in args.parts:
        found[name] = parts[name](args)
        print(f"part {name}")
        show(found[name], "  ")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
