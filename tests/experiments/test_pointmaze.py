"""PointMaze: what is held out, the scripted data, and plans executed in the environment."""

import numpy as np
import pytest

from experiments.planning.pointmaze import (
    RADIUS,
    Acting,
    Field,
    Tracking,
    distances,
    execute,
    free_cells,
    generate,
    held_out,
    held_out_pairs,
    make,
)
from treesearch.rewards.trajectories.maze import Maze

pytest.importorskip("gymnasium_robotics")
MEDIUM = Maze.of("medium")
STRIDE = 4


@pytest.fixture(scope="module")
def data():
    return generate("medium", 6000, 260, seed=3)[0]


def starts_of(data):
    ends = np.flatnonzero(data.timeouts)
    return np.concatenate([[0], ends[:-1] + 1])


def test_the_layout_is_the_environments():
    for name in ("umaze", "medium", "large"):
        assert Maze.of(make(name).maze.maze_map) == Maze.of(name)


def test_no_trip_of_the_data_is_held_out(data):
    trips = [
        (MEDIUM.xy_to_cell(data.observations[b].tolist()), MEDIUM.xy_to_cell(data.goals[b].tolist()))
        for b in starts_of(data)
    ]
    assert not set(trips) & held_out(MEDIUM)
    assert len(set(trips)) > 10


def test_held_out_pairs_are_held_out_apart_and_repeatable():
    pairs = held_out_pairs("medium", 100, seed=0, min_cells=6, max_cells=9)
    assert pairs == held_out_pairs("medium", 100, seed=0, min_cells=6, max_cells=9)
    assert pairs != held_out_pairs("medium", 100, seed=1, min_cells=6, max_cells=9)
    for pair in pairs:
        cells = MEDIUM.xy_to_cell(pair.start), MEDIUM.xy_to_cell(pair.goal)
        assert cells in held_out(MEDIUM)
        assert 6 <= pair.cells == distances(MEDIUM)[cells] <= 9
        assert pair.cells == len(MEDIUM.route(pair.start, pair.goal)) - 1
    with pytest.raises(ValueError, match="they are 2 to"):
        held_out_pairs("medium", 1, seed=0, min_cells=90)


def test_a_fifth_of_the_pairs_is_held_out():
    far = sum(d >= 2 for d in distances(MEDIUM).values())
    assert len(held_out(MEDIUM)) == far // 5
    assert len(distances(MEDIUM)) == len(free_cells(MEDIUM)) ** 2


def test_the_behaviour_reaches_its_goals_and_stays(data):
    for begin, end, steps in zip(starts_of(data), np.flatnonzero(data.timeouts), data.trips, strict=True):
        gaps = np.linalg.norm(data.observations[begin : end + 1, :2] - data.goals[begin], axis=1)
        assert gaps[steps] <= RADIUS < gaps[:steps].min(initial=9.0)
        assert gaps[steps + 60 :].max(initial=0.0) < 1.0
        assert end + 1 - begin >= 260
        assert data.rewards[begin : end + 1].sum() == end + 1 - begin - steps
    assert np.abs(data.actions).max() <= 1


def plans_of(data, count=6):
    begins = starts_of(data)[:count]
    rows = begins[:, None] + STRIDE * np.arange(64)
    return np.concatenate([data.observations[rows], data.actions[rows]], 2), data.goals[begins], data.trips[:count]


def test_a_plan_from_the_data_can_be_executed(data):
    plans, goals, trips = plans_of(data)
    outcome = execute("medium", plans[:, 0, :4], goals, plans, Tracking(stride=STRIDE))
    assert outcome.success.all()
    assert (outcome.distance <= RADIUS).all()
    assert np.abs(outcome.steps - trips).max() <= 6


def test_a_plan_in_parts_is_the_plan(data):
    plans, goals, _ = plans_of(data)
    whole = Field("medium", plans[:, 0, :4], goals, Tracking(stride=STRIDE))
    parts = Field("medium", plans[:, 0, :4], goals, Tracking(stride=STRIDE))
    whole.run(plans, rows=20)
    for row in range(0, 20, 5):
        seen = parts.run(plans[:, row:], rows=5)
    np.testing.assert_allclose(seen, whole.observations, atol=0.02)
    assert (whole.steps[~whole.reached] == 20 * STRIDE).all()
    assert [len(p) - 1 for p in whole.paths] == whole.steps.tolist()


def test_actions_are_made_as_they_are(data):
    plans, goals, _ = plans_of(data, 2)
    field = Field("medium", plans[:, 0, :4], goals, Acting(stride=STRIDE))
    field.run(plans, rows=10)
    env = make("medium")
    env.reset(seed=0)
    for i, plan in enumerate(plans):
        env.point_env.set_state(plan[0, :2], plan[0, 2:4])
        for action in plan[:10, 4:6].repeat(STRIDE, 0):
            seen = env.point_env.step(action)[0]
        np.testing.assert_array_equal(field.observations[i], seen)


def test_walls_stop_a_plan_that_crosses_them():
    start, goal = MEDIUM.cell_to_xy((1, 1)), MEDIUM.cell_to_xy((6, 1))
    line = np.linspace(start, goal, 64)
    plan = np.concatenate([line, np.full((64, 2), (line[1] - line[0]) * 25)], 1)[None]
    outcome = execute("medium", np.array([start]), np.array([goal]), plan, Tracking(stride=STRIDE))
    assert not outcome.success[0]
    assert outcome.distance[0] > 2
    assert outcome.steps[0] == 63 * STRIDE


def test_starting_at_the_goal_is_success_without_a_step():
    at = np.array([MEDIUM.cell_to_xy((1, 1))])
    outcome = execute("medium", at, at + 0.1, np.zeros((1, 64, 6)), Tracking(stride=STRIDE))
    assert (outcome.success.tolist(), outcome.steps.tolist()) == ([True], [0])


def test_unknown_mazes_are_refused():
    with pytest.raises(ValueError, match="unknown maze 'small'"):
        make("small")
    with pytest.raises(ValueError, match="unknown maze 'small'"):
        held_out_pairs("small", 1, 0)
