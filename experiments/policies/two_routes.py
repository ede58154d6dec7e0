"""A maze with two ways round a block, one of them closed since the demonstrations were made.

    #####      G goal, S start. Demonstrators went round on the left three times in four; today a door closes that way,
    #.G.#      and nothing that is observed says so: a policy learnt from them pushes against the door most of the time.
    #.#.#
    #.S.#
    #####

The point, its walls and its units are PointMaze's (`treesearch.rewards.trajectories`): observation (x, y, v_x, v_y),
action a force in [-1, 1]², held for `HOLD` simulation steps. A reward of 1 where the goal is reached ends the episode.
The maze is that of a diffusion policy with two modes, as in Steering Your Diffusion Policy with Latent Space
Reinforcement Learning (Wagenmaker et al., 2025).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

from treesearch.rewards.trajectories.dynamics import PointMass
from treesearch.rewards.trajectories.execution import pushed_out
from treesearch.rewards.trajectories.maze import Maze
from treesearch.rewards.trajectories.trajectory import RADIUS

OPEN = Maze(((1, 1, 1, 1, 1), (1, 0, 0, 0, 1), (1, 0, 1, 0, 1), (1, 0, 0, 0, 1), (1, 1, 1, 1, 1)))
CLOSED = Maze(((1, 1, 1, 1, 1), (1, 0, 0, 0, 1), (1, 1, 1, 0, 1), (1, 0, 0, 0, 1), (1, 1, 1, 1, 1)))
START, GOAL = (0.0, -1.0), (0.0, 1.0)
CORNERS = ((1.0, -1.0), (1.0, 1.0))  # of the way round on the right; the other one mirrors them
LEFT = 0.75  # share of demonstrations that go round on the left
HOLD, HISTORY, CHUNK = 4, 2, 8
LIMIT = 120  # actions of an episode
NEAR = (0.1, 0.1)  # how far from START demonstrations begin at most, along and across


class Points:
    """n points in the maze, all moved at once.

    Args:
        maze: its walls.
        seed: of the starts.
        spread: how far from START they are at most, along and across.
    """

    def __init__(self, maze: Maze = CLOSED, seed: int = 0, spread: tuple[float, float] = NEAR) -> None:
        self.maze, self.spread = maze, spread
        self.step_of, self.rng = PointMass(), torch.Generator().manual_seed(seed)

    def reset(self, n: int) -> Tensor:
        """n points at rest near the start, (n, 4) float64."""
        near = 2 * torch.rand(n, 2, generator=self.rng, dtype=torch.float64) - 1
        near *= near.new_tensor(self.spread)
        self.state = torch.cat([torch.tensor(START, dtype=torch.float64) + near, torch.zeros_like(near)], 1)
        self.arrived = torch.zeros(n, dtype=torch.bool)
        return self.state

    def step(self, actions: Tensor) -> Tensor:
        """One action (n, 2) of every point; those at the goal stay as they are. Returns observations (n, 4)."""
        state, goal = self.state, self.state.new_tensor(GOAL)
        for _ in range(HOLD):
            moved = pushed_out(self.maze, self.step_of(state, actions.to(state)))
            state = torch.where(self.arrived[:, None], state, moved)
            self.arrived |= (state[:, :2] - goal).norm(dim=1) <= RADIUS
        self.state = state
        return state


class TwoRoutes(gymnasium.Env[np.ndarray, np.ndarray]):
    """One point with the way on the left closed, as a gymnasium environment; an episode has 120 actions at most."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, maze: Maze = CLOSED, spread: tuple[float, float] = NEAR) -> None:
        self.points, self.made = Points(maze, spread=spread), 0

    @property
    def fingerprint(self) -> str:
        """What tells it from others of its class."""
        return f"{self.points.maze.walls} {self.points.spread}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed, options=options)
        if seed is not None:
            self.points.rng.manual_seed(seed)
        self.made = 0
        return self.points.reset(1)[0].float().numpy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        seen = self.points.step(torch.as_tensor(action)[None])[0].float().numpy()
        self.made += 1
        done = bool(self.points.arrived[0])
        return seen, float(done), done, self.made >= LIMIT, {"is_success": done}


def two_routes(spread: tuple[float, float] = NEAR) -> gymnasium.Env[np.ndarray, np.ndarray]:
    """The environment with the history that the shipped policy is told, (HISTORY, 4)."""
    return gymnasium.wrappers.FrameStackObservation(TwoRoutes(spread=spread), HISTORY)


class Demonstrations(NamedTuple):
    """Chunks of actions and what was observed before them."""

    seen: Tensor  # (n, HISTORY, 4)
    chunks: Tensor  # (n, CHUNK, 2)


def demonstrate(n: int, seed: int) -> Demonstrations:
    """n walks from start to goal with both ways open, by a controller with random gains and correlated noise."""
    points, rng = Points(OPEN, seed), torch.Generator().manual_seed(seed + 1)
    side = torch.where(torch.rand(n, generator=rng) < LEFT, -1.0, 1.0).double()
    ways = torch.tensor([*CORNERS, GOAL], dtype=torch.float64).repeat(n, 1, 1)
    ways[..., 0] *= side[:, None]
    gain, noise = 4 + 4 * torch.rand(n, 1, generator=rng).double(), torch.zeros(n, 2, dtype=torch.float64)
    at, done = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    seen, made = [points.reset(n)], []
    for _ in range(LIMIT):
        state = seen[-1]
        target = ways[torch.arange(n), at]
        at = torch.where((target - state[:, :2]).norm(dim=1) < 0.35, (at + 1).clamp_max(2), at)
        noise = 0.8 * noise + 0.15 * torch.randn(n, 2, generator=rng).double()
        push = gain * (ways[torch.arange(n), at] - state[:, :2]) - 2.5 * state[:, 2:] + noise
        made.append(push.clamp(-1, 1))
        done += ~points.arrived
        seen.append(points.step(made[-1]))
    return _chunks(torch.stack(seen, 1), torch.stack(made, 1), done)


def _chunks(seen: Tensor, made: Tensor, done: Tensor) -> Demonstrations:
    """Every chunk that begins before the goal; after it a walk goes on hovering there."""
    first = torch.cat([seen[:, :1], seen], 1)  # the history of the start is the start twice
    rows, chunks = [], []
    for step in range(made.shape[1] - CHUNK):
        live = step < done
        rows.append(first[live, step : step + HISTORY])
        chunks.append(made[live, step : step + CHUNK])
    return Demonstrations(torch.cat(rows).float(), torch.cat(chunks).float())
