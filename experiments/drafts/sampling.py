"""Sampling with drafts on a chain whose log Z is known: bias, coverage of intervals, and variance at equal NFE.

    python -m experiments.drafts.sampling run
    python -m experiments.drafts.sampling report

x_0 ~ N(0, I) in six dimensions, T = 30 steps, r = Σ x_0, π ∝ p exp(λ r): log Z = λ²/2 times the sum of the covariance
of the chain's own x_0. Many searches of a few hundred rollouts' NFE, a task each:

    bias       mean Ẑ/Z - 1, with its standard error
    coverage   of the 95 % intervals of log Z, of all searches and of those that the certificate relies on
    variance   of Ẑ/Z, that of best-of-N over the method's
    ESS        of the draws' weights, mean
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import Sweep, command_line, reporting
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward

KEY = ("method", "lam", "searches", "rollouts", "seed")
T, DIM, DRAFT, BATCH = 30, 6, 4, 4096
LEVELS = (24, 18, 12, 6, 0)
ARMS: dict[str, Any] = {
    "best_of_n": lambda lam: ts.BestOfN(lam=lam),
    "best_of_n(draft)": lambda lam: ts.BestOfN(lam=lam, draft=DRAFT, floor=0.1),
    "tree_sampling": lambda lam: ts.TreeSampling(lam=lam, schedule=LEVELS),
    "tree_sampling(draft)": lambda lam: ts.TreeSampling(lam=lam, schedule=LEVELS, draft=DRAFT),
}
LAMS = (0.4, 0.8)
CHUNK = 250  # searches at once


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    method: str
    lam: float
    searches: int
    rollouts: int
    seed: int


@cache
def bed() -> GaussianStates:
    return GaussianStates(torch.zeros(DIM).double(), torch.eye(DIM).double(), num_steps=T)


def log_z(lam: float) -> float:
    mean, cov = bed().law
    return float(lam * mean.sum() + 0.5 * lam**2 * cov.sum())


def total(x: torch.Tensor, prompts: Any) -> torch.Tensor:
    return x.double().flatten(1).sum(1)


def measured(job: Job) -> Row:
    """A cell: what many searches say of log Z."""
    true, ratio, inside, relied, ess, drafts = log_z(job.lam), [], [], [], [], 0
    for first in range(0, job.searches, CHUNK):
        count = min(CHUNK, job.searches - first)
        found = ts.search(
            bed(),
            Reward(total, "total"),
            ARMS[job.method](job.lam),
            prompts=list(range(count)),
            budget=ts.Budget(nfe=count * job.rollouts * T),
            seed=job.seed + first,
            batch_size=BATCH,
        )
        drafts += found.cost.draft_nfe
        for task in found.tasks:
            known = task.certificate().log_z
            ratio.append(math.exp(task.log_z - true) if task.log_z is not None else 0.0)
            inside.append(known.low is not None and known.high is not None and known.low <= true <= known.high)
            relied.append(str(known.standing) == "ok")
            ess.append(task.diagnostics["ess"])
    se = float(np.std(ratio, ddof=1) / math.sqrt(len(ratio)))
    sure = [i for i, r in zip(inside, relied, strict=True) if r]
    return job.row | {
        "bias": float(np.mean(ratio)) - 1, "se": se, "variance": float(np.var(ratio, ddof=1)),
        "coverage": float(np.mean(inside)), "relied": float(np.mean(relied)),
        "coverage_relied": float(np.mean(sure)) if sure else None, "ess": float(np.mean(ess)),
        "draft_share": drafts / (job.searches * job.rollouts * T),
    } | where_it_ran()  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    searches: int = 2000
    """a cell of best-of-N with drafts"""
    others: int = 500
    """a cell of the others"""
    rollouts: int = 150
    """of best-of-N that a search's NFE pay for"""
    methods: tuple[str, ...] = tuple(ARMS)
    """which of them"""
    seed: int = 0
    """of the first searches"""
    out: Path = Path("runs/results/drafts/sampling.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), measured, lambda row: f"{row['bias']:+.4f} ± {row['se']:.4f}")
        count = {name: self.searches if name == "best_of_n(draft)" else self.others for name in self.methods}
        every.fill(Job(name, lam, n, self.rollouts, self.seed) for lam in LAMS for name, n in count.items())
        return 0


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    first = rows[0]
    parts = [
        "# Sampling with drafts",
        f"A Gaussian chain of {T} steps in {DIM} dimensions, r = Σ x_0; searches of the NFE of "
        f"{first['rollouts']} rollouts each; drafts of {DRAFT} evaluations. What the columns are is in the head "
        "of `experiments/drafts/sampling.py`.",
        *(section([row for row in rows if row["lam"] == lam], lam) for lam in LAMS),
        f"Machine: {first['machine']}.",
    ]
    return "\n\n".join(parts) + "\n"


def section(rows: Sequence[Row], lam: float) -> str:
    """A table of one λ."""
    base = {row["method"]: row["variance"] for row in rows}.get("best_of_n", math.nan)
    body = [
        [
            row["method"],
            f"{row['searches']:,}",
            f"{row['bias']:+.2%} ± {row['se']:.2%}",
            f"{row['coverage']:.1%}",
            f"{row['relied']:.0%}",
            "-" if row["coverage_relied"] is None else f"{row['coverage_relied']:.1%}",
            f"{base / row['variance']:.2f}",
            f"{row['ess']:.0f}",
            f"{row['draft_share']:.0%}",
        ]
        for row in rows
    ]
    heads = (
        "method",
        "searches",
        "bias of Ẑ",
        "coverage",
        "relied on",
        "coverage of those",
        "variance",
        "ESS",
        "NFE of drafts",
    )
    return f"## λ = {lam:g}, log Z = {log_z(lam):.3f}\n\n{markdown_table(body, heads)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    commands = {"run": Run, "report": reporting("drafts/sampling", KEY, report)}
    return command_line("sampling", commands, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
