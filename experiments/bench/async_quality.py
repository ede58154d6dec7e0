"""Does searching without waves cost quality? Asynchronous mode with 16 in flight beside the serial tree, at equal NFE.

    python -m experiments.bench.async_quality [--quick]

Every task has its own noise and its own tree; arms share the noise, so differences are paired. For each bed, metric m
and budget:

    difference   D = mean_i m_i(async, 16 in flight) - m_i(serial, wave = 1), with its standard error
    scale        S = |mean_i m_i(serial) - m_i(best-of-N)|: what the tree is worth in this metric at this budget
    asked        |D| <= 2 standard errors, and |D| <= 5 % of S

The second can only be told where the standard error is small against S: "open" means that D's interval of ± 2 standard
errors reaches on both sides of 5 %. "better" and "worse" are beyond 2 standard errors. Waves of 16 stand beside it for
reference, and fewer in flight where 16 cost something. The verdict asked for is on the first 30 tasks; the exact beds
run ten times as many, which resolves smaller differences. Finished cells are kept in --work, so that a run that was
stopped goes on where it was.

Metrics: best reward (DTS*); log Z minus the truth, and distance of the read-out to the closed-form π (DTS: W1 on the
Gaussian, total variation over modes or states elsewhere); on MNIST, log Z and the mean reward of a draw.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import treesearch as ts
from treesearch.backends.base import Kernel
from treesearch.backends.exact.enumerable import DiscreteChain, MaskedChain
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian, Tilt
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.report.tables import markdown_table
from treesearch.results.result import TaskResult
from treesearch.rewards.analytic import linear, table
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.images.classifier import digit
from treesearch.rewards.images.image import brightness

MACHINE = "two shared CPU cores, one used"
IN_FLIGHT = 16
ARMS = {
    "serial": {"wave": 1},
    "async": {"wave": IN_FLIGHT, "mode": "async"},
    "wave": {"wave": IN_FLIGHT},
}
FEWER = (2, 4, 8)
HIGHER = {"best reward": 1, "mean reward": 1, "log Z": 1}  # better is higher: log Z is biased low; distances are lower
Metric = Callable[[TaskResult], float]


@dataclass(frozen=True)
class Args:
    """Arguments."""

    quick: bool = False
    """four tasks and small budgets: whether it runs, not what comes out"""
    parts: tuple[str, ...] = ("exact", "mnist")
    """which beds"""
    seeds: int = 30
    """tasks that decide"""
    more: int = 300
    """tasks on the exact beds, the deciding ones included"""
    nfe: int = 1_600
    """NFE of a task on MNIST"""
    seed: int = 0
    """of all noise"""
    work: Path = Path("runs/async_quality")
    """finished cells, per task"""
    out: Path = Path("runs/results/async_quality.json")
    """figures as JSON"""


@dataclass(frozen=True)
class Bed:
    """A kernel, a reward, what the trees are asked and how they are graded."""

    name: str
    kernel: Kernel
    reward: Reward
    rollouts: tuple[int, ...]  # NFE of a task over T
    sampling: dict[str, Metric]  # of DTS
    common: dict[str, Any] = field(default_factory=dict)  # fields of both methods
    c_uct: tuple[float, ...] = (1.0,)  # the first one in all arms, others in DTS* serial and async
    fewer: bool = False  # whether DTS* also runs with fewer in flight


@dataclass(frozen=True)
class Comparison:
    """A line of the table: cells to set beside one another."""

    what: str
    metric: str
    serial: str
    lively: str
    wave: str | None = None


def best(task: TaskResult) -> float:
    """Highest reward."""
    return float(task.rewards.max())


def weights(task: TaskResult) -> Tensor:
    """The read-out's probabilities of its samples."""
    return task.log_weights.softmax(0)


def mean_reward(task: TaskResult) -> float:
    """Expected reward of a draw."""
    return float((weights(task) * task.rewards).sum())


