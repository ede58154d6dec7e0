"""Walls: how far a point is from them, which goals can be reached, and rewards of plans that keep clear of them.

    c(p) = d(p, walls) - d(p, free cells)                          signed clearance: positive in the open
    r(τ) = -Σ_h mean_k φ(depth(p_hk)),   depth = max(0, margin - c),   φ(d) = d / (d + softness)

p_hk are points along the segment that ends in row h, so that a leap over a wall counts. φ is between 0 and 1: r is
minus the number of rows in walls, with a soft edge and a gradient that leads out of them from anywhere.

    maze_plan(τ) = w_c · (rows in walls) + w_d · (dynamics error) + w_g · (goal reached),  each at most 0

Cells are 1 × 1 and the map is centred at the origin, row 0 at the top, as in gymnasium-robotics' PointMaze:
x = col + 1/2 - cols/2, y = rows/2 - row - 1/2.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.channels import TRAJECTORIES, Channels, as_channels, entry
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_number, is_positive, is_whole
from treesearch.rewards.trajectories.dynamics import dynamics_consistency
from treesearch.rewards.trajectories.trajectory import RADIUS, distance, entries, goal_reaching

POINT = 0.1
"""Radius of PointMaze's ball: its centre stays this far from walls."""

Map = str | Sequence[Sequence[Any]]
Cell = tuple[int, int]
Box = tuple[float, float, float, float]

_OUTSIDE = 1e4
_NAMED = {
    "umaze": "##### #...# ###.# #...# #####",
    "medium": "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#..# ########",
    "large": "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.# "
    "#..#.#.....# ##.#.#.#.### #..#...#...# ############",
}
MAZES = {name: tuple(tuple(int(c == "#") for c in row) for row in text.split()) for name, text in _NAMED.items()}
"""The maps of PointMaze: 1 is a wall."""


class Unreachable(ValueError):
    """No way leads from the start to the goal."""


@dataclass(frozen=True)
class Maze:
    """A map of walls; what is outside it is wall.

    Args:
        walls: rows of 0 and 1, 1 is a wall.
    """

    walls: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(maze_map: Map | Maze) -> Maze:
        """The maze of a name in MAZES or of a map (rows, cols): 1 is a wall; 0 and PointMaze's r, g, c are free.

        Raises:
            ValueError: an unknown name, rows of unequal length, other entries, or no free cell.
        """
        if isinstance(maze_map, Maze):
            return maze_map
        if isinstance(maze_map, str):
            if maze_map not in MAZES:
                raise ValueError(f"unknown maze {maze_map!r}: expected one of {', '.join(MAZES)}, or a map")
            return Maze(MAZES[maze_map])
        rows = [list(row) for row in getattr(maze_map, "tolist", lambda: maze_map)()]
        strange = {v for v in itertools.chain(*rows) if v not in (0, 1, "r", "g", "c")}
        if strange or len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"expected rows of 0 and 1 of one length, got {sorted(map(str, strange)) or 'uneven rows'}"
            )
        if all(v == 1 for v in itertools.chain(*rows)):
            raise ValueError("expected a maze with a free cell, got walls only")
        return Maze(tuple(tuple(int(v == 1) for v in row) for row in rows))

    @property
    def shape(self) -> Cell:
        """Rows and columns."""
        return len(self.walls), len(self.walls[0])

    def cell_to_xy(self, cell: Sequence[int]) -> tuple[float, float]:
        """The centre of a cell (row, column)."""
        rows, cols = self.shape
        return cell[1] + 0.5 - cols / 2, rows / 2 - cell[0] - 0.5

    def xy_to_cell(self, xy: Sequence[float]) -> Cell:
        """The cell (row, column) that a position lies in; it may be outside the map."""
        rows, cols = self.shape
        return math.floor(rows / 2 - float(xy[1])), math.floor(float(xy[0]) + cols / 2)

    def is_free(self, cell: Cell) -> bool:
        """Whether a cell is on the map and no wall."""
        rows, cols = self.shape
        return 0 <= cell[0] < rows and 0 <= cell[1] < cols and not self.walls[cell[0]][cell[1]]

    def clearance(self, points: Tensor) -> Tensor:
        """Signed distance (...) of points (..., 2) to the nearest wall, in cells; in walls minus that to the open."""
        return distance(self.from_walls(points)) - distance(_offset(points, _boxes(self, 0)))

    def from_walls(self, points: Tensor) -> Tensor:
        """Vectors (..., 2) that lead to points (..., 2) from the nearest walls, 0 for points in walls."""
        return _offset(points, _boxes(self, 1))

    def route(self, start: Sequence[float], goal: Sequence[float]) -> list[tuple[float, float]]:
        """Centres of the cells of a shortest way between two positions, both cells included.

        Raises:
            Unreachable: one of them lies in a wall, or no way joins them.
        """
        for name, xy in (("start", start), ("goal", goal)):
            if not self.is_free(self.xy_to_cell(xy)):
                row, col = self.xy_to_cell(xy)
                rows, cols = self.shape
                if not (0 <= row < rows and 0 <= col < cols):
                    spans = f"x in {-cols / 2:g}..{cols / 2:g}, y in {-rows / 2:g}..{rows / 2:g}"
                    raise Unreachable(f"{name} {_text(xy)} lies outside the maze: expected {spans}")
                raise Unreachable(f"{name} {_text(xy)} lies in a wall: row {row}, column {col} of the map")
        cells = _shortest(self, self.xy_to_cell(start), self.xy_to_cell(goal))
        if not cells:
            raise Unreachable(f"goal {_text(goal)} cannot be reached from {_text(start)}: walls are between them")
        return [self.cell_to_xy(cell) for cell in cells]


