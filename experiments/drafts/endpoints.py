"""What looks at endpoints are worth to TreeSearch, beside beams and Feynman-Kac steering, which read them too.

    python -m experiments.drafts.endpoints run
    python -m experiments.drafts.endpoints report

Beds: the chains of `experiments.mixtures.beds` (mild and hard ones differ in λ, which no search reads), the Gaussian
chain with T = 50, and four where endpoints are no good guide:

    still      mix16 under DDIM with eta = .03: x_T decides nearly all, and no tree can help
    wave       r = Σ cos 6 x on mix2: decided late
    between    two modes, r = -| |x_1| - 1 | - .3 |x_2|: states undecided between the modes look best
    rare       a rare mode of mix2, with a slope: one class of samples, decided early

A cell is the best reward of each of some searches with the NFE of so many rollouts. It is worth 1 / P(r >= best)
rollouts, by 40,000 of the chain's own; means over searches are geometric, beside them the factor of a standard error:
with ten searches a factor of two is noise. Best-of-N is worth e^γ = 1.8 N of that mean, and nothing is told apart above
80,000. The weight of FK is λ = 10 in standard deviations of the reward.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import treesearch as ts
from experiments.mixtures import beds as mixtures
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.grids import check_names
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from experiments.shared.tables import table
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian, cosine_bar
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import Reward

KEY = ("bed", "method", "rollouts", "seeds")
POOL, PARTS = 40_000, 10
POOL_SEED = 777


class Bed(NamedTuple):
    """A chain and a reward."""

    kernel: Any
    reward: Reward | Callable[[Tensor], Tensor]


def mixed(name: str) -> Bed:
    """One of the mixtures."""
    bed = mixtures.BEDS[name]()
    return Bed(bed.kernel(), bed.reward)


def still() -> Bed:
    bed = mixtures.BEDS["mix16_mild"]()
    bar = cosine_bar(mixtures.NUM_STEPS)
    schedule = Schedule(torch.arange(1, mixtures.NUM_STEPS + 1), bar.sqrt(), (1 - bar).sqrt(), "sample")
    kernel = DiffusionKernel(
        mixtures.Denoiser(bed.mixture), state_shape=(16,), schedule=schedule, eta=0.03, name="still mixture"
    )
    return Bed(kernel, bed.reward)


def wave() -> Bed:
    return Bed(mixed("mix2_mild").kernel, lambda x: torch.cos(6 * x.double()).sum(1))


def between() -> Bed:
    pair = GaussianMixture(
        num_steps=mixtures.NUM_STEPS, weights=(0.5, 0.5), means=((-3.0, 0.0), (3.0, 0.0)), stds=(0.6, 0.6)
    )
    return Bed(mixtures.chain(pair), lambda x: -(x[:, 0].double().abs() - 1).abs() - 0.3 * x[:, 1].double().abs())


def rare() -> Bed:
    bed = mixtures.BEDS["mix2_mild"]()
    centre = torch.tensor(bed.mixture.means[:1], dtype=torch.float64)
    return Bed(bed.kernel(), lambda x: (torch.cdist(x.double(), centre)[:, 0] < 0.6) + 0.05 * x[:, 0].double())


BEDS: dict[str, Callable[[], Bed]] = {
    "ring": lambda: mixed("ring"),
    "checkerboard": lambda: mixed("checkerboard"),
    "mix2": lambda: mixed("mix2_mild"),
    "mix16": lambda: mixed("mix16_mild"),
    "mix64": lambda: mixed("mix64_mild"),
    "gaussian": lambda: Bed(LinearGaussian(num_steps=50), linear(1.0)),
    "still": still,
    "wave": wave,
    "between": between,
    "rare": rare,
}
METHODS: dict[str, Callable[[float], Any]] = {  # by the standard deviation of the reward
    "best_of_n": lambda sd: ts.BestOfN(),
    "beam": lambda sd: ts.BeamSearch(),
    "fk_max": lambda sd: ts.FeynmanKac(lam=10 / sd, potential="max", resampling="multinomial"),
    "tree_search": lambda sd: ts.TreeSearch(),
    "looks": lambda sd: ts.TreeSearch(looks="endpoints"),
}


def pool(name: str, bed: Bed, work: Path) -> NDArray[np.float64]:
    """Rewards of the chain's own rollouts, increasing."""
    file = work / f"{name}.npy"
    if not file.exists():
        parts = [
            ts.search(bed.kernel, bed.reward, ts.BestOfN(n=POOL // PARTS), seed=POOL_SEED + i, batch_size=4096)
            for i in range(PARTS)
        ]
        np.save(file, np.sort(torch.cat([part.rewards for part in parts]).numpy()))
    return np.load(file)


def log_worth(rewards: NDArray[np.float64], best: Sequence[float]) -> NDArray[np.float64]:
    """Log of the rollouts until one as good comes, by search."""
    below = np.searchsorted(rewards, np.asarray(best), side="left")
    return -np.log((len(rewards) - below + 0.5) / (len(rewards) + 1))


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run: searches side by side, one a task."""

    bed: str
    method: str
    rollouts: int
    seeds: int


def cell(job: Job, bed: Bed, rewards: NDArray[np.float64]) -> Row:
    """The best reward of each search, and what it took."""
    method, steps = METHODS[job.method](float(rewards.std())), bed.kernel.num_steps
    budget, began = ts.Budget(nfe=job.rollouts * steps * job.seeds), time.perf_counter()
    try:
        result = ts.search(
            bed.kernel, bed.reward, method, prompts=list(range(job.seeds)), budget=budget, seed=100, batch_size=256
        )
    except FAILURES as error:
        failed = {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
        return job.row | failed | where_it_ran()
    best = [float(task.rewards.max()) for task in result.tasks]
    cost, logs = result.cost, log_worth(rewards, best)
    error = float(logs.std(ddof=1)) / len(logs) ** 0.5 if len(logs) > 1 else math.inf
    found: Row = {"best": best, "worth": math.exp(logs.mean()), "log_error": error}
    found |= {"nfe": cost.nfe, "repeated_nfe": cost.repeated_nfe}
    return job.row | found | {"reward_calls": cost.reward_calls, "seconds": cost.seconds} | where_it_ran()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    beds: tuple[str, ...] = tuple(BEDS)
    """which beds"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    rollouts: tuple[int, ...] = (20, 60, 200)
    """whose NFE a search may spend"""
    seeds: int = 10
    """searches of a cell"""
    out: Path = Path("runs/results/endpoints.jsonl")
    """one row a cell"""
    work: Path = Path("runs/endpoints")
    """rollouts of the chains"""

    def run(self) -> int:
        check_names("bed", self.beds, BEDS)
        check_names("method", self.methods, METHODS)
        with locked(self.work):

            @cache
            def known(name: str) -> tuple[Bed, NDArray[np.float64]]:
                bed = BEDS[name]()
                return bed, pool(name, bed, self.work)

            every: Sweep[Job] = Sweep(
                Cells(self.out, KEY), lambda job: cell(job, *known(job.bed)), lambda row: f"worth {row['worth']:.0f}"
            )
            every.fill(Job(b, m, n, self.seeds) for b, n, m in product(self.beds, self.rollouts, self.methods))
        return 0


def page(rows: Sequence[Row]) -> str:
    """A table a budget: what each method is worth on each bed, and looks beside the best of the others."""
    found = {(row["bed"], row["method"], row["rollouts"]): row for row in rows if row.get("worth") is not None}
    parts = [
        "# Looks at endpoints",
        "What the best of a search is worth, in rollouts, and the factor of its standard error; "
        "`experiments/drafts/endpoints.py`. In the last column the 95 % interval of the ratio; methods share no more "
        "than the first draws, so that the errors of both are added. Nothing is told apart above 80,000.",
    ]
    for n in sorted({row["rollouts"] for row in rows}):
        seeds = {row["seeds"] for row in rows if row["rollouts"] == n}
        parts += [
            f"## {n} rollouts, {' or '.join(map(str, sorted(seeds)))} searches",
            table(list(BEDS), [*METHODS, "looks / best other"], _cell(found, n), corner="bed"),
        ]
    return "\n\n".join(parts) + "\n"


def _cell(found: dict[tuple[str, str, int], Row], n: int) -> Callable[[str, str], str | None]:
    def text(bed: str, column: str) -> str | None:
        of = {m: found[bed, m, n] for m in METHODS if (bed, m, n) in found}
        if column in METHODS:
            return f"{of[column]['worth']:,.0f} ×/÷ {math.exp(of[column]['log_error']):.2f}" if column in of else None
        if len(of) < len(METHODS):
            return None
        looks = of.pop("looks")
        best = max(of.values(), key=lambda row: row["worth"])
        ratio, spread = looks["worth"] / best["worth"], 1.96 * math.hypot(looks["log_error"], best["log_error"])
        return f"{_short(ratio)} ({_short(ratio * math.exp(-spread))} to {_short(ratio * math.exp(spread))})"

    return text


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


Report = reporting("endpoints", KEY, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("endpoints", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