def log_z(exact: float = 0.0) -> Metric:
    """Estimate of log Z minus the truth."""
    return lambda task: float("nan" if task.log_z is None else task.log_z) - exact


def variation(law: Tensor, index: Callable[[Tensor], Tensor]) -> Metric:
    """Total variation between the read-out and a law over finitely many classes."""

    def metric(task: TaskResult) -> float:
        found = torch.zeros(len(law), dtype=torch.float64).index_add(0, index(task.samples), weights(task))
        return float((found - law).abs().sum() / 2)

    return metric


def wasserstein(mean: float, std: float) -> Metric:
    """W1 between the read-out and N(mean, std²): the area between the two distribution functions."""
    grid = torch.linspace(mean - 7 * std, mean + 7 * std, 4001, dtype=torch.float64)
    exact = torch.distributions.Normal(mean, std).cdf(grid)

    def metric(task: TaskResult) -> float:
        x, order = task.samples[:, 0].sort()
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), weights(task)[order].cumsum(0)])
        return float(torch.trapezoid((cdf[torch.searchsorted(x, grid, right=True)] - exact).abs(), grid))

    return metric


def gaussian() -> Bed:
    """r = 1.2 x on the Gaussian chain, T = 5."""
    kernel = LinearGaussian()
    target = kernel.tilted(Tilt(c=1.2))
    metrics = {"log Z": log_z(target.log_z), "W1": wasserstein(float(target.mean), float(target.std))}
    return Bed("Gaussian, T = 5", kernel, linear(1.2), (100, 400), metrics, fewer=True)


def ring() -> Bed:
    """A linear reward on eight modes, T = 20; the read-out is graded by its mass on each."""
    kernel, c = GaussianMixture.ring(20), (0.5, 0.3)
    target = kernel.tilted(Tilt(c=c))
    means = torch.tensor(kernel.means, dtype=torch.float64)
    modes = variation(target.weight, lambda x: torch.cdist(x, means).argmin(1))
    return Bed("ring of 8, T = 20", kernel, linear(c), (100, 400), {"log Z": log_z(target.log_z), "TV of modes": modes})


def discrete() -> Bed:
    """A normal reward a state on a random chain of 64 states, T = 4."""
    kernel = DiscreteChain.random(num_steps=4, states=64)
    values = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = kernel.tilted(values)
    metrics = {"log Z": log_z(target.log_z), "TV": variation(target.posterior, lambda x: x[:, 0])}
    return Bed("discrete, 64 states, T = 4", kernel, table(values.tolist()), (40, 400), metrics)


def masked() -> Bed:
    """A normal reward a token and position, five tokens of three, T = 5; x_T is a single state, so none branches it."""
    kernel = MaskedChain.random(length=5, vocabulary=3, num_steps=5)
    score = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fn = lambda x: score[torch.arange(5), x].sum(1)  # noqa: E731
    target = kernel.tilted(fn(kernel.states))
    metrics = {"log Z": log_z(target.log_z), "TV": variation(target.posterior, kernel.index)}
    reward = as_reward(fn, name="token scores")
    return Bed("masked, 3^5, T = 5", kernel, reward, (40, 400), metrics, {"branch_at": (4, 3, 2, 1)}, fewer=True)


