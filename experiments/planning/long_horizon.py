"""Plans longer than the model's: success where a single plan is too short, by chunks composed in the tree.

    python -m experiments.planning.long_horizon run
    python -m experiments.planning.long_horizon report

Pairs of the maze are so far apart that a plan of `horizon` rows can hardly reach the goal. `chunks` plans in a row can
(`treesearch.backends.wrappers.composed`), if the earlier ones end where the last one can go on from; nothing but the
reward tells them where. A cell plans once for all pairs, and the plans are tracked in the environment to their end. The
reward tracks them in a model of the maze. Budgets are in NFE, of one chunk each: a rollout of K chunks costs K·T, one
of a single plan T.

Settings are chosen among a few by mean reward at the smallest budget, on pairs and seeds of their own. Intervals are of
the percentile bootstrap over pairs, seeds pooled; differences are of the same pairs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np

import treesearch as ts
from experiments.planning.episodes import play
from experiments.planning.methods import NARROW, REACH, Bed, plain
from experiments.planning.pointmaze import Pair, Tracking, held_out_pairs
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.grids import Entry, How, check_names, first_best
from experiments.shared.stats import F64, bootstrap
from experiments.shared.sweep import FAILURES, Sweep, check_seeds, command_line, reporting, tuned
from experiments.shared.tables import table
from treesearch.backends.models.trajectory import maze_kernel
from treesearch.backends.wrappers.composed import Composed
from treesearch.rewards.trajectories.execution import maze_execution

KEY = ("maze", "horizon", "chunks", "split", "method", "settings", "nfe", "seed")
PAIR_SEED = {"tune": 8_000_000, "test": 8_000_001}
BASE = "best_of_n"
METHODS: dict[str, Entry] = {
    "base": Entry(partial(plain, partial(ts.BestOfN, n=1))),
    "best_of_n": Entry(partial(plain, ts.BestOfN)),
    "fk": Entry(partial(plain, ts.FeynmanKac), ({"lam": 3.0}, {"lam": 10.0}, {"lam": 30.0})),
    "dts_star": Entry(
        partial(plain, partial(ts.DiffusionTreeSearch, wave=1)), (NARROW, NARROW | {"c_uct": 0.3, "backup": "max"})
    ),
    "tree_search": Entry(partial(plain, partial(ts.TreeSearch, wave=1))),
    "tree_looks": Entry(partial(plain, partial(ts.TreeSearch, looks="endpoints"))),
}
SINGLE = ("base", "best_of_n")  # what plans a single chunk, too


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    maze: str
    horizon: int
    chunks: int
    split: str  # tune or test
    method: str
    settings: How
    nfe: int
    seed: int


@cache
def bed_of(maze: str, horizon: int, chunks: int, num_steps: int) -> Bed:
    """A maze with its shipped model, for plans of so many chunks."""
    kernel = maze_kernel(maze, num_steps, horizon=horizon)
    stride = kernel.card.stride if kernel.card else 1
    reward = maze_execution(maze, kernel.channels, stride=stride, by="plan", radius=REACH)
    return Bed(maze, Composed(kernel, chunks), reward, Tracking(stride=stride))


def pairs_of(job: Job, run: Run) -> list[Pair]:
    """Those of a split."""
    return held_out_pairs(job.maze, run.pairs, PAIR_SEED[job.split], run.min_cells)


def played(job: Job, run: Run) -> Row:
    """A cell; one that fails says why."""
    began = time.perf_counter()
    bed = bed_of(job.maze, job.horizon, job.chunks, run.num_steps)
    rollouts = max(1, job.nfe // bed.kernel.num_steps)
    try:
        setup = METHODS[job.method].make(bed, **job.settings)
        done = play(bed, setup, pairs_of(job, run), rollouts=rollouts, seed=job.seed, batch_size=run.batch_size)
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
    outcome, decision = done.field.outcome(), done.planner.decision
    return job.row | {
        "success": outcome.success.astype(int).tolist(),
        "distance": outcome.distance.tolist(),
        "reward": done.rewards.tolist(),
        "spent": decision.nfe_each,
        "planning_seconds": decision.seconds / len(outcome.success),
        "fingerprint": bed.kernel.fingerprint,
        "seconds": time.perf_counter() - began,
        **where_it_ran(),
    }


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    maze: str = "medium"
    """whose model is shipped"""
    horizon: int = 24
    """rows of a chunk"""
    chunks: int = 3
    """K"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    nfe: tuple[int, ...] = (150, 600)
    """budgets"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the figures"""
    tuning_seeds: tuple[int, ...] = (100,)
    """of the choice of settings"""
    pairs: int = 40
    """of a split"""
    min_cells: int = 8
    """shortest route of a pair"""
    num_steps: int = 10
    """T of a chunk"""
    batch_size: int = 256
    """rows of a forward pass"""
    out: Path = Path("runs/results/long_horizon.jsonl")
    """row file"""

    def run(self) -> int:
        """Run the cells; the exit code."""
        check_seeds(self.seeds, self.tuning_seeds)
        check_names("method", self.methods, METHODS)
        with locked(self.out.parent / f".{self.out.stem}"):
            asked = {"pairs": self.pairs, "min_cells": self.min_cells, "num_steps": self.num_steps}
            cells = Cells(self.out, KEY, asked)
            every: Sweep[Job] = Sweep(cells, lambda job: played(job, self), words)
            every.fill(self._tuning())
            every.fill(self._figures({name: chosen(name, cells.rows) for name in self.methods}))
        return 0

    def _tuning(self) -> Iterator[Job]:
        for (method, how), seed in product(tuned(self.methods, METHODS), self.tuning_seeds):
            yield Job(self.maze, self.horizon, self.chunks, "tune", method, how, min(self.nfe), seed)

    def _figures(self, picked: dict[str, How]) -> Iterator[Job]:
        for seed, nfe, chunks, method in product(self.seeds, self.nfe, sorted({1, self.chunks}), self.methods):
            least = method == "base"
            if (chunks > 1 or method in SINGLE) and not (least and nfe > min(self.nfe)):
                budget = chunks * self.num_steps if least else nfe
                yield Job(self.maze, self.horizon, chunks, "test", method, picked[method], budget, seed)


