"""The way to a goal: lengths by hand round corners, bounds against the shortest way, walls and gaps."""

import itertools
import math

import pytest
import torch

from rewards.maze import Maze, Unreachable
from rewards.ways import way

ROOM = Maze.of([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])


def xy(*points):
    return torch.tensor(points, dtype=torch.float64)


def test_round_a_wall_it_is_longer_than_straight():
    start, goal = ROOM.cell_to_xy((3, 1)), ROOM.cell_to_xy((3, 3))
    corners = [start, (-0.5, 1.0 - 0.5), (0.5, 1.0 - 0.5), goal]  # the two upper corners of the wall between
    shortest = sum(math.dist(a, b) for a, b in itertools.pairwise(corners))
    found = way(ROOM, xy(start), goal).item()
    assert math.dist(start, goal) == 2
    assert shortest <= found <= 1.08 * shortest + 0.1


def test_it_is_straight_where_nothing_is_in_the_way():
    open_ = Maze.of([[0] * 6] * 6)
    points = 5.5 * torch.rand(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 2.75
    goal = (0.7, -1.2)
    straight = (points - torch.tensor(goal, dtype=torch.float64)).norm(dim=1)
    found = way(open_, points, goal)
    assert (found >= straight).all()
    assert (
        found <= 1.0824 * straight + 2**0.5 / 16
    ).all()  # eight directions: sec(π/8); half a node's diagonal at the goal
    assert way(open_, xy(goal), goal).item() < 0.1


def test_no_step_passes_between_two_walls_that_touch():
    apart = Maze.of([[0, 1], [1, 0]])
    assert way(apart, xy(apart.cell_to_xy((1, 1))), apart.cell_to_xy((0, 0))).isinf().all()


def test_goals_in_walls_are_refused_and_points_there_are_not():
    with pytest.raises(Unreachable, match="in a wall"):
        way(ROOM, xy((0, 0)), ROOM.cell_to_xy((2, 2)))
    assert way(ROOM, xy((0.0, -0.5), (40.0, -70.0)), ROOM.cell_to_xy((1, 1))).isfinite().all()


def test_it_falls_along_the_way():
    goal = ROOM.cell_to_xy((3, 3))
    route = xy(*ROOM.route(ROOM.cell_to_xy((3, 1)), goal)).requires_grad_()
    found = way(ROOM, route, goal)
    assert (found.diff() < 0).all()
    (slope,) = torch.autograd.grad(found.sum(), route)
    assert slope[0, 1] < -0.5  # up, out of the dead end, not through the wall
    assert abs(slope[0, 0]) < 0.9
