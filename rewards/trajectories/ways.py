"""How far it is to walk to a goal in a maze.

    w(p) = |p - goal|  in the goal's cell;   w(p) = min over neighbours q in the open of w(q) + |p - q|  elsewhere

on a grid of NODES × NODES nodes a cell with eight neighbours each, bilinear in between: at least the straight line, and
at most sec(π/8) = 1.083 times the shortest way, and up to an eighth more for each corner on it and for the goal. Unlike
the straight line it tells a plan that is round the corner from one that is stuck behind a wall.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from treesearch.rewards.trajectories.maze import Maze
from treesearch.rewards.trajectories.trajectory import distance

NODES = 8
_STEPS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def way(maze: Maze, points: Tensor, goal: Sequence[float]) -> Tensor:
    """Length (...) of the shortest way from floating points (..., 2) to a goal; differentiable where it is finite.

    Points in walls or outside the map count from the nearest open place, with the way to it. Where no way leads to the
    goal it is inf.

    Raises:
        Unreachable: the goal lies in a wall.
    """
    table = _table(maze, (float(goal[0]), float(goal[1]))).to(points)
    rows, cols = maze.shape
    at = torch.stack([rows / 2 - points[..., 1], points[..., 0] + cols / 2], -1) * NODES - 0.5
    inside = torch.stack([at[..., i].clamp(0, side - 1) for i, side in enumerate(table.shape)], -1)
    low = inside.detach().floor().long()
    share = inside - low
    total, weights = torch.zeros_like(at[..., 0]), torch.zeros_like(at[..., 0])
    for i in (0, 1):
        for j in (0, 1):
            row, col = ((low[..., k] + step).clamp(max=table.shape[k] - 1) for k, step in ((0, i), (1, j)))
            weight = (share[..., 0] if i else 1 - share[..., 0]) * (share[..., 1] if j else 1 - share[..., 1])
            length = table[row, col]
            weight = torch.where(length.isfinite(), weight, 0.0)  # beyond two walls that touch
            total, weights = total + weight * length.nan_to_num(posinf=0.0), weights + weight
    known = weights > 0
    total = torch.where(known, total / torch.where(known, weights, 1.0), math.inf)
    total = total + distance(at - inside) / NODES
    return torch.maximum(total, distance(points - points.new_tensor(goal[:2])))


@functools.lru_cache(maxsize=1024)
def _table(maze: Maze, goal: tuple[float, float]) -> Tensor:
    """w at the nodes (rows · NODES, cols · NODES), row 0 at the top; in walls by the nearest nodes in the open."""
    maze.route(goal, goal)  # it is in the open
    rows, cols = maze.shape
    open_ = ~torch.tensor(maze.walls, dtype=torch.bool, device="cpu").repeat_interleave(NODES, 0).repeat_interleave(
        NODES, 1
    )
    y = rows / 2 - (torch.arange(rows * NODES, dtype=torch.float64, device="cpu") + 0.5) / NODES
    x = (torch.arange(cols * NODES, dtype=torch.float64, device="cpu") + 0.5) / NODES - cols / 2
    row, col = maze.xy_to_cell(goal)
    here = torch.zeros_like(open_)
    here[row * NODES : (row + 1) * NODES, col * NODES : (col + 1) * NODES] = True
    straight = torch.hypot(x - goal[0], y[:, None] - goal[1])
    w = torch.where(here, straight, math.inf)
    while True:
        found = torch.where(open_, torch.minimum(w, _nearest(w, open_)), math.inf)
        if torch.equal(found, w):
            break
        w = found
    while True:  # walls, outwards from the open
        found = torch.where(open_ | w.isfinite(), w, _nearest(w, torch.ones_like(open_)))
        if torch.equal(found, w):
            return w
        w = found


def _nearest(w: Tensor, open_: Tensor) -> Tensor:
    """The least of the neighbours' lengths with the step to them; no step passes between two walls."""
    lengths, free = _Shifted(w, math.inf), _Shifted(open_, False)
    around = []
    for i, j in _STEPS:
        found = lengths.at(i, j) + math.hypot(i, j) / NODES
        around.append(torch.where(free.at(i, 0) & free.at(0, j), found, math.inf) if i and j else found)
    return torch.stack(around).amin(0)


class _Shifted:
    """A table (rows, cols) seen from its neighbours."""

    def __init__(self, table: Tensor, outside: float) -> None:
        self.shape = table.shape
        self.padded = torch.nn.functional.pad(table, (1, 1, 1, 1), value=outside)

    def at(self, i: int, j: int) -> Tensor:
        rows, cols = self.shape
        return self.padded[1 + i : 1 + i + rows, 1 + j : 1 + j + cols]