def words(row: Row) -> str:
    """What is said of a cell."""
    return f"{np.mean(row['success']):.0%}, {row['spent']:,.0f} NFE"


def chosen(method: str, rows: Sequence[Row]) -> How:
    """The settings of the highest mean reward among the cells for tuning."""
    grid = METHODS[method].grid
    cells = [row for row in rows if row["split"] == "tune" and row["method"] == method and "error" not in row]
    means = [[np.mean(row["reward"]) for row in cells if row["settings"] == how] for how in grid]
    return grid[first_best([float(np.mean(found)) if found else None for found in means], max)]


EXPLAINED = (
    "Success in % with 95 % bootstrap intervals over pairs, seeds pooled; plans are made once and tracked to their "
    "end. NFE are evaluations of one chunk; the base sampler takes as many as one plan has."
)


def page(rows: Sequence[Row]) -> str:
    """Success, differences to best-of-N and FK over composed plans, and what was missing of the way."""
    done = [row for row in rows if row["split"] == "test" and "error" not in row]
    if not done:
        raise ValueError("no cell yet: run the experiment first")
    first, budgets = done[0], sorted({row["nfe"] for row in done if row["method"] != "base"})
    lines = sorted({(row["chunks"], row["method"]) for row in done}, key=lambda at: (at[0], list(METHODS).index(at[1])))
    labels = {f"{method}, {chunks} chunk{'s' * (chunks > 1)}": (chunks, method) for chunks, method in lines}

    def values(label: str, column: str, what: str) -> F64 | None:
        chunks, method = labels[label]
        found = {
            row["seed"]: row[what]
            for row in done
            if (row["chunks"], row["method"]) == (chunks, method) and (method == "base" or row["nfe"] == int(column))
        }
        sign = -1 if what == "reward" else 1
        return sign * np.array([found[seed] for seed in sorted(found)], float) if found else None

    def cell(what: str, scale: float) -> Callable[[str, str], str | None]:
        return lambda label, column: None if (v := values(label, column, what)) is None else bootstrap(v).text(scale)

    def gap(reference: str) -> Callable[[str, str], str | None]:
        def less(label: str, column: str) -> str | None:
            one, other = values(label, column, "success"), values(reference, column, "success")
            same = one is not None and other is not None and one.shape == other.shape
            return bootstrap(one - other).text() if same else None  # type: ignore[operator]

        return less

    def gaps(method: str) -> tuple[str, ...]:
        reference = f"{method}, {max(chunks for chunks, _ in lines)} chunks"
        if reference not in labels:
            return ()
        others = [label for label in labels if label != reference and "base" not in label]
        return f"## Success less that of {reference}, in points", table(others, columns, gap(reference))

    columns, asked = [str(nfe) for nfe in budgets], first["asked"]
    title = f"# Long horizons: {first['maze'].title()}, chunks of {first['horizon']} rows, T = {asked['num_steps']}"
    what = f"{asked['pairs']} pairs, {asked['min_cells']} or more cells apart, {len({r['seed'] for r in done})} seeds."
    missing = ("## Way that is missing, % of a cell", table(list(labels), columns, cell("reward", 100.0)))
    rates = ("## Success by NFE", table(list(labels), columns, cell("success", 100.0)))
    return "\n\n".join([title, f"{EXPLAINED} {what}", *rates, *gaps(BASE), *gaps("fk"), *missing]) + "\n"


Report = reporting("long_horizon", KEY, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("long_horizon", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
