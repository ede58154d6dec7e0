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

Sources: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), algorithm 1, the guided
rule; Monte Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), guidance scales as actions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import treesearch as ts
from experiments.planning import report as planning_report
from experiments.planning.plan_critic import critic_reward
from experiments.planning.pointmaze import Acting, Field, Pair, held_out_pairs
from experiments.shared.evidence import Cells, Row, check_seeds, command_line, locked, where_it_ran
from experiments.shared.grids import How, pick
from treesearch.backends.guidance.diffuser import Diffuser
from treesearch.backends.models.trajectory import maze_kernel, trajectory_kernel
from treesearch.backends.wrappers.scales import GuidanceScales
from treesearch.errors import TreeSearchError
from treesearch.methods.base import spaced_levels
from treesearch.planning.planner import Planner
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.execution import maze_execution
from treesearch.rewards.trajectories.maze import Maze, maze_plan

CHOICE_SEED = 7_000_000  # pairs, and the base sampler's plans for them
TRIALS = 10
LOW, HIGH = 0.2, 0.6  # of the base sampler, over all pairs
NARROW: How = {"widening_c": 1.0, "widening_alpha": 0.5}
DYNAMICS = 3.0  # weight of the dynamics error in `maze_plan`
ARRIVES = 0.0  # `maze_execution` of a plan that arrives
REACH = 0.35  # at which `maze_execution` counts a goal as reached: a margin for what its model of the maze gets wrong
SCALES = (0.0, 0.5, 1.0, 2.0)
TUNED_AT = 16
KEY = ("kind", "maze", "horizon", "by", "split", "method", "settings", "rollouts", "warm", "seed")
FAILURES = (TreeSearchError, ArithmeticError, ValueError)


@dataclass(frozen=True)
class Task:
    """What is asked of the planners.

    Args:
        maze: its name.
        horizon: rows of a plan; None for the longest that the model was trained with.
        reward: "execution" (does it arrive in a model of the maze?) or "plan" (does it look sound?).
    """

    maze: str
    horizon: int | None
    reward: str

    @property
    def row(self) -> Row:
        """Its identity."""
        return {"maze": self.maze, "horizon": self.horizon, "by": self.reward}


class Bed(NamedTuple):
    """A maze with its model."""

    maze: str
    kernel: Any
    reward: Reward
    control: Acting


class Setup(NamedTuple):
    """What plans."""

    kernel: Any
    reward: Reward
    method: Any


Make = Callable[..., Setup]


@dataclass(frozen=True)
class Entry:
    """A method: a bed and settings -> what plans, and at most four settings."""

    make: Make
    grid: tuple[How, ...] = ({},)
    budgets: tuple[int, ...] | None = None  # in rollouts; None for all


# methods


def plain(method: Callable[..., Any], bed: Bed, **how: Any) -> Setup:
    """A method of treesearch on the bare chain."""
    return Setup(bed.kernel, bed.reward, method(**how))


def value_guided(bed: Bed, **how: Any) -> Setup:
    """Diffuser's rule; the best of as many guided samples as the budget allows."""
    return Setup(Diffuser(bed.kernel, bed.reward, **how), bed.reward, ts.BestOfN())


def over_scales(bed: Bed, scale: float) -> Setup:
    """UCT over guidance scales: multiples of Diffuser's rule, drawn anew where the tree branches."""
    levels = spaced_levels(bed.kernel.num_steps, 5, top=True)
    kernel = GuidanceScales(
        Diffuser(bed.kernel, bed.reward, scale=scale), SCALES, tuple(t for t in levels if t < bed.kernel.num_steps)
    )
    return Setup(kernel, bed.reward, ts.DiffusionTreeSearch(**NARROW, branch_at=levels, wave=1))


def by_critic(bed: Bed, **how: Any) -> Setup:
    """Best-of-N by Q."""
    return Setup(bed.kernel, critic_reward(bed.maze, bed.kernel.channels, bed.control.stride, **how), ts.BestOfN())


