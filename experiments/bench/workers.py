"""What Ray workers lose: `make bench-ray`.

    a      a kernel that sleeps as a GPU would, 20 ms a step: efficiency of best-of-N, FK and DTS (async) on 1-8 workers
    model  16, 32 and 128 workers: a discrete-event model fed with the driver's cost as measured in part a
    b      the MNIST model: two single-thread workers over one process with two threads
    gpu    two actors that share a GPU over one that has it; rewards beside the model over rewards after it

Efficiency is ideal time / measured time of a whole `ts.search`, its first and last bundles included, on a pool that
has run the kernel before. The ideal is NFE / (W · B / t(B)), t(B) = a + b·B: W devices that never wait. Beside it
stands the ratio to the efficiency of one process without workers, timed in the same round: that one pays for the same
host work between passes, so the ratio is what is lost by the distribution alone.

Sizes: T = 50 and five branching levels, so segments of 10 to 50 steps; B = 8 rows a pass, eight full batches of whole
rollouts (8 s) a worker. FK: populations of 8·W·B, so that a level takes a worker eight batches, 1.6 s, and ends in a
barrier. DTS: 4·W·B iterations in flight, that is two bundles of two batches a worker: rows of a bundle end one after
another, and the next bundle fills the room they leave.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray gives its workers a niceness of 15, which a GPU would not notice and a sleeping thread on a shared core does.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import tyro
from torch import Tensor

import treesearch as ts
from experiments.bench.ray_model import predicted
from experiments.bench.ray_setup import (
    BATCH,
    IN_FLIGHT,
    METHODS,
    SIZES,
    STEPS,
    TARGETS,
    Sleeper,
    first_entry,
    method_of,
)
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.distributed.lending import Lender
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.images.classifier import even

MACHINE = "2 shared CPU cores"


@dataclass(frozen=True)
class Args:
    """Arguments."""

    quick: bool = False
    """one round, 4 and 8 workers, half the work: minutes"""
    only: str = "a,model,b,gpu"
    """parts to run, separated by commas; the model takes its costs from part a, of this run or of the results file"""
    rounds: int = 3
    """timed rounds; every case is run once in each"""
    out: Path = Path("runs/results/bench_ray.json")
    """figures as JSON; a table goes beside it as .md"""


# part a


class Meter:
    """The driver's side of a search: its CPU seconds, and what it handled for them."""

    def __init__(self) -> None:
        self.bundles = self.rows = 0
        lender: Any = Lender
        lend = lender._lend

        def counted(lender: Any, actor: Any, parts: Any, failures: int) -> None:
            self.bundles += 1
            self.rows += sum(len(rows) for _, rows in parts)
            lend(lender, actor, parts, failures)

        lender._lend = counted

    @contextmanager
    def reading(self) -> Iterator[dict[str, float]]:
        """Fills the dictionary with what happens inside."""
        found: dict[str, float] = {}
        before = (time.thread_time(), time.process_time(), self.bundles, self.rows)
        yield found
        after = (time.thread_time(), time.process_time(), self.bundles, self.rows)
        names = ("driver_thread_s", "driver_process_s", "bundles", "rows")
        found |= {name: b - a for name, a, b in zip(names, before, after, strict=True)}


def part_a(args: Args) -> dict[str, Any]:
    """Efficiency of the sleeping kernel."""
    counts = (4, 8) if args.quick else (1, 2, 4, 8)
    batches, rounds = (4, 1) if args.quick else (8, args.rounds)
    meter, reward = Meter(), as_reward(first_entry, name="first entry")
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        # Workers that ask for no CPU of Ray's fit beside one another, so that rounds can interleave pools of all sizes.
        pools = {w: stack.enter_context(ts.RayWorkers(w, cpus_per_worker=0)) for w in sorted(counts, reverse=True)}
        kernels: list[Any] = [Sleeper(size) for size in SIZES]
        for kernel in kernels:
            for w, pool in pools.items():
                ts.search(kernel, reward, ts.BestOfN(n=4 * w * BATCH), batch_size=BATCH, workers=pool)
            for _ in range(rounds):
                for name in METHODS:
                    alone = one_search(kernel, reward, name, 1, 2, None, meter)
                    for w, pool in pools.items():
                        got = one_search(kernel, reward, name, w, batches, pool, meter)
                        got["over_one_process"] = got["efficiency"] / alone["efficiency"]
                        got["one_process"] = alone["efficiency"]
                        found.setdefault(f"{kernel.kilobytes}KB {name} {w}", []).append(got)
                        print(f"  {kernel.kilobytes}KB {name:<10} {w} {got['efficiency']:.3f}", flush=True)
        rtt = round_trip()
    cases = {case: summary(runs) for case, runs in found.items()}
    for case, figures in cases.items():
        figures["target"] = TARGETS.get(int(case.split()[-1]))
    every = [run for runs in found.values() for run in runs]
    return {
        "batches_a_worker": batches,
        "rounds": rounds,
        "cases": cases,
        "driver": driver_cost(every),
        "round_trip_s": rtt,
    }


