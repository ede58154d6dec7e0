"""Plans that are carried out: what became of the environments, and what their planner decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import treesearch as ts
from experiments.planning.methods import Bed, Setup
from experiments.planning.pointmaze import Field, Pair
from treesearch.planning.planner import Planner

TRIALS = 10  # plans of the base sampler for a pair
ARRIVES = 0.0  # `maze_execution` of a plan that arrives


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


def base_rates(bed: Bed, pairs: Sequence[Pair], seed: int, batch_size: int) -> list[float]:
    """Share of the base sampler's plans that arrive, by pair."""
    prompts = [{"start": [*pair.start, 0.0, 0.0], "goal": list(pair.goal)} for pair in pairs]
    found = ts.search(bed.kernel, bed.reward, ts.BestOfN(n=TRIALS), prompts=prompts, seed=seed, batch_size=batch_size)
    starts, goals = (np.repeat([pair[i] for pair in pairs], TRIALS, 0) for i in range(2))
    field = Field(bed.maze, starts, goals, bed.control)
    field.run(torch.cat([task.samples for task in found.tasks]).cpu().numpy())
    return field.outcome().success.reshape(-1, TRIALS).mean(1).tolist()
