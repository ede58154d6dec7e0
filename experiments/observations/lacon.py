"""What an aligner's value and its guide are worth at equal work: python -m experiments.observations.lacon run

A condition y = c(x*) + tolerance · z of a sample x* of the MNIST model; r = log N(y; c(x_0), tolerance² I), T = 25.
Work is NFE + 2 · backward passes, the same for every arm; K is what it pays for.

    unguided     the model's samples, without weights
    endpoints    FK, states scored by the reward of their endpoints
    steered      FK on `Steered`: pulled and scored by c(x̂_0) and its measured error, one number a level; its pilot of
                 64 rollouts is not counted
    value        FK, states scored by the aligner's value: no gradient
    one number   the same with the mean of s_t² for all entries, which takes their errors for independent
    published    the guide on the chain without noise, s = 2 in the first half of the steps: no weights
    guide        FK on the guide as a proposal, states scored by the value
    tds          FK on steps along the value's gradient, λ = 1, states scored by the value

Errors are of the draws that an arm returns, by their weights: the mean square of c(x_0) - c(x*), and the share of the
union of both maps' strong entries that they have in common (IoU).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import over_seeds
from experiments.shared.sweep import FAILURES, Sweep, check_seeds, command_line, reporting
from treesearch.backends.base import describe
from treesearch.backends.guidance import TDS, Aligned, LaCon, Likelihood, Steered, Valued
from treesearch.backends.models.aligner import Aligner, load_aligner
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward
from treesearch.rewards.observation import Measurement, measurement
from treesearch.rewards.outlines import outline

KEY = ("arm", "tolerance", "work", "seed")
T = 25
LEVELS = (*range(T - 1, 1, -1), 0)  # the last step has no noise
FEWEST = 3  # seeds of a line
STRONG = 0.2  # of an entry of the map, for the IoU
TUNING_SEEDS = (100, 101)
OBSERVED = 1_000_000  # its seeds begin here
Arm = Callable[[Any, Reward, Aligner], Any]


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    arm: str
    tolerance: float
    work: int
    seed: int


@cache
def model(eta: float) -> Any:
    """The kernel, made once."""
    return mnist_kernel(num_steps=T, eta=eta)


def valued(kernel: Any, reward: Reward, aligner: Aligner) -> Any:
    return Valued(Aligned(kernel, aligner), reward, Likelihood(aligner, reward))


def published(kernel: Any, reward: Reward, aligner: Aligner) -> Any:
    return LaCon(Aligned(model(0.0), aligner), reward, scale=2.0, window=(T // 2 + 1, T))


def guide(kernel: Any, reward: Reward, aligner: Aligner) -> Any:
    return LaCon(Aligned(kernel, aligner), reward, scale=2.0, max_shift=SHIFT)


def twisted(kernel: Any, reward: Reward, aligner: Aligner) -> Any:
    return TDS(Aligned(kernel, aligner), reward, value=Likelihood(aligner, reward))


def rounded(kernel: Any, reward: Reward, aligner: Aligner) -> Any:
    plain = copy.deepcopy(aligner)
    plain.variances.copy_(plain.variances.mean(1, keepdim=True).expand_as(plain.variances))
    return valued(kernel, reward, plain)


SHIFT = 0.5
ARMS: dict[str, tuple[Arm, bool]] = {  # how the kernel is made, and whether its samples carry weights
    "unguided": (lambda kernel, reward, aligner: kernel, False),
    "endpoints": (lambda kernel, reward, aligner: kernel, True),
    "steered": (lambda kernel, reward, aligner: Steered(kernel, reward), True),
    "value": (valued, True),
    "one number": (rounded, True),
    "published": (published, False),
    "guide": (guide, True),
    "tds": (twisted, True),
}


@cache
def seen(seed: int, tolerance: float, weights: str) -> tuple[Reward, Tensor]:
    """The reward, and c(x*) of the sample behind it."""
    condition = outline(load_aligner(weights).plan.condition)
    one = ts.search(model(1.0), lambda x: torch.zeros(len(x)), ts.BestOfN(n=1), seed=OBSERVED + seed, progress=False)
    true = condition(one.samples)[0]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(seed))
    return measurement(condition, true + tolerance * noise, tolerance=tolerance, of="sample"), true


def particles(kernel: Any, work: int) -> int:
    """How many rollouts the work pays for."""
    backward = sum(describe(kernel, identify=False).backward_per_nfe[1:])
    return work // (T + 2 * backward)


def run_cell(job: Job, weights: str) -> Row:
    """A cell's row."""
    make, weighted = ARMS[job.arm]
    reward, true = seen(job.seed, job.tolerance, weights)
    kernel = make(model(1.0), reward, load_aligner(weights))
    k = particles(kernel, job.work)
    method = ts.FeynmanKac(num_particles=k, schedule=LEVELS) if weighted else ts.BestOfN(n=k)
    try:
        found = ts.search(kernel, reward, method, seed=job.seed, progress=False)
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    return job.row | {"k": k} | graded(found, weighted, reward, true) | where_it_ran()


