"""EluCD's scale chosen by the effective sample size, beside its default: log Z on the MNIST model.

    target    p(x_0) p(8 | x_0): digit(8), λ = 1, ten steps
    guide     EluCD by digit(8, tau2=.5), γ = .3, as published; s = 1 is its default
    chosen    the s of the grid with the largest geometric mean over seeds 100.. of ESS/n of importance sampling
    judged    the variance of log Ẑ over seeds 0.. of populations of 64: no guide, the default, what was chosen

Whatever s, the target is the same: what the scale moves is the spread of weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import Sweep, check_seeds, command_line
from treesearch.backends import mnist
from treesearch.backends.guidance import EluCD
from treesearch.rewards import digit

KEY = ("kind", "scale", "seed")
STEPS, PARTICLES, SAMPLES = 10, 64, 64
DEFAULT = 1.0
SCALES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
EVERY = (*range(STEPS - 1, 1, -1), 0)


@cache
def model() -> Any:
    """The kernel, made once."""
    return mnist(num_steps=STEPS)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run: importance sampling to choose by, or a population to judge."""

    kind: str
    scale: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    scales: tuple[float, ...] = SCALES
    """s"""
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103)
    """seeds of the choice"""
    seeds: tuple[int, ...] = tuple(range(10))
    """seeds of the judgement"""
    out: Path = Path("runs/results/elucd.jsonl")
    """one row a cell"""

    def run(self) -> int:
        check_seeds(self.seeds, self.tuning_seeds)
        every = Sweep(Cells(self.out, KEY), cell, lambda row: f"log Z {row['log_z']:.3f}, ESS {row['ess']:.1f}")
        every.fill(Job("choose", scale, seed) for scale in self.scales for seed in self.tuning_seeds)
        judged = sorted({0.0, DEFAULT, chosen(every.cells.rows)[0]})
        every.fill(Job("judge", scale, seed) for scale in judged for seed in self.seeds)
        return 0


def chosen(rows: Sequence[Row]) -> tuple[float, dict[float, float]]:
    """The scale of the largest geometric mean of ESS/n, and that mean by scale."""
    found: dict[float, float] = {}
    for scale in SCALES:
        if ess := [row["ess"] for row in rows if row["kind"] == "choose" and row["scale"] == scale]:
            found[scale] = float(np.exp(np.mean(np.log(np.array(ess) / SAMPLES))))
    return max(found, key=lambda scale: found[scale]), found


def cell(job: Job) -> Row:
    """One search."""
    began, target = time.process_time(), digit(8)
    guided: Any = EluCD(model(), digit(8, tau2=0.5), scale=job.scale)
    judged = ts.FeynmanKac(schedule=EVERY, num_particles=PARTICLES)
    method, n = (judged, PARTICLES) if job.kind == "judge" else (ts.BestOfN(), SAMPLES)
    result = ts.search(guided, target, method, seed=job.seed, budget=ts.Budget(nfe=n * STEPS), progress=False)
    task = result.tasks[0].certificate()
    return job.row | {
        "log_z": task.log_z.value,
        "low": task.log_z.low,
        "high": task.log_z.high,
        "standing": str(task.log_z.standing),
        "ess": task.ess,
        "backward_nfe": result.cost.backward_nfe,
        "seconds": time.process_time() - began,
    } | where_it_ran()  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("elucd", {"run": Run}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