def mnist(nfe: int) -> Bed:
    """A bold eight, T = 10."""
    reward, steps = digit(8) + 10 * brightness(), 10
    metrics = {"log Z": log_z(), "mean reward": mean_reward}
    return Bed("MNIST, T = 10", mnist_kernel(steps), reward, (nfe // steps,), metrics, c_uct=(0.3, 0.05))


def methods(bed: Bed) -> dict[str, tuple[Any, dict[str, Metric]]]:
    """Both trees in every arm, and best-of-N, each with its metrics; (C, α) = (1, .5)."""
    deep = {"widening_c": 1.0, "widening_alpha": 0.5} | bed.common
    found: dict[str, tuple[Any, dict[str, Metric]]] = {
        "best-of-N": (ts.BestOfN(), {"best reward": best} | bed.sampling)
    }
    for arm, how in ARMS.items():
        found[f"DTS* {arm}"] = ts.DiffusionTreeSearch(c_uct=bed.c_uct[0], **deep, **how), {"best reward": best}
        found[f"DTS {arm}"] = ts.DiffusionTreeSampling(**deep, **how), bed.sampling
    for k in FEWER if bed.fewer else ():
        lively = ts.DiffusionTreeSearch(c_uct=bed.c_uct[0], **deep, **ARMS["async"] | {"wave": k})
        found[f"DTS* {k} in flight"] = lively, {"best reward": best}
    for c_uct in bed.c_uct[1:]:
        for arm in ("serial", "async"):
            method = ts.DiffusionTreeSearch(c_uct=c_uct, **deep, **ARMS[arm])
            found[f"DTS* c_uct {c_uct} {arm}"] = method, {"best reward": best}
    return found


def comparisons(bed: Bed) -> list[Comparison]:
    """The lines of one bed."""
    star, rest = "best reward", list(bed.sampling)
    found = [Comparison("DTS*", star, "DTS* serial", "DTS* async", "DTS* wave")]
    found += [
        Comparison(f"DTS*, {k} in flight", star, "DTS* serial", f"DTS* {k} in flight") for k in FEWER if bed.fewer
    ]
    for c_uct in bed.c_uct[1:]:
        name = f"DTS* c_uct {c_uct}"
        found.append(Comparison(f"DTS*, c_uct = {c_uct}", star, f"{name} serial", f"{name} async"))
    return found + [Comparison("DTS", metric, "DTS serial", "DTS async", "DTS wave") for metric in rest]


def cell(bed: Bed, name: str, rollouts: int, tasks: int, args: Args) -> dict[str, Any]:
    """One method's metrics by task, its staleness and its cost; read back if it was run before."""
    method, metrics = methods(bed)[name]
    nfe = rollouts * bed.kernel.num_steps
    asked = {"bed": bed.name, "nfe": nfe, "tasks": tasks, "seed": args.seed, "method": repr(method)}
    file = args.work / f"{bed.name} {name} {rollouts} {tasks}.json".replace(" ", "_").replace("*", "star")
    if file.exists() and (known := json.loads(file.read_text("utf-8")))["asked"] == asked:
        return known
    began = time.perf_counter()
    found = ts.search(
        bed.kernel,
        bed.reward,
        method,
        prompts=list(range(tasks)),
        budget=ts.Budget(nfe=nfe * tasks),
        seed=args.seed,
        batch_size=IN_FLIGHT * tasks,
    )
    kept = {
        "asked": asked,
        "metrics": {metric: [of(task) for task in found.tasks] for metric, of in metrics.items()},
        "nfe": found.cost.nfe,
        "iterations": float(np.mean([task.diagnostics.get("iterations", rollouts) for task in found.tasks])),
        "staleness": found.tasks[0].diagnostics.get("staleness", {}),
        "seconds": time.perf_counter() - began,
    }
    args.work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept), "utf-8")
    print(f"{bed.name}, {rollouts} rollouts, {name}: {kept['seconds']:.1f} s", flush=True)
    return kept


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean and standard error of a - b."""
    gap = np.array(a) - np.array(b)
    return float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))


def figures(cells: dict[str, dict[str, Any]], of: Comparison, n: int) -> dict[str, Any]:
    """Figures of one comparison over the first n tasks."""
    names = {"best-of-N": "best-of-N", "serial": of.serial, "async": of.lively} | ({"wave": of.wave} if of.wave else {})
    got = {arm: cells[name]["metrics"][of.metric][:n] for arm, name in names.items()}
    worth, worth_se = paired(got["serial"], got["best-of-N"])
    gap, se = paired(got["async"], got["serial"])
    low, high, limit = max(0.0, abs(gap) - 2 * se), abs(gap) + 2 * se, 0.05 * abs(worth)
    return {
        "tasks": n,
        "mean": {name: float(np.mean(values)) for name, values in got.items()},
        "se": {name: float(np.std(values, ddof=1) / math.sqrt(n)) for name, values in got.items()},
        "serial - best-of-N": [worth, worth_se],
        "async - serial": [gap, se],
        "wave - serial": paired(got["wave"], got["serial"]) if of.wave else None,
        "within 2 se": abs(gap) <= 2 * se,
        "within 5 %": abs(gap) <= limit,
        "5 % resolved": "no" if low > limit else "yes" if high <= limit else "open",
        "of the scale": abs(gap) / abs(worth) if worth else None,
        "async is": "same" if abs(gap) <= 2 * se else "better" if gap * HIGHER.get(of.metric, -1) > 0 else "worse",
    }


def grade(bed: Bed, rollouts: int, args: Args, tasks: int) -> list[dict[str, Any]]:
    """Rows of one bed at one budget."""
    cells = {name: cell(bed, name, rollouts, tasks, args) for name in methods(bed)}
    rows = []
    for of in comparisons(bed):
        names = [name for name in ("best-of-N", of.serial, of.lively, of.wave) if name]
        rows.append(
            {
                "bed": bed.name,
                "what": of.what,
                "metric": of.metric,
                "rollouts": rollouts,
                "method": cells[of.lively]["asked"]["method"],
                "nfe a task": cells[of.lively]["asked"]["nfe"],
                "staleness": cells[of.lively]["staleness"],
                "spent": {name: cells[name]["nfe"] for name in names},
                "seconds": {name: round(cells[name]["seconds"], 1) for name in names},
                "decides": figures(cells, of, args.seeds),
                "more": figures(cells, of, tasks) if tasks > args.seeds else None,
                "by task": {n: [round(v, 5) for v in cells[n]["metrics"][of.metric][: args.seeds]] for n in names},
            }
        )
    return rows


COLUMNS = (
    "bed, rollouts",
    "metric",
    "tasks",
    "best-of-N",
    "serial",
    "async",
    "wave",
    "async - serial",
    "of S",
    "≤ 2 se",
    "async is",
)


def line(found: dict[str, Any], part: str) -> list[str]:
    """A row of the table."""
    r = found[part]
    gap, se = r["async - serial"]
    return [
        f"{found['bed']}, {found['rollouts']}",
        f"{found['what']}: {found['metric']}",
        str(r["tasks"]),
        *(f"{r['mean'][name]:.3f}" if name in r["mean"] else "-" for name in ("best-of-N", "serial", "async", "wave")),
        f"{gap:+.4f} ± {se:.4f}",
        "-"
        if r["of the scale"] is None
        else f"{r['of the scale']:.1%}" + {"yes": "", "no": " > 5 %", "open": " (open)"}[r["5 % resolved"]],
        "yes" if r["within 2 se"] else "NO",
        r["async is"],
    ]


def main() -> None:
    """Run what is missing, print the table, write the figures."""
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    beds: list[Bed] = []
    if args.quick:
        args = replace(args, seeds=4, more=4, nfe=100)
    if "exact" in args.parts:
        beds += [gaussian(), ring(), discrete(), masked()]
    if "mnist" in args.parts:
        beds.append(mnist(args.nfe))
    rows = []
    for bed in beds:
        tasks = args.seeds if "MNIST" in bed.name else max(args.more, args.seeds)
        for rollouts in bed.rollouts[:1] if args.quick else bed.rollouts:
            rows += grade(bed, rollouts, args, tasks)
            known = {
                "machine": MACHINE,
                "seed": args.seed,
                "seeds": args.seeds,
                "in flight": IN_FLIGHT,
                "intervals": "standard errors over tasks; differences are paired by task",
                "rows": rows,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    lines = [line(found, part) for found in rows for part in ("decides", "more") if found[part]]
    print(markdown_table(lines, COLUMNS))


if __name__ == "__main__":
    main()
