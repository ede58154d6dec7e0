"""What actions inside the network are worth beside noise: the best reward at equal cost of two searches and of both.

    python -m experiments.interventions.compare run
    python -m experiments.interventions.compare report

On the shipped MNIST model, T = 25, where h-space directions are the actions (`hspace`), drawn at x_T and at the levels
below it where the trees branch. A chain without noise (η = 0) has nothing else to branch by; on one with noise (η = 1)
siblings differ anyway.

    prior             best of N draws of x_T, η = 0                     noise          best of N rollouts, η = 1
    prior + actions   best of N, an action at random each level, η = 0  noise tree     DTS*, η = 1
    action tree       DTS* over actions, η = 0                          both           DTS* over actions, η = 1
    action search     TreeSearch over actions, η = 0                    noise search   TreeSearch, η = 1
                                                                        both, search   TreeSearch over actions, η = 1

DTS* widens as the square root of visits and keeps to few x_T; TreeSearch learns at which level a reward is decided.
The cost is rows of the network. Two arms are paired by seed. An action makes another law p, and what it gains may lie
off the model's manifold: the judge of `experiments.mnist.judge`, which no search can reach, says how sure it is of any
class at the best sample. Rewards: a heavy eight (`experiments.mnist.targets.conjunction`), and brightness.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import treesearch as ts
from experiments.mnist import judge
from experiments.mnist.searches import improvements
from experiments.mnist.targets import conjunction
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.evidence_duels import gap
from experiments.shared.stats import mean_se
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from treesearch.backends import mnist
from treesearch.backends.interventions import Actions
from treesearch.backends.interventions.hspace import hspace
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward
from treesearch.rewards.images import image

T = 25
LEVELS = (25, 20, 15, 10, 5)  # where trees branch
BELOW = LEVELS[1:]  # where actions are drawn again; x_T comes with one
ALPHAS = (-6.0, -3.0, 3.0, 6.0)
KEY = ("reward", "arm", "budget", "seed")
REWARDS = {"heavy eight": conjunction, "brightness": image.brightness}
STILL = ("prior", "prior + actions", "action tree", "action search")
PLAIN = ("prior", "noise", "noise tree", "noise search")
ARMS = (*STILL, "noise", "noise tree", "noise search", "both", "both, search")
DUELS = (
    ("action tree", "prior"),
    ("action tree", "prior + actions"),
    ("action search", "prior"),
    ("action search", "noise search"),
    ("both", "noise tree"),
    ("both, search", "noise search"),
    ("both, search", "noise"),
    ("noise search", "noise"),
)


@cache
def kernel_of(arm: str) -> Any:
    """The chain of an arm."""
    plain = mnist(num_steps=T, eta=0.0 if arm in STILL else 1.0)
    if arm in PLAIN:
        return plain
    return Actions(hspace(plain, "hspace.safetensors", alphas=ALPHAS), BELOW)


def method_of(arm: str) -> Any:
    if arm in ("prior", "prior + actions", "noise"):
        return ts.BestOfN()
    if arm.endswith("search"):
        return ts.TreeSearch()
    return ts.DiffusionTreeSearch(branch_at=LEVELS, widening_c=1.0, widening_alpha=0.5)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    reward: str
    arm: str
    budget: int
    seed: int


def searched(job: Job) -> Row:
    """A cell."""
    reward: Reward = REWARDS[job.reward]()
    try:
        found = ts.search(
            kernel_of(job.arm),
            reward,
            method_of(job.arm),
            budget=ts.Budget(nfe=job.budget),
            seed=job.seed,
            batch_size=8,
        )
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    best, value = found.best(1)
    sure = float(judge.grade(best.float())[0].max())
    told = {"best": float(value[0]), "sure": sure, "nfe": found.cost.nfe, "curve": improvements(found.history)}
    return job.row | told | where_it_ran()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    budget: int = 2_500
    """rows of the network a search"""
    seeds: int = 10
    """how many"""
    out: Path = Path("runs/results/interventions/compare.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), searched, lambda row: f"best {row['best']:.4g}")
        every.fill(Job(r, arm, self.budget, seed) for seed in range(self.seeds) for r in REWARDS for arm in ARMS)
        return 0


COLUMNS = ("arm", "best at a quarter", "best", "judge's certainty", "seeds")


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    budget, found = done[0]["budget"], {row["reward"] for row in done}
    parts = [part for reward in REWARDS if (part := section([row for row in done if row["reward"] == reward], reward))]
    return (
        f"# Actions and noise at equal cost\n\n`mnist(num_steps={T})`, {budget:,} rows of the network a search; what "
        "the arms are is in the head of `experiments/interventions/compare.py`. Mean ± standard error over seeds; "
        "differences are paired by seed, with 95 % intervals (Student's t), "
        f"{len(DUELS) * len(found)} of them and none corrected for their number. What is said against `noise` has "
        "another method too: `noise search less noise` is what the method gains without actions.\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def section(rows: Sequence[Row], reward: str) -> str:
    """A reward's arms and duels."""
    if not rows:
        return ""
    arms = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in ARMS}
    lines = [[arm, *line(list(of.values()))] for arm, of in arms.items() if of]
    duels = []
    for one, other in DUELS:
        found = gap(*({seed: -row["best"] for seed, row in arms[arm].items()} for arm in (one, other)))
        duels.append([f"{one} less {other}", "-" if found is None else told(found)])
    against = markdown_table(duels, ("difference of the best", "value"))
    return f"## {reward}\n\n{markdown_table(lines, COLUMNS)}\n\n{against}"


def line(rows: Sequence[Row]) -> list[str]:
    quarter = [at(row["curve"], row["budget"] / 4) for row in rows]
    cells = (quarter, [row["best"] for row in rows], [row["sure"] for row in rows])
    return [*(mean_se(values).text() for values in cells), str(len(rows))]


def at(curve: Sequence[Sequence[float]], nfe: float) -> float:
    """The best of a curve by a cost."""
    return max([best for spent, best in curve if spent <= nfe], default=float(np.nan))


def told(found: Any) -> str:
    """A difference, higher is better."""
    return f"{found.verdict}: {-found.mean:.3g} ({-found.high:.3g} to {-found.low:.3g})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line(
        "compare", {"run": Run, "report": reporting("interventions/compare", KEY, report)}, argv, __doc__
    )


if __name__ == "__main__":
    sys.exit(main())
