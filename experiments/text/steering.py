"""FK steering's table of text at our size: base, best of four, FK, DTS and our trees at equal NFE.

    python -m experiments.text.steering run --data FOLDER
    python -m experiments.text.steering report

A cell is a search of a reward (`experiments.text.bed`) by one method, λ = 10 as published. What it draws of its
estimate of π is graded by judges that no search reads: nats a token, shares of acceptable, positive and
attributed texts.

    base          rollouts as they come
    best of 4     of every four rollouts the best
    FK            as published: four particles, difference potential, resampled at every scored level whatever the ESS
                  (multinomial), a state worth the log-mean-exp of four draws of x_0; of each population the best
    FK, one       the same steering, one population as large as the budget pays for, its weighted samples
    DTS           C = 2, α = .7 as published for text, branching at the same levels; draws of its read-out
    TreeSampling  its draws, values fitted to endpoints of waves before; "drawn" with FK's values, at FK's levels
    TreeSearch    the best eighth of its texts: a search, no sample of π

Levels: every fourth of 16 steps; published are every 20th of 1,000 for FK and every tenth of 64 for DTS.
"""

from __future__ import annotations

import sys
import time
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
from experiments.shared.stats import mean_se
from experiments.shared.sweep import Sweep, command_line, reporting
from experiments.shared.tables import table
from experiments.text.bed import Bed, OnBed
from treesearch.backends.guidance.drawn import Drawn
from treesearch.rewards.analytic import constant

KEY = ("reward", "method", "nfe", "seed")
LAM = 10.0
REWARDS = ("fluency", "acceptability", "exclamation", "praise")
PARTICLES, DRAWS = 4, 4
READ = 200  # draws of an estimate


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    reward: str
    method: str
    nfe: int
    seed: int