@facts(
    range="minus the number of rows to 0; 0 where the way is clear",
    differentiable=True,
    limits=f"{TRAJECTORIES} whose position is in the maze's units",
)
def wall_collision(
    maze_map: Map | Maze,
    channels: Channels | Sequence[int] = (4, 2),
    margin: float = POINT,
    softness: float = 0.05,
    samples_per_row: int = 4,
    position: Sequence[int] = (0, 1),
) -> Reward:
    """r = minus the number of rows that lie in walls, or on the way to which walls lie, with a soft edge.

    Args:
        maze_map: a map (rows, cols) where 1 is a wall, or a name in MAZES.
        channels: of the trajectories.
        margin: clearance to keep, in cells; the default is the radius of PointMaze's ball.
        softness: depth at which a point counts half.
        samples_per_row: points looked at on the way to each row.
        position: which entries of an observation are x and y.

    Raises:
        ValueError: a bad map, entries that are not in an observation, a margin below 0, or softness or
            samples_per_row that are not positive.
    """
    maze, channels = Maze.of(maze_map), as_channels(channels)
    columns = _plane(channels, position)
    if not (is_number(margin, 0) and is_positive(softness) and is_whole(samples_per_row)):
        got = f"{margin}, {softness} and {samples_per_row}"
        raise ValueError(f"margin, softness and samples_per_row are {got}, expected ≥ 0, > 0 and ≥ 1")

    def fn(samples: Tensor, _: object) -> Tensor:
        p = channels.checked(samples)[..., columns].clamp(-_OUTSIDE, _OUTSIDE)  # its square may overflow
        depth = (margin - maze.clearance(_on_the_way(p, samples_per_row))).clamp(min=0).double()
        return -(depth / (depth + softness)).mean(2).sum(1)

    return Reward(fn, "wall_collision")


