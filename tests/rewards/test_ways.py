"""The way to a goal: lengths by hand round corners, bounds against the shortest way, walls and gaps."""

import itertools
import math

import pytest
import torch

from treesearch.rewards.trajectories.maze import Maze, Unreachable
from treesearch.rewards.trajectories.ways import way

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
    near = xy((-0.03, 0.03)).requires_grad_()  # in the goal's cell, beside the other one
    found = way(apart, near, apart.cell_to_xy((0, 0)))
    (slope,) = torch.autograd.grad(found.sum(), near)
    assert found.item() == pytest.approx(0.68, abs=0.1)
    assert slope.isfinite().all()


def test_no_step_cuts_a_corner():
    bend = Maze.of([[0, 0, 0], [0, 1, 1], [0, 1, 1]])
    start, goal = (-1 + 0.44, -1.44), (1.44, 1 - 0.44)  # along the walls: 2 down the first, 2 along the second
    assert 3.88 <= way(bend, xy(start), goal).item() <= 3.88 + 0.25


def test_goals_in_walls_are_refused_and_points_there_are_not():
    with pytest.raises(Unreachable, match="in a wall"):
        way(ROOM, xy((0, 0)), ROOM.cell_to_xy((2, 2)))
    goal = ROOM.cell_to_xy((1, 1))
    inside, left, further = way(ROOM, xy((0.0, -0.5), (-3.0, 1.0), (-7.0, 1.0)), goal).tolist()
    assert 2.0 < inside < 3.5  # out of the wall and round it
    assert further - left == pytest.approx(4.0)
    assert left == pytest.approx(2.0, abs=0.1)


def test_it_falls_along_the_way():
    goal = ROOM.cell_to_xy((3, 3))
    route = xy(*ROOM.route(ROOM.cell_to_xy((3, 1)), goal)).requires_grad_()
    found = way(ROOM, route, goal)
    assert (found.diff() < 0).all()
    (slope,) = torch.autograd.grad(found.sum(), route)
    assert slope[0, 1] < -0.5  # up, out of the dead end, not through the wall
    assert abs(slope[0, 0]) < 0.9
