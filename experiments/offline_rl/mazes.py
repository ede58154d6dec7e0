"""Mazes: walks between random goals, rewarded as if all had been to one, which a learner has to reach from anywhere.

    r = exp(-|p' - goal|)     p' the position that a decision leads to; a decision holds its force for STRIDE steps

Data are of the scripted behaviour of `experiments.planning.pointmaze`: from a start at rest it walks to a goal, hovers
there, walks to another. Whose goals they were is not told; rewards are of one fixed goal, D4RL's cell of each maze.
Episodes last as long as D4RL's, 300 and 600 steps of the simulation, and none ends early.

The reward is D4RL's dense one: of its sparse one, 1 within half a cell, TD3+BC learns nothing in the 2,000 gradient
steps of a study. The distance is Euclidean as D4RL's, so that who looks at the next reward only is caught at a wall;
one along the way would lead round it, and leave less to learn. Forces last four steps, as in the shipped models of
mazes: the goal is then tens of decisions away instead of hundreds, which targets that move so few times can tell.

Returns are normalised by those of uniformly random forces, 0, and of the behaviour's own controller without noise on
the shortest way to the goal, 100, as `python -m experiments.offline_rl references` measures them.

Source: D4RL: Datasets for Deep Data-Driven Reinforcement Learning (Fu et al., 2020), section 5, Maze2D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.offline_rl.tasks import Policy, Task, returns_of
from experiments.planning import pointmaze
from experiments.planning.locomotion import Array, Data
from experiments.planning.pointmaze import Cell, Controller, Trip, costs_to, free_cells, spot
from treesearch.rewards.trajectories.maze import Maze

STRIDE = 4  # simulation steps of a decision
LEAVES = 0.1  # chance that a decision at its goal is the last one there
FIRST_STATES = 6_000_000  # seeds of the reference returns


@dataclass(frozen=True, kw_only=True)
class MazeTask(Task):
    """A maze and the cell whose centre is the goal."""

    goal: Cell

    @cached_property
    def walls(self) -> Maze:
        return Maze.of(self.maze)

    def make(self) -> Walk:
        return Walk(self)

    def place(self, env: Walk, observation: Array) -> None:
        env.point.set_state(observation[:2], observation[2:])

    def rewards(self, observations: Array) -> Array:
        """Rewards (n,) of decisions by the observations (n, 4) that they lead to."""
        gaps = np.asarray(observations, np.float64)[:, :2] - self.walls.cell_to_xy(self.goal)
        return np.exp(-np.linalg.norm(gaps, axis=1))

    def data(self, agents: Path, steps: int, limit: int) -> Data:
        env, rng, rows = self.make(), np.random.default_rng(0), []
        while len(rows) < steps:
            rows += self._episode(env, rng, limit)
        seen, actions, after = (np.array(column, np.float32) for column in zip(*rows, strict=True))
        last = np.arange(1, len(rows) + 1) % limit == 0
        return Data(seen, actions, self.rewards(after).astype(np.float32), np.zeros_like(last), last, after)

    def _episode(self, env: Walk, rng: np.random.Generator, limit: int) -> Iterator[tuple[Array, Array, Array]]:
        """Decisions (s, a, s'), whatever they are worth."""
        seen, _ = env.reset(seed=int(rng.integers(2**31)))
        trip = Trip(self.walls, seen[:2], rng)
        for _ in range(limit):
            action = trip.act(seen)
            after, *_ = env.step(action)
            yield seen, action, after
            seen = after
            if trip.arrived and rng.random() < LEAVES:
                trip = Trip(self.walls, seen[:2], rng)

    def scripted(self) -> Policy:
        """The controller on its shortest way to the goal, without noise."""
        centre = np.array(self.walls.cell_to_xy(self.goal))
        controller = Controller(self.walls, centre, costs_to(self.walls, self.goal))
        return lambda seen: torch.from_numpy(np.array([controller.push(s) for s in seen.double().numpy()]))


class Walk:
    """PointMaze with one goal: observations (x, y, v_x, v_y), actions (f_x, f_y) in [-1, 1], STRIDE steps each.

    Args:
        task: whose maze and goal it has.
    """

    def __init__(self, task: MazeTask) -> None:
        env = pointmaze.make(task.maze)
        env.reset(seed=0)
        self.task, self.point = task, env.point_env
        self.observation_space, self.action_space = self.point.observation_space, self.point.action_space

    def reset(self, *, seed: int) -> tuple[Array, dict[str, Any]]:
        """At rest, about the centre of a cell that is not the goal's; all of it drawn by the seed."""
        rng, walls = np.random.default_rng(seed), self.task.walls
        cells = [cell for cell in free_cells(walls) if cell != self.task.goal]
        start = np.array(spot(walls, cells[rng.integers(len(cells))], rng))
        self.point.set_state(start, np.zeros(2))
        return np.concatenate([start, np.zeros(2)]), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Hold a force (2,), clipped to [-1, 1]: observation (4,), reward, and that nothing ends."""
        for _ in range(STRIDE):
            seen, *_ = self.point.step(action)
        return seen, float(self.task.rewards(seen[None])[0]), False, False, {}


TASKS = {
    "maze-umaze": MazeTask(
        environment="PointMaze_UMaze-v3", maze="umaze", goal=(1, 1), limit=75, random=13.4406, expert=59.8402
    ),
    "maze-medium": MazeTask(
        environment="PointMaze_Medium-v3", maze="medium", goal=(6, 6), limit=150, random=11.2132, expert=118.5886
    ),
}


def uniform(seed: int) -> Policy:
    """Forces (n, 2) drawn uniformly from [-1, 1]²."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(seen: Tensor) -> Tensor:
        return 2 * torch.rand(len(seen), 2, generator=rng) - 1

    return drawn


@dataclass(frozen=True, kw_only=True)
class References:
    """Mean returns of random forces and of the controller, from the same first states: what a maze's scores go by."""

    episodes: int = 200
    """first states, 2 or more"""

    def run(self) -> int:
        """Print them; the exit code."""
        if self.episodes < 2:
            raise ValueError(f"episodes is {self.episodes}, expected 2 or more")
        seeds = [FIRST_STATES + i for i in range(self.episodes)]
        for env, task in TASKS.items():
            for name, policy in (("random", uniform(0)), ("expert", task.scripted())):
                found = returns_of(task, policy, seeds, task.limit)
                error = found.std(ddof=1) / len(found) ** 0.5
                print(f"{env} {name} {found.mean():.4f} ± {error:.4f}", flush=True)
        return 0