def one_search(
    kernel: Any, reward: Reward, name: str, workers: int, batches: int, pool: Any, meter: Meter
) -> dict[str, float]:
    """Run a search; where its time went."""
    method, budget = method_of(name, workers, batches)
    with meter.reading() as out:
        began = time.perf_counter()
        result = ts.search(kernel, reward, method, budget=budget, batch_size=BATCH, workers=pool)
        wall = time.perf_counter() - began
    nfe, step = result.cost.nfe, kernel.seconds(BATCH)
    out |= {"efficiency": nfe / BATCH * step / workers / wall, "wall_s": wall, "nfe": nfe}
    out |= {"repeated_nfe": result.cost.repeated_nfe}
    if pool is not None:
        seen = result.diagnostics["workers"]
        # Of W·wall: time in passes, of them the room that had rows, of these what a pass should have taken.
        evaluated = sum(each["nfe"] for each in seen["by_worker"].values())
        passes = evaluated / max(1e-9, seen["fill"]) / BATCH
        out |= {"busy": seen["busy"], "fill": seen["fill"], "pass_ms": 1e3 * seen["busy"] * wall * workers / passes}
        out |= {"mb": seen["mb_in"] + seen["mb_out"], "stolen_rows": seen["stolen_rows"]}
    if name == "dts_async":
        out |= {f"steps_{t}": share for t, share in starts(result.tree).items()}
    return out


def starts(tree: Any) -> dict[int, float]:
    """Share of rollouts by their evaluations: one from level t makes a node of every level below, at t evaluations."""
    levels, counts = np.unique(np.asarray(tree.t)[1:], return_counts=True)
    levels, made = levels[::-1], counts[::-1] / counts[0]
    out = {STEPS: float(made[0])}  # those from the root
    for level, share in zip(levels, np.diff(made), strict=False):
        out[int(level)] = out.get(int(level), 0.0) + float(share)
    return out


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians; the range of the efficiency."""
    out: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return out | {"range": [min(r["efficiency"] for r in runs), max(r["efficiency"] for r in runs)]}


def driver_cost(runs: list[dict[str, float]]) -> dict[str, float]:
    """CPU seconds of the driver's thread: least squares on bundles, rows and MB over all searches, none negative."""
    names = ["bundles", "rows", "mb"]
    x = np.array([[run[name] for name in names] for run in runs])
    y = np.array([run["driver_thread_s"] for run in runs])
    keep = list(range(len(names)))
    while True:
        fit = np.linalg.lstsq(x[:, keep], y, rcond=None)[0]
        if (fit >= 0).all():
            break
        keep.pop(int(fit.argmin()))
    cost = dict.fromkeys(names, 0.0) | {names[i]: float(c) for i, c in zip(keep, fit, strict=True)}
    left = y - x[:, keep] @ fit
    return {f"s_per_{name.rstrip('s')}": cost[name] for name in names} | {
        "explained": float(1 - left.var() / y.var()),
        "process_over_thread": sum(r["driver_process_s"] for r in runs) / sum(y),
    }


def round_trip() -> float:
    """Median seconds of an empty call of an actor."""
    import ray

    class Echo:
        def call(self) -> None:
            """Nothing."""

    echo: Any = ray.remote(num_cpus=0)(Echo).remote()
    times = []
    for _ in range(100):
        began = time.perf_counter()
        ray.get(echo.call.remote())
        times.append(time.perf_counter() - began)
        time.sleep(0.01)
    ray.kill(echo)
    return statistics.median(times)


# parts b, gpu


def part_b(args: Args) -> dict[str, Any]:
    """Two workers of one thread over one process of two threads."""
    kernel, reward = mnist_kernel(25), even()
    nfe, batch = (96 if args.quick else 256) * kernel.num_steps, 32
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"  the machine is not quiet (load {load:.1f}): this part is not reliable now")
    torch.set_num_threads(2)
    found = {}
    with ts.RayWorkers(2) as pool:
        for name, method in {
            "best_of_n": ts.BestOfN(),
            "dts_async": ts.DiffusionTreeSampling(mode="async", wave=IN_FLIGHT * 2 * batch),
        }.items():

            def speed(workers: Any, method: Any = method) -> float:
                began = time.perf_counter()
                budget = ts.Budget(nfe=nfe)
                result = ts.search(kernel, reward, method, budget=budget, batch_size=batch, workers=workers)
                return result.cost.nfe / (time.perf_counter() - began)

            found[name] = ratio(1 if args.quick else args.rounds, lambda: speed(None), lambda: speed(pool))
            found[name]["target"] = 0.95
    return {"load_before": load, "nfe": nfe, "batch": batch} | found