GUIDES: tuple[How, ...] = ({"scale": 0.01}, {"scale": 0.1}, {"scale": 1.0}, {"scale": 10.0})
METHODS: dict[str, Entry] = {
    "base": Entry(partial(plain, partial(ts.BestOfN, n=1)), budgets=(1,)),
    "best_of_n": Entry(partial(plain, ts.BestOfN)),
    "fk": Entry(
        partial(plain, ts.FeynmanKac), ({"lam": 3.0}, {"lam": 10.0}, {"lam": 30.0}, {"lam": 10.0, "potential": "max"})
    ),
    "dts_star": Entry(
        partial(plain, partial(ts.DiffusionTreeSearch, wave=1)),
        (NARROW, NARROW | {"c_uct": 0.3}, NARROW | {"backup": "max"}, NARROW | {"branch_at": [8, 6, 4, 2]}),
    ),
    "tree_search": Entry(partial(plain, partial(ts.TreeSearch, wave=1))),
    "diffuser": Entry(value_guided, GUIDES, budgets=(4, 16)),
    "guidance_scales": Entry(over_scales, GUIDES, budgets=(4, 16)),
    "critic": Entry(by_critic, ({"row": None}, {"row": 0}), budgets=(4, 16)),
}


# beds and pairs


@cache
def bed_of(task: Task, num_steps: int, weights: Path | None = None, device: str = "cpu") -> Bed:
    """A maze with its model, shipped or from a file, read once."""
    make = maze_kernel if weights is None else trajectory_kernel
    kernel = make(weights or task.maze, num_steps, horizon=task.horizon, device=device)  # type: ignore[operator]
    if kernel.card is None:
        raise ValueError("the model has no card: expected one that experiments/planning/train_trajectory.py wrote")
    stride = kernel.card.stride
    return Bed(task.maze, kernel, reward_of(task, kernel.channels, stride), Acting(stride=stride))


def reward_of(task: Task, channels: Channels, stride: int) -> Reward:
    """The reward of a task."""
    if task.reward == "plan":
        return maze_plan(task.maze, channels, stride=stride, dynamics=DYNAMICS)
    if task.reward == "execution":
        return maze_execution(task.maze, channels, stride=stride, by="actions", radius=REACH)
    raise ValueError(f"unknown reward {task.reward!r}: choose execution or plan")


def base_rates(bed: Bed, pairs: Sequence[Pair], seed: int, batch_size: int) -> list[float]:
    """Share of the base sampler's plans that arrive, by pair."""
    prompts = [{"start": [*pair.start, 0.0, 0.0], "goal": list(pair.goal)} for pair in pairs]
    found = ts.search(bed.kernel, bed.reward, ts.BestOfN(n=TRIALS), prompts=prompts, seed=seed, batch_size=batch_size)
    starts, goals = (np.repeat([pair[i] for pair in pairs], TRIALS, 0) for i in range(2))
    field = Field(bed.maze, starts, goals, bed.control)
    field.run(torch.cat([task.samples for task in found.tasks]).cpu().numpy())
    return field.outcome().success.reshape(-1, TRIALS).mean(1).tolist()


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
        "asked": run.asked,
    }


def route_of(maze: str, pair: Pair) -> str:
    """The cells of a pair: tasks that share them are alike."""
    return "-".join(f"{row},{col}" for row, col in map(Maze.of(maze).xy_to_cell, (pair.start, pair.goal)))


# cells


@dataclass(frozen=True)
class Job:
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


class Episodes(NamedTuple):
    """What became of n environments, and the decisions of their planner."""

    field: Field
    planner: Planner
    rewards: np.ndarray  # (n,) of the first decision's plans


