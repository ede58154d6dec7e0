"""The best text against NFE: best-of-N, DTS* and TreeSearch, and what judges say of it.

    python -m experiments.text.search run --data FOLDER
    python -m experiments.text.search report

DTS*'s completion table at our size, without prompts. A cell is a search of a reward (`experiments.text.bed`); its row
holds each improvement: NFE, best reward, and the judge of that reward on the text that had it. Best-of-N's rollouts
are the same for every reward, and are made once.

    best of N        to the largest budget
    DTS*             max backup, C = 2, α = .7, branching at every fourth of T, as published for text
    TreeSearch       as it comes; "looks" with looks="endpoints"

Drafts (`TreeSearch(draft=...)`) need a chain on which a step may leap; tokens have none, so there is no row of them.
Over-optimisation: the judge's mean along the search, where the reward's still rises.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.curves import FEW_SEEDS, Curve, compare, grid, value_at
from experiments.shared.sweep import Sweep, command_line, reporting
from experiments.text.bed import Bed, OnBed
from experiments.text.steering import levels, rollouts
from treesearch.report.tables import markdown_table

KEY = ("reward", "method", "nfe", "seed")
REWARDS = ("fluency", "acceptability", "sentiment")
BASE = "best of N"
F64 = NDArray[np.float64]


def dts_star(bed: Bed) -> Any:
    at = (bed.num_steps, *levels(bed.num_steps))
    return ts.DiffusionTreeSearch(branch_at=at, widening_alpha=0.7, backup="max")


TREES: dict[str, Any] = {
    "DTS*": dts_star,
    "TreeSearch": lambda bed: ts.TreeSearch(),
    "TreeSearch, looks": lambda bed: ts.TreeSearch(looks="endpoints"),
}


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    reward: str
    method: str
    nfe: int
    seed: int


def searched(job: Job, bed: Bed) -> Row:
    """A cell's row."""
    began, reward = time.monotonic(), bed.rewards[job.reward]
    if job.method == BASE:
        texts = rollouts(bed, job.nfe, job.seed).samples
        rewards = reward(texts).double()
        at = [bed.num_steps * (i + 1) for i in range(len(texts))]
        calls = len(texts)
        steps = [[at[i], float(rewards[i]), texts[i]] for i in improvements(rewards.tolist())]
    else:
        method, budget = TREES[job.method](bed), ts.Budget(nfe=job.nfe)
        found = ts.search(bed.kernel, reward, method, budget=budget, seed=job.seed)
        bests = [(r["nfe"], r["best_reward"]) for r in found.history if r["best_reward"] is not None]
        passed = [bests[i] for i in improvements([best for _, best in bests])]
        which = [int((found.rewards - best).abs().argmin()) for _, best in passed]
        steps = [[nfe, best, found.samples[i]] for (nfe, best), i in zip(passed, which, strict=True)]
        calls = found.cost.reward_calls
    judged = bed.judges[job.reward]([text for _, _, text in steps]).tolist()
    curve = [[nfe, best, judge] for (nfe, best, _), judge in zip(steps, judged, strict=True)]
    told = {"curve": curve, "best": curve[-1][1], "judge": curve[-1][2], "text": steps[-1][2], "reward_calls": calls}
    return job.row | told | {"seconds": time.monotonic() - began} | where_it_ran()


def improvements(rewards: Sequence[float]) -> list[int]:
    """Where the best so far is passed."""
    best, found = -math.inf, []
    for i, reward in enumerate(rewards):
        if reward > best:
            best = reward
            found.append(i)
    return found


