"""Episodes in the two-route maze, many at a time: what a policy that acts by chunks earns there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.policies.two_routes import CHUNK, CLOSED, HISTORY, LIMIT, NEAR, Points
from treesearch.backends.models.policy import PolicyKernel
from treesearch.policies.frozen import FrozenPolicy
from treesearch.rewards.trajectories.maze import Maze

Actor = Callable[[Tensor, list[bool]], Tensor]
"""(observation histories (n, HISTORY · 4), which rows count) -> chunks of actions (n, k, 2)."""


class Episodes(NamedTuple):
    """What became of n episodes."""

    success: Tensor  # (n,) float64, 1 where the goal was reached
    returns: Tensor  # (n,) float64, GAMMA ** actions until then
    paths: Tensor  # (n, actions + 1, 2)


GAMMA = 0.99


def play(actor: Actor, n: int, seed: int, maze: Maze = CLOSED, spread: tuple[float, float] = NEAR) -> Episodes:
    """n episodes side by side, a decision of the actor for every chunk."""
    points = Points(maze, seed, spread)
    frames = [points.reset(n)] * HISTORY
    paths, taken, made = [frames[-1][:, :2]], torch.zeros(n, dtype=torch.float64), 0
    while made < LIMIT and not points.arrived.all():
        chunk = actor(torch.cat(frames[-HISTORY:], 1).float(), (~points.arrived).tolist())
        for action in chunk.unbind(1):
            taken += ~points.arrived
            frames.append(points.step(action.clamp(-1, 1)))
            paths.append(frames[-1][:, :2])
        made += CHUNK
    hits = points.arrived.double()
    return Episodes(hits, hits * GAMMA**taken, torch.stack(paths, 1))


def base_actor(kernel: PolicyKernel, seed: int) -> Actor:
    """The frozen policy itself: w from N(0, I)."""
    frozen, rng = FrozenPolicy(kernel), torch.Generator().manual_seed(seed)

    def act(seen: Tensor, active: list[bool]) -> Tensor:
        del active
        return frozen.actions(seen, torch.randn(len(seen), frozen.size, generator=rng))

    return act