def part_gpu(args: Args) -> dict[str, Any]:
    """One GPU: shared by two actors over held by one; rewards beside the model over rewards after it."""
    if not torch.cuda.is_available():
        return {"note": "not run: no GPU"}
    kernel = ts.Recipe("mnist")
    budget = ts.Budget(nfe=(128 if args.quick else 1024) * 25)

    def speed(reward: Any, pool: ts.RayWorkers) -> float:
        began = time.perf_counter()
        result = ts.search(kernel, reward, ts.BestOfN(), budget=budget, batch_size=64, workers=pool)
        return result.cost.nfe / (time.perf_counter() - began)

    rounds, found = 1 if args.quick else args.rounds, {}
    whole, half = {"num_workers": 1, "gpus_per_worker": 1}, {"num_workers": 2, "gpus_per_worker": 0.5}
    cases: dict[str, tuple[ts.Recipe, dict[str, Any], dict[str, Any]]] = {
        "two_actors_share": (ts.Recipe("even"), whole, half),
        "reward_overlap": (ts.Recipe(slow_reward), whole, whole | {"reward_workers": 2}),
    }
    for name, (reward, base, other) in cases.items():
        # One after another: both would not fit on one GPU.
        speeds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for settings, into in zip((base, other), speeds, strict=True):
                with ts.RayWorkers(**settings) as pool:
                    speed(reward, pool)
                    into.append(speed(reward, pool))
        found[name] = ratio_of(list(zip(*speeds, strict=True)))
    return found


def slow_reward() -> Reward:
    """A reward that takes 2 ms a sample, somewhere else than on the GPU."""

    def score(x: Tensor) -> Tensor:
        time.sleep(0.002 * len(x))
        return x.flatten(1).mean(1)

    return as_reward(score, name="slow")


def ratio(rounds: int, base: Callable[[], float], other: Callable[[], float]) -> dict[str, Any]:
    """Medians of interleaved rounds, after one that warms up."""
    return ratio_of([(base(), other()) for _ in range(rounds + 1)][1:])


def ratio_of(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of pairs of NFE/s, and the range of their ratio."""
    ratios = [b / a for a, b in pairs]
    return {
        "base_nfe_per_s": statistics.median(a for a, _ in pairs),
        "workers_nfe_per_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


# output


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = [f"# Ray workers: what is lost\n\nMachine: {found['machine']}. Load {found['load']}. Medians, with ranges.\n"]
    if "a" in found:
        out.append(f"## A kernel that sleeps: 20 ms a step, B = {BATCH}, T = {STEPS}\n")
        out.append("Driver CPU: " + ", ".join(f"{k} {v:.3g}" for k, v in found["a"]["driver"].items()) + ".\n")
        columns = ["size, method, workers", "efficiency", "range", "target", "over one process", "busy", "fill"]
        out += [row([*columns, "ms a pass", "repeated NFE"]), row(["---"] * 9)]
        for case, f in found["a"]["cases"].items():
            spread, target = " – ".join(f"{v:.3f}" for v in f["range"]), f["target"] or ""
            shares = [f"{f[name]:.3f}" for name in ("over_one_process", "busy", "fill")]
            repeated = f"{f['repeated_nfe'] / f['nfe']:.4f}"
            out.append(row([case, f"{f['efficiency']:.3f}", spread, target, *shares, f"{f['pass_ms']:.2f}", repeated]))
    if "model" in found:
        out += ["\n## Model (not a measurement)\n", row(["case", "model", "measured", "ratio"]), row(["---"] * 4)]
        for case, f in found["model"]["validation"].items():
            out.append(row([case, *(f"{f[name]:.3f}" for name in ("model", "measured", "model_over_measured"))]))
        out += ["", row(["case", "efficiency", "driver busy", "driver saturates at"]), row(["---"] * 4)]
        for case, f in found["model"]["prediction"].items():
            shares = [f"{f[name]:.3f}" for name in ("efficiency", "driver")]
            out.append(row([case, *shares, f"{f['saturates_at']:.0f} workers"]))
    for part, title in (("b", "Two workers over one process with two threads, MNIST"), ("gpu", "GPU")):
        if part in found:
            out.append(f"\n## {title}\n")
            if "note" in found[part]:
                out.append(found[part]["note"])
            cases = {k: v for k, v in found[part].items() if isinstance(v, dict)}
            if cases:
                out += [row(["case", "ratio", "range", "NFE/s", "target"]), row(["---"] * 5)]
            for case, f in cases.items():
                spread = " – ".join(f"{v:.3f}" for v in f["range"])
                speeds = f"{f['base_nfe_per_s']:.0f} → {f['workers_nfe_per_s']:.0f}"
                out.append(row([case, f"{f['ratio']:.3f}", spread, speeds, f.get("target", "")]))
    return "\n".join(out) + "\n"


def row(cells: list[Any]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Run the parts and write the figures."""
    args = tyro.cli(Args)
    found = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    found |= {"machine": MACHINE, "load": [round(v, 1) for v in os.getloadavg()]}
    print(f"load {found['load']}")
    for name in args.only.split(","):
        print(f"part {name}", flush=True)
        if name == "model":
            if "a" not in found:
                raise SystemExit(f"part model needs part a: {args.out} holds none")
            found[name] = predicted(found["a"])
        else:
            found[name] = {"a": part_a, "b": part_b, "gpu": part_gpu}[name](args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        args.out.with_suffix(".md").write_text(tables(found), "utf-8")
    print(tables(found))


if __name__ == "__main__":
    main()