@dataclass(frozen=True, kw_only=True)
class Run(OnBed):
    """Fill every cell that is not there; run again to go on."""

    base_nfe: int = 10_000
    """of best-of-N"""
    nfe: int = 2_500
    """of the trees"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rewards: tuple[str, ...] = REWARDS
    out: Path = Path("runs/results/text/search.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        bed = self.bed()
        asked = {"weights": self.weights, "length": self.length, "num_steps": self.num_steps}
        every: Sweep[Job] = Sweep(
            Cells(self.out, KEY, asked),
            lambda job: searched(job, bed),
            lambda row: f"best {row['best']:.3f}, judge {row['judge']:.3f}",
        )
        for seed in self.seeds:
            every.fill(Job(reward, BASE, self.base_nfe, seed) for reward in self.rewards)
            every.fill(Job(reward, method, self.nfe, seed) for reward in self.rewards for method in TREES)
        return 0


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    seeds = len({row["seed"] for row in rows})
    parts = [
        "# The best text against NFE",
        f"{seeds} seeds; mean curves over them. Saved: best-of-N's NFE at the end of its budget over the method's for "
        f"the same mean reward, with 95 % bootstrap intervals over seeds; < and > where a budget does not reach. "
        f"{FEW_SEEDS} What the rows are is in the head of `experiments/text/search.py`.",
    ]
    for reward in dict.fromkeys(row["reward"] for row in rows):
        mine = [row for row in rows if row["reward"] == reward]
        parts += [f"## {reward}", section(mine), judged(mine)]
    return "\n\n".join([*parts, f"Machine: {rows[0]['machine']}."]) + "\n"


def section(rows: Sequence[Row]) -> str:
    """A reward's table."""
    base = [row for row in rows if row["method"] == BASE]
    goal = min(row["nfe"] for row in base)
    lines = []
    for method in (BASE, *TREES):
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        own = min(row["nfe"] for row in mine)
        at = [f"{value_at(curve(mine, 1), n):.3f}" if n <= own else "-" for n in _budgets(rows)]
        saved = "1" if method == BASE else _saved(mine, base, goal)
        calls = np.mean([row["reward_calls"] / row["nfe"] for row in mine])
        lines.append([method, *at, saved, f"{calls:.2f}"])
    heads = ("method", *(f"best at {n:,}" for n in _budgets(rows)), "saved", "reward calls an NFE")
    return markdown_table(lines, heads)


def judged(rows: Sequence[Row]) -> str:
    """What the judge says of the best text at a quarter, at half and at the end of each budget."""
    lines = []
    for method in (BASE, *TREES):
        if mine := [row for row in rows if row["method"] == method]:
            own = min(row["nfe"] for row in mine)
            at = [value_at(curve(mine, 2), own / k) for k in (16, 4, 1)]
            lines.append([method, *(f"{value:.3f}" for value in at)])
    return "The judge on the best text so far:\n\n" + markdown_table(
        lines, ("method", "at 1/16 of its budget", "at 1/4", "at the end")
    )


def _budgets(rows: Sequence[Row]) -> list[int]:
    """A sixteenth and the whole of the trees' budget, and best-of-N's."""
    ends = sorted({row["nfe"] for row in rows})
    return [ends[0] // 4, *ends]


def curve(rows: Sequence[Row], column: int) -> Curve:
    """Mean over seeds of a column of the best so far against NFE."""
    own = min(row["nfe"] for row in rows)
    first = max(row["curve"][0][0] for row in rows)
    at = grid(first, own)
    each = []
    for row in rows:
        steps = np.array(row["curve"], float)
        each.append(steps[np.maximum(np.searchsorted(steps[:, 0], at, "right") - 1, 0), column])
    return at, np.mean(each, 0)


def _saved(mine: Sequence[Row], base: Sequence[Row], goal: int) -> str:
    seeds = sorted({row["seed"] for row in mine} & {row["seed"] for row in base})
    one, other = ({row["seed"]: row for row in rows} for rows in (mine, base))

    def curves(picks: NDArray[np.int64]) -> tuple[Curve, Curve]:
        return curve([one[seeds[i]] for i in picks], 1), curve([other[seeds[i]] for i in picks], 1)

    return compare(curves, len(seeds), goal=goal).saved


Report = reporting("text/search", KEY, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("search", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
