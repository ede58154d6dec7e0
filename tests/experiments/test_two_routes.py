"""The two-route maze: its demonstrations, its door, its environment, and the training of its policy."""

import json
import warnings

import gymnasium
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

from experiments.policies.episodes import base_actor, play
from experiments.policies.train_policy import Args, main
from experiments.policies.two_routes import CLOSED, GOAL, LIMIT, OPEN, Points, TwoRoutes, demonstrate, two_routes
from treesearch.backends.models.policy import policy


def test_three_demonstrations_in_four_go_round_on_the_left():
    data = demonstrate(300, seed=0)
    middle = data.seen[(data.seen[:, -1, 1].abs() < 0.1), -1, 0]
    assert 0.65 < (middle < 0).float().mean() < 0.85
    assert data.chunks.shape[1:] == (8, 2)
    assert data.chunks.abs().max() <= 1


def test_the_door_decides_what_the_shipped_policy_earns():
    actor = base_actor(policy(), seed=1)
    assert play(actor, 96, 1, OPEN).success.mean() > 0.9
    closed = play(actor, 96, 1, CLOSED)
    assert 0.05 < closed.success.mean() < 0.35
    assert torch.equal(closed.returns > 0, closed.success == 1)
    assert (closed.returns[closed.success == 1] < 0.99**20).all()


def test_points_at_the_goal_stay_and_walls_hold():
    points = Points(CLOSED)
    points.reset(2)
    points.state[0, :2], points.state[1, :2] = torch.tensor(GOAL), torch.tensor([-1.0, -1.0])
    points.step(torch.zeros(2, 2))
    there = points.state[0].clone()
    for _ in range(40):
        points.step(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert points.arrived.tolist() == [True, False]
    assert torch.equal(points.state[0], there)
    assert points.state[1, 1] < -0.55  # the closed door is in the cell above


def test_the_environment_is_gymnasiums():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the box has no bounds, which gymnasium may say
        check_env(TwoRoutes(), skip_render_check=True)
    env = two_routes()
    seen, _ = env.reset(seed=3)
    assert seen.shape == (2, 4)
    assert np.array_equal(seen[0], seen[1])
    ends = [env.step(np.array([-1.0, 0.0], np.float32))[2:4] for _ in range(LIMIT)]
    assert ends[-1] == (False, True)
    assert not any(a or b for a, b in ends[:-1])
    assert isinstance(env, gymnasium.Env)


def test_training_goes_on_where_it_was_and_says_what_came_out(tmp_path):
    how = {"walks": 4, "steps": 2, "batch_size": 4, "width": 8, "episodes": 2, "grids": (1,)}
    at = {
        "out": tmp_path,
        "weights": tmp_path / "w.safetensors",
        "curve": tmp_path / "c.csv",
        "figures": tmp_path / "f",
    }
    main(Args(epochs=1, **how, **at))
    main(Args(epochs=2, **how, **at))
    assert json.loads((tmp_path / "f").read_text(encoding="utf-8"))["walks"] == 4
    rows = (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2"]
    assert policy(at["weights"]).network.layers[-1].weight.shape == (16, 8)