def levels(num_steps: int) -> tuple[int, ...]:
    """Every quarter of the steps."""
    return tuple(num_steps * k // 4 for k in (3, 2, 1))


def base(result: Any, rewards: Tensor) -> Any:
    return result.samples


def best_of_four(result: Any, rewards: Tensor) -> list[str]:
    """The best of every four, in order of creation."""
    groups = rewards[: len(rewards) // PARTICLES * PARTICLES].view(-1, PARTICLES)
    return [result.samples[PARTICLES * i + int(j)] for i, j in enumerate(groups.argmax(1).tolist())]


def drawn(result: Any, rewards: Tensor) -> Any:
    return result.draw(READ)


def best_eighth(result: Any, rewards: Tensor) -> Any:
    return result.best(max(1, len(rewards) // 8))[0]


def steered(bed: Bed, reward: Any) -> Any:
    """The kernel with the value of FK's runs of text."""
    return Drawn(bed.kernel, reward, draws=DRAWS, lam=LAM, levels=levels(bed.num_steps))


def plain(bed: Bed, reward: Any) -> Any:
    return bed.kernel


Entry = tuple[Callable[[Bed, Any], Any] | None, Callable[[tuple[int, ...]], Any], Callable[[Any, Tensor], Any]]
METHODS: dict[str, Entry] = {  # None: walks that no reward decides, one search for all
    "base": (None, lambda at: ts.BestOfN(), base),
    "best of 4": (None, lambda at: ts.BestOfN(), best_of_four),
    "FK": (
        steered,
        lambda at: ts.FeynmanKac(
            num_particles=PARTICLES, lam=LAM, schedule=(*at, 0), resampling="multinomial", ess_threshold=1.0
        ),
        best_of_four,
    ),
    "FK, one": (steered, lambda at: ts.FeynmanKac(lam=LAM, schedule=(*at, 0)), drawn),
    "DTS": (
        plain,
        lambda at: ts.DiffusionTreeSampling(lam=LAM, widening_alpha=0.7, branch_at=(at[0] * 4 // 3, *at)),
        drawn,
    ),
    "TreeSampling": (plain, lambda at: ts.TreeSampling(lam=LAM), drawn),
    "TreeSampling, drawn": (steered, lambda at: ts.TreeSampling(lam=LAM, schedule=(*at, 0)), drawn),
    "TreeSearch": (plain, lambda at: ts.TreeSearch(), best_eighth),
}


@cache
def rollouts(bed: Bed, nfe: int, seed: int) -> Any:
    """Walks that no reward decides."""
    return ts.search(bed.kernel, constant(0.0), ts.BestOfN(), budget=ts.Budget(nfe=nfe), seed=seed)


def searched(job: Job, bed: Bed) -> Row:
    """A cell's row."""
    began = time.monotonic()
    around, method, read = METHODS[job.method]
    reward = bed.rewards[job.reward]
    if around is None:
        result = rollouts(bed, job.nfe, job.seed)
        rewards = reward(result.samples)
    else:
        made, budget = method(levels(bed.num_steps)), ts.Budget(nfe=job.nfe)
        result = ts.search(around(bed, reward), reward, made, budget=budget, seed=job.seed)
        rewards = result.rewards
    texts = read(result, rewards)
    graded = {name: float(values.mean()) for name, values in bed.graded(texts).items()}
    cost = {"spent": result.cost.nfe, "reward_calls": result.cost.reward_calls, "seconds": time.monotonic() - began}
    some = list(dict.fromkeys(texts))
    told = {"mean_reward": float(reward(list(texts)).mean()), "texts": len(some), "some": some[:3]}
    return job.row | graded | told | cost | where_it_ran()


@dataclass(frozen=True, kw_only=True)
class Run(OnBed):
    """Fill every cell that is not there; run again to go on."""

    nfe: int = 2_048
    """of a search"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rewards: tuple[str, ...] = REWARDS
    out: Path = Path("runs/results/text/steering.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        bed = self.bed()
        asked = {"weights": self.weights, "length": self.length, "num_steps": self.num_steps}
        every: Sweep[Job] = Sweep(Cells(self.out, KEY, asked), lambda job: searched(job, bed), _words)
        for seed in self.seeds:
            every.fill(Job(reward, method, self.nfe, seed) for reward in self.rewards for method in METHODS)
        return 0


def _words(row: Row) -> str:
    return f"reward {row['mean_reward']:.3f}, {row['nats']:.2f} nats, exclamation {row['exclamation']:.2f}"


COLUMNS = {
    "reward": ("mean_reward", 1.0),
    "nats a token": ("nats", 1.0),
    "acceptable, %": ("acceptable", 100.0),
    "exclaims, %": ("exclamation", 100.0),
    "praise, %": ("praise", 100.0),
    "positive, %": ("positive", 100.0),
    "words that differ, %": ("different", 100.0),
    "reward calls": ("reward_calls", 1.0),
}


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    nfe = sorted({row["nfe"] for row in rows})
    parts = [
        "# Steering texts",
        f"{len({row['seed'] for row in rows})} seeds, {', '.join(f'{n:,}' for n in nfe)} NFE a search, λ = {LAM:g}; "
        "mean ± standard error over seeds. What rows and columns are is in the heads of `experiments/text/steering.py` "
        "and `bed.py`; all columns but the reward are judged by what no search reads, or counted.",
    ]
    for reward in dict.fromkeys(row["reward"] for row in rows):
        parts += [f"## {reward}", section([row for row in rows if row["reward"] == reward])]
    parts += [rare(rows), f"Machine: {rows[0]['machine']}."]
    return "\n\n".join(parts) + "\n"


def section(rows: Sequence[Row]) -> str:
    """A reward's table."""

    def cell(method: str, column: str) -> str | None:
        name, scale = COLUMNS[column]
        values = [row[name] for row in rows if row["method"] == method]
        return mean_se(values).text(scale) if values else None

    return table(list(METHODS), list(COLUMNS), cell)


def rare(rows: Sequence[Row]) -> str:
    """Rates of the rare attributes by the search for them, with 95 % intervals over seeds."""
    attributes = [name for name in ("exclamation", "praise") if any(row["reward"] == name for row in rows)]

    def cell(method: str, name: str) -> str | None:
        values = np.array([row[name] for row in rows if row["method"] == method and row["reward"] == name])
        if not len(values):
            return None
        low, high = interval(values)
        return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"

    what = "Rates in per cent of the attribute that the search was for; 95 % bootstrap intervals over seeds."
    return f"## Rare attributes\n\n{what}\n\n{table(list(METHODS), attributes, cell)}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bounds of a mean, by the percentile bootstrap."""
    picks = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


Report = reporting("text/steering", KEY, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("steering", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
