"""Locomotion: data of graded quality, and plans that are executed; tiny models through the whole script."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from experiments.planning import locomotion, locomotion_levels, locomotion_planning
from experiments.planning.locomotion import Actor, Runners
from treesearch.backends.models.card import Card, Normalisation, save_model
from treesearch.backends.models.trajectory import trajectory_kernel
from treesearch.backends.models.unet1d import TrajectoryNetwork
from treesearch.offline.readers import read_npz
from treesearch.rewards.channels import Channels

pytest.importorskip("mujoco")
ENVIRONMENT, CHANNELS, H = "HalfCheetah-v5", Channels(17, 6, 1), 8


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """An actor that has learnt nothing."""
    draw, arrays = np.random.default_rng(0), {}
    for name, (rows, columns) in {"latent_pi.0": (8, 17), "latent_pi.2": (8, 8), "mu": (6, 8)}.items():
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = draw.normal(size=(rows, columns)), draw.normal(size=rows)
    file = tmp_path_factory.mktemp("agent") / "agent.npz"
    np.savez(file, **arrays)
    return file


@pytest.fixture(scope="module")
def data(agent, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "data.npz"
    locomotion.main(locomotion.Args(agent=agent, out=out, steps=60, limit=30))
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    card = Card(
        channels=CHANNELS,
        normalisation=Normalisation((0.0,) * 24, (1.0,) * 24),
        horizon=H,
        widths=(8, 16),
        environment=ENVIRONMENT,
    )
    save_model(TrajectoryNetwork(24, card.widths), card, file)
    return file


def test_data_are_whole_episodes_of_clipped_actions(data):
    found = read_npz(data)
    assert found.lengths.tolist() == [30, 30]
    assert found.channels == CHANNELS
    assert np.abs(found.actions).max() == 1
    assert not found.terminated.any()


def test_an_actor_is_its_network(agent, tmp_path):
    with np.load(agent) as file:
        arrays = dict(file)
    x = np.ones(17)
    for name in ("latent_pi.0", "latent_pi.2"):
        x = np.maximum(arrays[f"{name}.weight"] @ x + arrays[f"{name}.bias"], 0)
    want = np.tanh(arrays["mu.weight"] @ x + arrays["mu.bias"])
    np.testing.assert_allclose(Actor.load(agent).act(np.ones((2, 17))), [want, want])
    np.savez(tmp_path / "other.npz", **{"mu.weight": want})
    with pytest.raises(ValueError, match="lacks"):
        Actor.load(tmp_path / "other.npz")


def test_executed_actions_earn_the_environment_s_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actions = np.random.default_rng(1).uniform(-2, 2, (2, 5, 6))
    runners = Runners(partial(locomotion.make, ENVIRONMENT), [3, 4])
    runners.run(actions)
    for i, seed in enumerate((3, 4)):
        env = locomotion.make(ENVIRONMENT)
        env.reset(seed=seed)
        steps = [env.step(np.clip(a, -1, 1)) for a in actions[i]]
        assert runners.returns[i] == pytest.approx(sum(step[1] for step in steps))
        np.testing.assert_allclose(runners.observations[i], steps[-1][0])
    assert not list(tmp_path.iterdir())  # MuJoCo leaves no log


def test_control_executes_the_first_actions_of_each_plan(weights):
    kernel = trajectory_kernel(weights, 4)
    setup = locomotion_planning.METHODS["best_of_n"].make(kernel)
    runners = Runners(partial(locomotion.make, ENVIRONMENT), [0, 1])
    planner = locomotion_planning.control(setup, runners, rollouts=2, steps=3, length=7, seed=0)
    assert [d.nfe for d in planner.decisions] == [16, 16, 16]
    again = Runners(partial(locomotion.make, ENVIRONMENT), [0, 1])
    for decision, k in zip(planner.decisions, (3, 3, 1), strict=True):
        again.run(kernel.channels.actions(decision.plans)[:, :k].numpy())
    np.testing.assert_allclose(again.returns, runners.returns)


def test_behaviour_returns_are_of_the_first_steps(data):
    found = read_npz(data)
    want = [found.rewards[:10].sum(), found.rewards[30:40].sum()]
    np.testing.assert_allclose(locomotion_planning.behaviour_returns([data], 10), want, rtol=1e-5)
    with pytest.raises(ValueError, match="no episode has 31 steps"):
        locomotion_planning.behaviour_returns([data], 31)


def test_a_behaviour_that_fell_has_the_return_of_its_own_steps(tmp_path):
    flags, file = np.zeros((2, 9), bool), tmp_path / "fallen.npz"
    flags[0, 2], flags[1, 8] = True, True  # three steps to a fall, then six
    arrays = {"observations": np.zeros((9, 1)), "actions": np.zeros((9, 1)), "rewards": np.repeat([1.0, 10.0], [3, 6])}
    np.savez(file, terminals=flags[0], timeouts=flags[1], **arrays)
    assert locomotion_planning.behaviour_returns([file], 5).tolist() == [3, 50]


def test_the_script_fills_its_rows_and_reports(tmp_path, weights, data, capsys):
    out, to = tmp_path / "rows.jsonl", tmp_path / "report.md"
    words = ["run", "--weights", str(weights), "--out", str(out), "--num-steps", "4", "--episodes", "2"]
    words += ["--methods", "base", "best_of_n", "fk", "--rollouts", "1", "3", "--seeds", "0", "1", "--length", "6"]
    assert locomotion_planning.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert len([row for row in rows if row["split"] == "tune"]) == 3
    assert {(r["method"], r["rollouts"]) for r in rows if r["split"] == "test"} == {
        ("base", 1), ("best_of_n", 1), ("best_of_n", 3), ("fk", 1), ("fk", 3),
    }  # fmt: skip
    assert all(row["nfe"] <= 4 * row["rollouts"] for row in rows)
    before = out.read_bytes()
    assert locomotion_planning.main(words) == 0
    assert out.read_bytes() == before
    assert locomotion_planning.main(["report", "--out", str(out), "--to", str(to), "--data", str(data)]) == 0
    assert "best episode" in to.read_text()
    assert locomotion_planning.main(["run", "--seeds", "100", "--out", str(out)]) == 1
    assert "seeds overlap" in capsys.readouterr().err


def test_settings_are_chosen_by_mean_return():
    grid = locomotion_planning.METHODS["fk"].grid
    rows = [
        {"split": "tune", "method": "fk", "settings": how, "returns": [value]}
        for how, value in zip(grid, (1.0, 3.0, 2.0), strict=True)
    ]
    assert locomotion_planning.chosen("fk", rows) == grid[1]
    assert locomotion_planning.chosen("fk", []) == grid[0]


def test_the_table_pairs_episodes_with_the_same_first_state():
    def row(method, returns, seed):
        return {"split": "test", "method": method, "rollouts": 4, "steps": 2, "warm": False,
                "seed": seed, "returns": returns}  # fmt: skip

    rows = [row("best_of_n", [1.0, 100.0], 0), row("fk", [3.0, 102.0], 0), row("fk", [500.0, 500.0], 1)]
    assert "| fk | 2 (2 to 2) |" in locomotion_planning.tables(rows)
    assert "| best_of_n | -2 (-2 to -2) |" in locomotion_planning.tables(rows)
    assert "| fk | 4, 2 seeds |" in locomotion_planning.tables(rows)
    ways = locomotion_planning.tables([*rows, rows[0] | {"warm": True, "returns": [7.0, 7.0]}])
    assert "| method | every 2 | every 2, warm |" in ways
    assert "| best_of_n | 50 (1 to 100) | 7 (7 to 7) |" in ways


def test_plans_that_go_on_from_the_last_ones_cost_half_as_much_each(weights):
    setup = locomotion_planning.METHODS["best_of_n"].make(trajectory_kernel(weights, 4))
    planner = locomotion_planning.control(
        setup, Runners(partial(locomotion.make, ENVIRONMENT), [0]), rollouts=2, steps=2, length=4, seed=0, warm=True
    )
    assert [len(planner.decisions), len(planner.result.tasks[0].rewards)] == [2, 4]


def test_levels_of_locomotion_are_a_row_each(weights, capsys):
    locomotion_levels.main(
        locomotion_levels.Args(weights=weights, episodes=1, states=2, apart=2, chains=3, continuations=2, num_steps=3)
    )
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ["| 3", "| 2", "| 1"]


def test_an_episode_that_ends_earns_no_more():
    runners = Runners(partial(locomotion.make, "Hopper-v5"), [0])
    runners.run(np.ones((1, 400, 3)))
    assert not runners.alive[0]
    earned = runners.returns.copy()
    runners.run(np.ones((1, 5, 3)))
    assert runners.returns == earned
