"""Planning in PointMaze: success and NFE per decision of every method, on pairs that the base sampler finds hard.

    python -m experiments.planning.evidence run --maze medium
    python -m experiments.planning.evidence report

Pairs are (start, goal) in held-out pairs of cells, `min_cells` or more apart. Before anything is compared, ten plans of
the base sampler are carried out for each, with seeds of their own: it must arrive on 20 to 60 %, or horizon and
distance have to change. A third of the pairs, with ordered pairs of cells of their own, is for choosing settings, the
others for the figures. Pairs and rates are a row.

A cell plans for all pairs at once and makes the planned actions in the environment, open loop: what `Planner.act`
returns. An error early in a plan is carried to its end, so that most plans that look sound do not arrive.

    whole      one decision, carried out to its end: what a plan is worth
    receding   a decision every `steps` rows, cold or warm-started; until arrival or `decisions` of them

Budgets are in rollouts, n·T NFE for each decision and environment. Settings are chosen among at most four by mean
success at 16 rollouts on the tuning pairs, ties by mean reward. Intervals are of the percentile bootstrap over pairs;
those of the same ordered pair of cells go together. Rewards, by name:

    execution   `maze_execution`: does it arrive, carried out in a model of the maze? A verifier that knows the maze
    plan        `maze_plan`: does it look sound? Rows in walls, dynamics error, goal missed

Best-of-N by Q ranks by a critic learnt from the data in hindsight instead (`experiments.planning.plan_critic`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.planning import report as planning_report
from experiments.planning.episodes import base_rates, play
from experiments.planning.methods import METHODS, Bed, Task, bed_of
from experiments.planning.pointmaze import Pair, held_out_pairs
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.grids import How, check_names, first_best
from experiments.shared.sweep import FAILURES, Sweep, check_seeds, command_line, tuned
from treesearch.rewards.trajectories.maze import Maze

CHOICE_SEED = 7_000_000  # pairs, and the base sampler's plans for them
LOW, HIGH = 0.2, 0.6  # of the base sampler, over all pairs
TUNED_AT = 16
KEY = ("kind", "maze", "horizon", "by", "split", "method", "settings", "rollouts", "warm", "seed")


# pairs


def choose_pairs(task: Task, bed: Bed, run: Run) -> Row:
    """The pairs of both splits and the base sampler's rates on them, as a row.

    Raises:
        ValueError: the base sampler succeeds too rarely or too often for a comparison.
    """
    pool = held_out_pairs(bed.maze, run.pairs, CHOICE_SEED, min_cells=run.min_cells)
    rates = base_rates(bed, pool, CHOICE_SEED, run.batch_size)
    if not LOW <= (mean := float(np.mean(rates))) <= HIGH:
        advice = "lower --min-cells or raise --horizon" if mean < LOW else "raise --min-cells or lower --horizon"
        raise ValueError(f"the base sampler arrives on {mean:.0%} of the pairs, not {LOW:.0%} to {HIGH:.0%}: {advice}")
    routes = [route_of(bed.maze, pair) for pair in pool]
    tuning = set(sorted(set(routes))[::3])
    split = {"tune": [i for i, route in enumerate(routes) if route in tuning]}
    split["test"] = [i for i, route in enumerate(routes) if route not in tuning]
    return {
        "kind": "pairs",
        **task.row,
        "rates": rates,
        "cells": [pair.cells for pair in pool],
        **{name: [pool[i] for i in rows] for name, rows in split.items()},
        "routes": [routes[i] for i in split["test"]],
        "fingerprint": bed.kernel.fingerprint,
    }


def route_of(maze: str, pair: Pair) -> str:
    """The cells of a pair: tasks that share them are alike."""
    return "-".join(f"{row},{col}" for row, col in map(Maze.of(maze).xy_to_cell, (pair.start, pair.goal)))


# cells


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    kind: str  # whole or receding
    task: Task
    split: str
    method: str
    settings: How
    rollouts: int
    warm: bool
    seed: int

    @property
    def row(self) -> Row:
        """Its identity."""
        return self.task.row | {name: getattr(self, name) for name in KEY if name not in self.task.row}


def played(job: Job, pairs: Sequence[Sequence[Any]], run: Run) -> Row:
    """A cell; one that fails says why."""
    began = time.perf_counter()
    how: dict[str, Any] = {} if job.kind == "whole" else {"steps": run.steps, "decisions": run.decisions}
    try:
        bed = bed_of(job.task, run.num_steps, run.weights, run.device)
        setup = METHODS[job.method].make(bed, **job.settings)
        done = play(
            bed, setup, pairs, rollouts=job.rollouts, seed=job.seed, warm=job.warm, batch_size=run.batch_size, **how
        )
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
    outcome, made = done.field.outcome(), done.planner.decisions
    planned = sum(sum(d.planned) for d in made)
    return job.row | {
        "success": outcome.success.astype(int).tolist(),
        "distance": outcome.distance.tolist(),
        "env_steps": outcome.steps.tolist(),
        "reward": done.rewards.tolist(),
        "nfe": sum(d.nfe for d in made) / planned,
        "planning_seconds": sum(d.seconds for d in made) / planned,
        "decisions": planned / len(pairs),
        "seconds": time.perf_counter() - began,
        **where_it_ran(),
    }


def score(row: Row) -> tuple[float, float] | None:
    """Success, then reward; None for a cell that failed."""
    return None if "error" in row else (float(np.mean(row["success"])), float(np.mean(row["reward"])))


def chosen(task: Task, method: str, cells: Cells, run: Run) -> Row:
    """The settings of the highest score on the tuning pairs, the first of equals."""
    scores: list[list[float] | None] = []
    for how in METHODS[method].grid:
        rows = cells.where(kind="whole", split="tune", method=method, settings=how, **task.row)
        known = [found for row in rows if row["seed"] in run.tuning_seeds and (found := score(row)) is not None]
        scores.append(np.mean(known, 0).tolist() if known else None)
    grid = METHODS[method].grid
    each = [{"settings": how, "score": found} for how, found in zip(grid, scores, strict=True)]
    return {"picked": grid[first_best(scores, max)], "grid": each}


# the command


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    maze: tuple[str, ...] = ("medium",)
    """medium, large or umaze; models other than medium's must be trained first"""
    horizon: int | None = 48
    """rows of a plan, a multiple of 8: 48 are 192 steps in Medium; None for the model's own"""
    reward: str = "execution"
    """execution or plan"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    rollouts: tuple[int, ...] = (4, 16, 64)
    """budgets of a decision"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the figures"""
    tuning_seeds: tuple[int, ...] = (100,)
    """of the choice of settings"""
    receding: tuple[str, ...] = ("best_of_n", "dts_star")
    """methods that also replan, cold and warm"""
    receding_rollouts: tuple[int, ...] = (2, 4, 8, 16)
    """budgets of a decision when replanning"""
    steps: int = 8
    """rows executed before the next decision"""
    decisions: int = 12
    """most decisions of an episode"""
    pairs: int = 120
    """how many, a third of them for tuning"""
    min_cells: int = 5
    """shortest route of a pair"""
    num_steps: int = 10
    """T of the chain"""
    weights: Path | None = None
    """a model that is not shipped, for a single maze"""
    batch_size: int = 256
    """rows of a forward pass"""
    device: str = "cpu"
    """of the model; plans are executed on the CPU"""
    out: Path = Path("runs/results/planning.jsonl")
    """row file"""

    def run(self) -> int:
        """Run the cells; the exit code."""
        check_seeds(self.seeds, self.tuning_seeds)
        if self.weights is not None and len(self.maze) != 1:
            raise ValueError(f"weights are for one maze, got {', '.join(self.maze)}")
        check_names("method", (*self.methods, *self.receding), METHODS)
        with locked(self.out.parent / f".{self.out.stem}"):
            cells = Cells(self.out, KEY, self.asked)
            for maze in self.maze:
                self._task(Task(maze, self.horizon, self.reward), cells)
        return 0

    @property
    def asked(self) -> Row:
        """What all rows share."""
        receding = {"steps": self.steps, "decisions": self.decisions}
        return {"pairs": self.pairs, "min_cells": self.min_cells, "num_steps": self.num_steps, "receding": receding}

    def _task(self, task: Task, cells: Cells) -> None:
        if not cells.where(kind="pairs", **task.row):
            same = cells.where(kind="pairs", maze=task.maze, horizon=task.horizon)
            bed = bed_of(task, self.num_steps, self.weights, self.device)
            if same and same[0]["fingerprint"] == bed.kernel.fingerprint:  # the base sampler knows no reward
                cells.add(same[0] | task.row)
            else:
                cells.add(choose_pairs(task, bed, self) | where_it_ran())
        found = cells.where(kind="pairs", **task.row)[0]
        print(f"{task}: {len(found['test'])} pairs, {len(found['tune'])} for tuning", flush=True)

        def words(row: Row) -> str:
            return f"{np.mean(row['success']):.0%}, {row['nfe']:,.0f} NFE"

        every: Sweep[Job] = Sweep(cells, lambda job: played(job, found[job.split], self), words)
        every.fill(self._tuning(task))
        picked = {name: METHODS[name].grid[0] for name in (*self.methods, *self.receding)}
        for name in dict.fromkeys(name for name, _ in tuned(self.methods, METHODS)):
            every.choice(task.row | {"method": name}, partial(chosen, task, name, cells, self))
        picked |= {row["method"]: row["picked"] for row in cells.where(kind="choice", **task.row)}
        every.fill(self._figures(task, picked))

    def _tuning(self, task: Task) -> Iterator[Job]:
        for (method, how), seed in product(tuned(self.methods, METHODS), self.tuning_seeds):
            yield Job("whole", task, "tune", method, how, TUNED_AT, False, seed)

    def _figures(self, task: Task, picked: dict[str, How]) -> Iterator[Job]:
        for seed, method in product(self.seeds, self.methods):
            for rollouts in METHODS[method].budgets or self.rollouts:
                yield Job("whole", task, "test", method, picked[method], rollouts, False, seed)
        for seed, method, rollouts, warm in product(self.seeds, self.receding, self.receding_rollouts, (False, True)):
            yield Job("receding", task, "test", method, picked[method], rollouts, warm, seed)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and a figure from the rows."""

    out: Path = Path("runs/results/planning.jsonl")
    """row file"""
    to: Path = Path("runs/results/planning.md")
    """the tables; the figure stands beside them"""

    def run(self) -> int:
        """Write the report; the exit code."""
        print(planning_report.write(self.out, self.to, tuple(METHODS)))
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("planning", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
