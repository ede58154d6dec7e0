"""How good a maze model is without a search: plans of held-out pairs, executed open loop.

    success = share of plans that bring the point within RADIUS of its goal when they are tracked

by length of the shortest route, with walls that plans cross, their dynamics error and what an evaluation costs. The
interval is over pairs: plans of one pair are not independent.

    python -m experiments.planning.evaluate_trajectory --maze medium
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import treesearch as ts
from experiments.planning.pointmaze import Array, Pair, Tracking, execute, held_out_pairs
from treesearch.backends.models.trajectory import TrajectoryKernel, trajectory_kernel
from treesearch.rewards.analytic import constant
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import known
from treesearch.rewards.trajectories.dynamics import dynamics_consistency
from treesearch.rewards.trajectories.maze import wall_collision

BANDS = ((2, 4), (5, 7), (8, 10), (11, 14), (15, 99))


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the evaluation."""

    maze: str = "medium"
    weights: Path = Path("backends/weights/maze_medium.safetensors")
    out: Path = Path("runs/results/trajectory/figures.json")
    """Gets or replaces the entry of this maze and number of steps."""
    pairs: int = 60
    plans: int = 16
    """Plans a pair."""
    num_steps: int = 20
    horizon: int | None = None
    seed: int = 1


def sample(kernel: TrajectoryKernel, pairs: Sequence[Pair], plans: int, seed: int) -> tuple[torch.Tensor, float]:
    """Unsearched plans (pairs, plans, H, C) in data units, and evaluations a second."""
    prompts = [known([*pair.start, 0.0, 0.0], pair.goal) for pair in pairs]
    start = time.process_time()
    run = ts.search(kernel, constant(0.0), ts.BestOfN(n=plans), prompts=prompts, seed=seed, batch_size=128)
    return torch.stack([task.samples for task in run.tasks]), run.cost.nfe / (time.process_time() - start)


def successes(maze: str, pairs: Sequence[Pair], plans: torch.Tensor, stride: int) -> Array:
    """Which of plans (pairs, plans, H, C) reach their goal, bool (pairs, plans)."""
    starts, goals = (np.array([getattr(pair, name) for pair in pairs]) for name in ("start", "goal"))
    runs = [execute(maze, starts, goals, column.numpy(), Tracking(stride=stride)) for column in plans.unbind(1)]
    return np.stack([run.success for run in runs], 1)


def figures(args: Args) -> dict[str, Any]:
    """Everything that the table has."""
    kernel = trajectory_kernel(args.weights, args.num_steps, horizon=args.horizon)
    stride = kernel.card.stride if kernel.card else 1
    pairs = held_out_pairs(args.maze, args.pairs, args.seed)
    plans, rate = sample(kernel, pairs, args.plans, args.seed)
    reached, cells = successes(args.maze, pairs, plans, stride), np.array([pair.cells for pair in pairs])
    flat = plans.flatten(0, 1)
    return {
        "maze": args.maze,
        "num_steps": args.num_steps,
        "horizon": kernel.horizon,
        "stride": stride,
        "pairs": args.pairs,
        "plans_a_pair": args.plans,
        "success": interval(reached.mean(1)),
        "success_by_cells": {
            f"{low}-{high}": {"pairs": int(band.sum()), "success": round(float(reached[band].mean()), 3)}
            for low, high in BANDS
            if (band := (cells >= low) & (cells <= high)).any()
        },
        "pairs_solved_by_some_plan": round(float(reached.any(1).mean()), 3),
        "rows_in_walls": _mean(wall_collision(args.maze, kernel.channels), flat),
        "dynamics_error": _mean(dynamics_consistency(kernel.channels, stride), flat),
        "nfe_per_cpu_second": round(rate),
    }


def interval(values: Array) -> list[float]:
    """Mean and the ends of its 95 % interval over independent values (n,)."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [round(v, 3) for v in (mean, mean - half, mean + half)]


def _mean(cost: Reward, plans: torch.Tensor) -> float:
    return round(-float(cost(plans).mean()), 3)


def main(args: Args) -> None:
    """Write the figures beside those of other mazes."""
    found = figures(args)
    known_ones = json.loads(args.out.read_text()) if args.out.exists() else []
    key = ("maze", "num_steps", "horizon")
    kept = [row for row in known_ones if any(row[k] != found[k] for k in key)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(sorted([*kept, found], key=lambda row: [row[k] for k in key]), indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