def play(
    bed: Bed,
    setup: Setup,
    pairs: Sequence[Sequence[Any]],
    *,
    rollouts: int,
    seed: int,
    steps: int | None = None,
    decisions: int = 1,
    warm: bool = False,
    batch_size: int = 64,
    watch: Callable[[Field, Planner], None] | None = None,
) -> Episodes:
    """Plan and execute from start to goal.

    Args:
        pairs: (start, goal, ...) each.
        rollouts: budget of a decision for one environment.
        steps: rows executed before the next decision; None for the whole plan.
        decisions: at most so many.
        watch: called after each decision, before it is executed.
    """
    starts, goals = (np.array([pair[i] for pair in pairs], float) for i in range(2))
    field = Field(bed.maze, starts, goals, bed.control)
    rows = bed.kernel.horizon - 1 if steps is None else steps
    budget = ts.Budget(nfe=rollouts * bed.kernel.num_steps)
    planner = Planner(
        setup.kernel,
        setup.reward,
        setup.method,
        budget=budget,
        steps=rows,
        warm_start=warm,
        enough=ARRIVES,  # of a plan that is started from, or executed again
        done=ARRIVES,
        patience=decisions + 1,
        seed=seed,
        batch_size=batch_size,
    )
    for _ in range(decisions):
        active = ~field.reached
        if not active.any():
            break
        planner.act_many(field.observations, goals, active.tolist())
        if watch is not None:
            watch(field, planner)
        field.run(planner.decision.plans.numpy(), rows)
    first = planner.decisions[0].rewards.numpy() if planner.decisions else np.full(len(pairs), math.nan)
    return Episodes(field, planner, first)


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
    """The settings of the highest score on the tuning pairs, as a row."""
    scores: list[list[float] | None] = []
    for how in METHODS[method].grid:
        rows = cells.where(kind="whole", split="tune", method=method, settings=how, **task.row)
        known = [found for row in rows if row["seed"] in run.tuning_seeds and (found := score(row)) is not None]
        scores.append(np.mean(known, 0).tolist() if known else None)
    best = max(range(len(scores)), key=lambda i: (scores[i] is not None, scores[i] or [], -i))
    grid = [{"settings": how, "score": found} for how, found in zip(METHODS[method].grid, scores, strict=True)]
    return {"kind": "choice", **task.row, "method": method, "picked": METHODS[method].grid[best], "grid": grid}


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
        for name in (*self.methods, *self.receding):
            pick("method", name, METHODS)
        with locked(self.out.parent / f".{self.out.stem}"):
            cells = Cells(self.out, KEY)
            for maze in self.maze:
                self._task(Task(maze, self.horizon, self.reward), cells)
        return 0

    @property
    def asked(self) -> dict[str, int]:
        """What all rows of a task share."""
        return {"pairs": self.pairs, "min_cells": self.min_cells, "num_steps": self.num_steps}

    def _task(self, task: Task, cells: Cells) -> None:
        if not cells.where(kind="pairs", **task.row):
            same = cells.where(kind="pairs", maze=task.maze, horizon=task.horizon)
            bed = bed_of(task, self.num_steps, self.weights, self.device)
            if same and same[0]["fingerprint"] == bed.kernel.fingerprint:  # the base sampler knows no reward
                cells.add(same[0] | task.row)
            else:
                cells.add(choose_pairs(task, bed, self) | where_it_ran())
        found = cells.where(kind="pairs", **task.row)[0]
        if found["asked"] != self.asked:
            raise ValueError(f"{self.out} has rows of {found['asked']}, not {self.asked}: name another file with --out")
        print(f"{task}: {len(found['test'])} pairs, {len(found['tune'])} for tuning", flush=True)
        for job in self._tuning(task):
            self._fill(job, found, cells)
        for method in self.methods:
            if len(METHODS[method].grid) > 1 and not cells.where(kind="choice", method=method, **task.row):
                cells.add(chosen(task, method, cells, self))
        for job in self._figures(task, cells):
            self._fill(job, found, cells)

    def _fill(self, job: Job, pairs: Row, cells: Cells) -> None:
        if job.row in cells:
            return
        row = played(job, pairs[job.split], self)
        cells.add(row)
        said = row.get("error") or f"{np.mean(row['success']):.0%}, {row['nfe']:,.0f} NFE, {row['seconds']:.0f} s"
        print(f"{job.kind} {job.split} {job.method} {job.settings} {job.rollouts} {job.seed}: {said}", flush=True)

    def _tuning(self, task: Task) -> Iterator[Job]:
        for method in self.methods:
            grid = METHODS[method].grid
            if len(grid) > 1:
                for how, seed in product(grid, self.tuning_seeds):
                    yield Job("whole", task, "tune", method, how, TUNED_AT, False, seed)

    def _figures(self, task: Task, cells: Cells) -> Iterator[Job]:
        def settings(method: str) -> How:
            picked = cells.where(kind="choice", method=method, **task.row)
            return picked[0]["picked"] if picked else METHODS[method].grid[0]

        for seed, method in product(self.seeds, self.methods):
            for rollouts in METHODS[method].budgets or self.rollouts:
                yield Job("whole", task, "test", method, settings(method), rollouts, False, seed)
        for seed, method, rollouts, warm in product(self.seeds, self.receding, self.receding_rollouts, (False, True)):
            yield Job("receding", task, "test", method, settings(method), rollouts, warm, seed)


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