def graded(found: Any, weighted: bool, reward: Reward, true: Tensor) -> Row:
    """What the draws of a search are worth."""
    assert isinstance(reward.fn, Measurement)
    task, condition = found.tasks[0], reward.fn.operator
    rows = task.draw_rows(1000, 0) if weighted else np.arange(len(task.leaves))
    maps = condition(task.fetch(task.leaves[rows]).float())
    strong, truly = maps > STRONG, true > STRONG
    common, either = ((strong & truly).sum((1, 2, 3)), (strong | truly).sum((1, 2, 3)))
    row: Row = {
        "error_of_draws": float((maps - true).square().mean()),
        "iou": float((common / either.clamp_min(1)).double().mean()),
        "nfe": found.cost.nfe,
        "backward": found.cost.backward_nfe,
        "seconds": found.cost.seconds,
        "best": float(found.rewards.max()),
    }
    if not weighted:
        return row
    roots = len(np.unique(task.tree.roots(task.leaves[np.unique(rows)])))
    levels = task.diagnostics["ess_levels"][0]
    return row | {"log_z": task.log_z, "ess": task.diagnostics["ess"], "roots": roots, "ess_levels": levels}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    arms: tuple[str, ...] = tuple(ARMS)
    """which arms"""
    seeds: tuple[int, ...] = tuple(range(5))
    """of conditions and searches"""
    tolerances: tuple[float, ...] = (0.4,)
    """of the condition"""
    work: int = 3200
    """NFE + 2 · backward passes of a cell"""
    weights: str = "edges.safetensors"
    """the aligner: a shipped file or a path"""
    out: Path = Path("runs/results/observations/lacon.jsonl")
    """one row a cell"""

    def run(self) -> int:
        check_seeds(self.seeds, TUNING_SEEDS)
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), lambda job: run_cell(job, self.weights), said)
        every.fill(Job(a, tol, self.work, seed) for tol in self.tolerances for seed in self.seeds for a in self.arms)
        return 0


def said(row: Row) -> str:
    """What a cell says."""
    return f"error {row['error_of_draws']:.4f}, IoU {row['iou']:.3f}, ESS {row.get('ess', row['k']):.1f}"


COLUMNS = (
    "arm",
    "K",
    "error of draws × 10³",
    "of unguided",
    "IoU",
    "ESS",
    "smallest ESS",
    "roots",
    "log Ẑ over endpoints'",
    "seeds",
)


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    parts = []
    for tolerance in sorted({row["tolerance"] for row in done}, reverse=True):
        here = [row for row in done if row["tolerance"] == tolerance]
        parts.append(f"## Tolerance {tolerance:g}\n\n{markdown_table(table(here), COLUMNS)}\n")
    work, failed = done[0]["work"], len(rows) - len(done)
    return (
        f"# LaCon: an aligner's value and its guide\n\nThe shipped aligner of edges on `mnist(num_steps={T})`, "
        f"{work:,} of NFE + 2 · backward passes a cell. Conditions are those of samples of the model; the arms are in "
        "the head of `experiments/observations/lacon.py`. Means over seeds with Student's 95 % intervals; the share of "
        "the unguided error is paired by seed, and so is log Ẑ, which is too low where populations die. Arms of fewer "
        f"than {FEWEST} seeds are not shown. {failed} cells failed.\n\n" + "\n".join(parts)
    )


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line an arm."""
    lines, base = [], {row["seed"]: row["error_of_draws"] for row in rows if row["arm"] == "unguided"}
    raw = {row["seed"]: row["log_z"] for row in rows if row["arm"] == "endpoints"}
    for arm in ARMS:
        of = [row for row in rows if row["arm"] == arm]
        if len(of) < FEWEST:
            continue
        shares = [row["error_of_draws"] / base[row["seed"]] for row in of if row["seed"] in base]
        cells = [[1e3 * row["error_of_draws"] for row in of], shares, [row["iou"] for row in of]]
        weighted = "ess" in of[0]
        steered = [[row["ess"], min(row["ess_levels"]), row["roots"]] for row in of] if weighted else []
        over = [row["log_z"] - raw[row["seed"]] for row in of if weighted and row["seed"] in raw]
        texts = [interval(values) for values in (*cells, *zip(*steered, strict=True))] + ["-"] * (0 if steered else 3)
        texts.append(interval(over) if over else "-")
        lines.append([arm, str(of[0]["k"]), *texts, str(len(of))])
    return lines


def interval(values: Sequence[float]) -> str:
    """Mean and Student's 95 % bounds."""
    return "{:.3g} ({:.3g} to {:.3g})".format(*over_seeds(values))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("lacon", {"run": Run, "report": reporting("observations/lacon", KEY, report)}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