@facts(
    range="-inf to 0; 0 where nothing speaks against the plan",
    differentiable=True,
    prompts=True,
    limits=f"{TRAJECTORIES} of PointMaze, two rows or more",
)
def maze_plan(
    maze_map: Map | Maze,
    channels: Channels | Sequence[int] = (4, 2),
    goal: Sequence[float] | None = None,
    stride: int = 1,
    collision: float = 1.0,
    dynamics: float = 1.0,
    reach: float = 1.0,
    scale: Sequence[float] = (0.1, 0.1, 1.0, 1.0),
    radius: float = RADIUS,
) -> Reward:
    """Whether a plan for PointMaze would work: walls, dynamics and goal in one reward, 0 for a plan without fault.

    Args:
        maze_map: a map (rows, cols) where 1 is a wall, or a name in MAZES.
        channels: of the trajectories, four numbers of observation and two of action.
        goal: a position; None reads the goal of each sample's prompt.
        stride: simulation steps from one row to the next.
        collision: what a row in a wall costs.
        dynamics: what a mean squared dynamics error of one unit of `scale` costs.
        reach: what a cell that is missing to the goal costs.
        scale: error of x, y, v_x, v_y that counts as one.
        radius: at which the goal counts as reached.

    Raises:
        ValueError: a bad map or goal, or weights below 0; when called, a goal that lies in a wall or that walls keep
            apart from the prompt's start.
    """
    maze = Maze.of(maze_map)
    if not all(is_number(weight, 0) for weight in (collision, dynamics, reach)):
        raise ValueError(f"weights are {collision}, {dynamics} and {reach}, expected 0 or more")
    parts = collision * wall_collision(maze, channels)
    parts = parts + dynamics * dynamics_consistency(channels, stride, scale)
    parts = parts + reach * goal_reaching(channels, goal, radius, when="any")

    def fn(samples: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        for prompt in prompts or [None]:
            check_reachable(maze, prompt, goal)
        return parts.attached(samples, prompts)

    return Reward(fn, "maze_plan")


def check_reachable(maze: Maze, prompt: Any, goal: Sequence[float] | None = None) -> None:
    """Nothing, if the goal (of the prompt, unless one is given) can be reached from the prompt's start.

    Raises:
        Unreachable: it lies in a wall, or walls keep it apart from the start.
    """
    target = goal or entry(prompt, "goal")
    start = entry(prompt, "start") or target
    if target is not None and start is not None:
        maze.route(start[:2], target[:2])


def _on_the_way(p: Tensor, count: int) -> Tensor:
    """Points (n, H, count, 2) that lead to each row of positions (n, H, 2); to the first row, that row itself."""
    before = torch.cat([p[:, :1], p[:, :-1]], 1)
    share = torch.arange(1, count + 1, device=p.device, dtype=p.dtype) / count
    return before[:, :, None] + (p - before)[:, :, None] * share[:, None]


def _offset(points: Tensor, boxes: tuple[Box, ...]) -> Tensor:
    """Vectors (..., 2) to points (..., 2) from the nearest of some boxes, 0 inside."""
    low_x, low_y, high_x, high_y = points.new_tensor(boxes).T
    x, y = points[..., :1], points[..., 1:]
    dx, dy = x - x.clamp(low_x, high_x), y - y.clamp(low_y, high_y)
    nearest = (dx.detach().square() + dy.detach().square()).argmin(-1, keepdim=True)
    return torch.cat([dx.gather(-1, nearest), dy.gather(-1, nearest)], -1)


@functools.lru_cache(maxsize=64)
def _boxes(maze: Maze, kind: int) -> tuple[Box, ...]:
    """Boxes (low x, low y, high x, high y) that together are the free cells (0) or the walls (1) with the outside."""
    found = []
    for row, values in enumerate(maze.walls):
        for value, run in itertools.groupby(range(len(values)), key=values.__getitem__):
            cols = list(run)
            if value == kind:
                (left, y), (right, _) = maze.cell_to_xy((row, cols[0])), maze.cell_to_xy((row, cols[-1]))
                found.append((left - 0.5, y - 0.5, right + 0.5, y + 0.5))
    half_y, half_x = (side / 2 for side in maze.shape)
    far = _OUTSIDE
    around = (
        (-far, half_y, far, far),
        (-far, -far, far, -half_y),
        (-far, -far, -half_x, far),
        (half_x, -far, far, far),
    )
    return tuple(found) + (around if kind else ())


@functools.lru_cache(maxsize=4096)
def _shortest(maze: Maze, start: Cell, goal: Cell) -> tuple[Cell, ...]:
    """Free cells from start to goal, four neighbours to a cell; empty if there is no way."""
    after: dict[Cell, Cell] = {goal: goal}
    queue = deque([goal])
    while queue and start not in after:
        row, col = queue.popleft()
        for cell in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
            if maze.is_free(cell) and cell not in after:
                after[cell] = (row, col)
                queue.append(cell)
    if start not in after:
        return ()
    way = [start]
    while way[-1] != goal:
        way.append(after[way[-1]])
    return tuple(way)


def _plane(channels: Channels, position: Sequence[int]) -> list[int]:
    columns = entries(channels, position)
    if len(columns) != 2:
        raise ValueError(f"position is {columns}, expected the entries of x and y")
    return columns


def _text(xy: Sequence[float]) -> str:
    return f"({float(xy[0]):.2f}, {float(xy[1]):.2f})"
