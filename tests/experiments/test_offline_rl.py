"""Offline RL on synthetic data: what is learnt from, and a tiny study through the command."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.offline_rl import __main__ as offline_rl
from experiments.offline_rl import beds, mazes, study, synthetic
from experiments.offline_rl.learners import (
    Learner,
    Settings,
    transitions_of,
)
from experiments.offline_rl.tasks import Simulator, returns_of
from experiments.planning import pointmaze, train_trajectory
from treesearch.backends.models.trajectory import maze_kernel
from treesearch.errors import TreeSearchError
from treesearch.offline.data import OfflineData, absorbing
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.policy import PolicyLikelihood

pytest.importorskip("mujoco")
pytest.importorskip("torchrl")
pytest.importorskip("gymnasium_robotics")
SMALL = Settings(width=8, batch_size=8, chunk=5)


def episodes(closing=True):
    """Two episodes of 3 and 2 steps, the first one ended by the task."""
    return OfflineData(
        observations=np.arange(10, dtype=np.float32).reshape(5, 2),
        actions=np.zeros((5, 1), np.float32),
        rewards=np.arange(5, dtype=np.float32),
        ends=np.array([3, 5]),
        terminated=np.array([True, False]),
        closing=np.array([[50, 51], [60, 61]], np.float32) if closing else None,
    )


def test_steps_lead_to_the_next_observation_of_their_episode():
    found = transitions_of(episodes())
    assert found.after.tolist() == [[2, 3], [4, 5], [50, 51], [8, 9], [60, 61]]
    assert found.terminated.tolist() == [False, False, True, False, False]
    without = transitions_of(episodes(closing=False))  # where time cut the last step leads is not known
    assert without.rewards.tolist() == [0, 1, 2, 3]
    assert without.after[[0, 1, 3]].tolist() == [[2, 3], [4, 5], [8, 9]]
    assert without.terminated.tolist() == [False, False, True, False]
    alone = replace(episodes(closing=False), ends=np.arange(1, 6), terminated=np.zeros(5, bool))
    with pytest.raises(TreeSearchError, match="no step leads to a known observation"):
        transitions_of(alone)
    flat = replace(episodes(), rewards=np.ones(5, np.float32))
    with pytest.raises(TreeSearchError, match="every reward is 1: give the rewards of a task"):
        transitions_of(flat)


def test_published_guidance_has_the_coefficient_that_is_asked_for():
    kernel = maze_kernel(num_steps=2, horizon=8)
    reward = PolicyLikelihood(lambda s: s[:, :2], kernel.channels)
    assert synthetic.kind_of("guided", 4.0).guide(kernel, reward, 1.0).coefficient == 4.0
    assert synthetic.kind_of("fk", 4.0).guide(kernel, reward, 0.5).lam == 0.5


def test_steps_after_an_end_of_the_task_are_none():
    samples = torch.zeros(2, 4, 4)
    samples[..., 0], samples[..., 2], samples[..., 3] = torch.arange(4), 1.5, torch.arange(4)
    samples[1, 2:, 1] = 1.0  # the second one ends in its third row
    found = synthetic.transitions_of(samples, Channels(2, 1, 1), lambda s: s[:, 1] > 0.5)
    assert found.rewards.tolist() == [0, 1, 2, 0, 1]
    assert found.terminated.tolist() == [False, False, False, False, True]
    assert found.after[:, 0].tolist() == [1, 2, 3, 1, 2]
    assert found.actions.unique().tolist() == [1.0]  # clipped


@pytest.mark.parametrize("name", ["halfcheetah", "hopper", "walker2d"])
def test_ends_and_the_simulator_are_the_environment_s(name):
    task, rng = beds.task_of(f"{name}-medium"), np.random.default_rng(0)
    env, simulator = task.make(), Simulator(task)
    seen, _ = env.reset(seed=1)
    rows, ends = [], 0
    for _ in range(120):
        action = rng.uniform(-1, 1, env.action_space.shape)
        after, reward, over, *_ = env.step(action)
        rows.append((seen, action, after, reward, over))
        ends += over
        seen = env.reset(seed=2)[0] if over else after
    assert (ends > 0) == (name != "halfcheetah")
    before, actions, after, rewards, over = (np.array(column) for column in zip(*rows, strict=True))
    assert task.ended(torch.from_numpy(after)).tolist() == over.tolist()
    slow = (np.abs(before[:, env.model.nq - 1 :]) < 10).all(1)  # faster joints are cut in what is seen
    found, worth = simulator.step(before[slow], actions[slow])
    np.testing.assert_allclose(found, after[slow], atol=1e-6)
    np.testing.assert_allclose(worth, rewards[slow], atol=1e-6)


@pytest.mark.parametrize("name", ["hopper", "walker2d"])
def test_an_end_is_where_the_environment_has_it(name):
    task, rng = beds.task_of(f"{name}-medium"), np.random.default_rng(0)
    env = task.make()
    env.reset(seed=0)
    rows, over = [], []
    for _ in range(400):
        positions, speeds = rng.uniform(-0.3, 0.3, env.model.nq), rng.uniform(-1, 1, env.model.nv)
        positions[1], positions[2] = rng.uniform(0.5, 2.3), rng.choice([0.1, 0.5, 1.0, 1.5]) * rng.uniform(-1, 1)
        env.set_state(positions, speeds)
        rows.append(np.concatenate([positions[1:], speeds]))
        over.append(not env.is_healthy)
    assert 50 < sum(over) < 350
    assert task.ended(torch.from_numpy(np.array(rows))).tolist() == over


def test_scores_are_d4rl_s():
    task = beds.task_of("hopper-medium-replay")
    assert task.normalised(task.expert) == 100
    assert task.normalised(task.random) == 0
    with pytest.raises(
        ValueError, match=r"unknown env 'ant-medium': choose halfcheetah-medium.*maze-umaze, maze-medium$"
    ):
        beds.task_of("ant-medium")


def test_references_need_episodes_for_an_error(capsys):
    assert offline_rl.main(["references", "--episodes", "1"]) == 1
    assert "episodes is 1, expected 2 or more" in capsys.readouterr().err


def test_a_kind_of_data_that_is_none_is_named_before_a_model_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(study.Study, "prepared", lambda _: pytest.fail("prepared first"))
    with pytest.raises(ValueError, match="unknown data 'reall': choose real"):
        study.Run(env="maze-umaze", data=("reall",), out=tmp_path / "rows.jsonl").run()


@pytest.fixture(scope="module")
def walks():
    """Three episodes in the small maze."""
    return beds.task_of("maze-umaze").data(Path(), 150, 60)


def test_walks_are_the_maze_s_own_steps_rewarded_for_one_goal(walks):
    task = beds.task_of("maze-umaze")
    after, rewards = Simulator(task).step(walks.observations, walks.actions)
    np.testing.assert_allclose(after, walks.next_observations, atol=1e-5)
    np.testing.assert_allclose(rewards, walks.rewards, atol=1e-5)
    point = pointmaze.make("umaze").point_env
    point.set_state(walks.observations[5, :2], walks.observations[5, 2:])
    held = [point.step(walks.actions[5])[0] for _ in range(4)]
    np.testing.assert_allclose(held[-1], walks.next_observations[5], atol=1e-5)
    goal = task.walls.cell_to_xy(task.goal)
    assert task.rewards(np.array([[*goal, 1.0, 1.0], [goal[0], goal[1] - 1, 0.0, 0.0]])) == pytest.approx(
        [1, np.exp(-1)]
    )


def test_walks_begin_at_rest_anywhere_and_are_cut_by_time(walks):
    begin, task = np.arange(0, 180, 60), beds.task_of("maze-umaze")
    assert walks.timeouts.nonzero()[0].tolist() == [59, 119, 179]
    assert not walks.terminals.any()
    assert not walks.observations[begin, 2:].any()
    assert np.array_equal(
        walks.next_observations[:-1][~walks.timeouts[:-1]], walks.observations[1:][~walks.timeouts[:-1]]
    )
    env = task.make()
    cells = {task.walls.xy_to_cell(env.reset(seed=seed)[0][:2]) for seed in range(60)}
    assert cells == set(pointmaze.free_cells(task.walls)) - {task.goal}
    assert env.reset(seed=3)[0].tolist() == env.reset(seed=3)[0].tolist()


@pytest.mark.parametrize("name", mazes.TASKS)
def test_the_controller_of_a_maze_scores_100_and_random_forces_0(name):
    task = beds.task_of(name)
    seeds = range(mazes.FIRST_STATES, mazes.FIRST_STATES + 4)
    arrived, lost = (
        task.normalised(returns_of(task, policy, seeds, 10**6).mean()) for policy in (task.scripted(), mazes.uniform(0))
    )
    assert arrived == pytest.approx(100, abs=20)
    assert lost == pytest.approx(0, abs=40)


def test_seeds_are_judged_in_episodes_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(study, "returns_of", lambda task, policy, seeds, steps: asked.append(seeds))
    every = SimpleNamespace(run=study.Run(), task=beds.task_of("hopper-medium"))
    learner = Learner("td3bc", transitions_of(episodes()), SMALL, 0)
    for seed in (0, 1, 1):
        study.Study._returns(every, learner, seed)
    assert len({*asked[0], *asked[1]}) == 2 * study.Protocol().episodes
    assert asked[1] == asked[2]


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """A hopper's actor that has learnt nothing."""
    draw, arrays = np.random.default_rng(0), {}
    for name, (rows, columns) in {"latent_pi.0": (8, 11), "latent_pi.2": (8, 8), "mu": (3, 8)}.items():
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = draw.normal(size=(rows, columns)), draw.normal(size=rows)
    folder = tmp_path_factory.mktemp("agents")
    np.savez(folder / "sac_Hopper.npz", **arrays)
    return folder


SIZES = [
    *(
        "--protocol.num-steps",
        "3",
        "--protocol.n",
        "6",
        "--protocol.starts",
        "2",
        "--protocol.warmup",
        "2",
        "--protocol.steps",
        "2",
    ),
    *("--protocol.episodes", "2", "--protocol.length", "10", "--settings.width", "8", "--settings.batch-size", "4"),
    *("--modelling.steps", "200", "--modelling.limit", "40", "--modelling.horizon", "8", "--modelling.epochs", "1"),
    *("--modelling.widths", "8", "16", "--modelling.updates", "2", "--modelling.batch-size", "4"),
]


def test_the_command_fills_its_cells_and_reports(tmp_path, agents, capsys, monkeypatch):
    monkeypatch.setattr(synthetic, "STRENGTHS", (1.0,))
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    words = ["run", "--env", "hopper-medium", "--work", str(tmp_path / "work"), "--out", str(out), "--seeds", "0", "1"]
    words += ["--learner", "iql", *SIZES]
    assert offline_rl.main([*words, "--agents", str(tmp_path)]) == 1
    assert "put the actor sac_Hopper.npz into" in capsys.readouterr().err
    words += ["--agents", str(agents)]
    assert offline_rl.main([*words, "--data", "searched"]) == 0
    assert offline_rl.main([*words, "--data", "all", "--mix", "synthetic"]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert not [row for row in rows if "error" in row]
    cells = [(row["data"], row["mix"], row["seed"]) for row in rows if "score" in row]
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 + 3)
    choices = [(row["data"], row["strength"]) for row in rows if row.get("kind") == "choice"]
    assert sorted(choices) == sorted((kind, 1.0) for kind in synthetic.TUNED)
    nfe = {(row["data"], row["nfe"]) for row in rows if "score" in row}
    assert {("real", 0), ("unguided", 6 * 3), ("guided", 6 * 3)} < nfe
    assert {name for name, spent in nfe if 0 < spent <= 6 * 3} == set(synthetic.DATA) - {"real", *synthetic.CHOSEN}
    real = [row["figures"] for row in rows if row.get("data") == "real"]
    assert all(figures["dynamics error"] < 1e-4 for figures in real)  # but for rounding, the data are the environment
    before = out.read_bytes()
    assert offline_rl.main([*words, "--data", "all", "--mix", "synthetic"]) == 0
    assert out.read_bytes() == before
    assert offline_rl.main(["report", "--rows", str(out), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "## hopper-medium" in text
    assert "| TreeSampling |" in text
    assert "diverged, with their last finite weights: 0 of 14" in text


def test_the_command_needs_no_agent_for_a_maze(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["run", "--env", "maze-umaze", "--work", str(tmp_path / "work"), "--out", str(out), "--seeds", "0", *SIZES]
    assert offline_rl.main([*words, "--learner", "td3bc", "--data", "real", "fk", "--mix", "mixed"]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["data"], row["mix"], row["fingerprint"].split(":")[0]) for row in rows] == [
        ("real", "real", "PointMaze_UMaze-v3"),
        ("fk", "mixed", "PointMaze_UMaze-v3"),
    ]
    assert rows[0]["figures"]["dynamics error"] < 1e-5
    assert rows[0]["figures"]["reward error"] < 1e-5
    assert all(np.isfinite(row["score"]) for row in rows)


def test_a_cell_without_transitions_says_so_and_a_damaged_set_is_made_anew(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    words = ["run", "--env", "maze-umaze", "--work", str(tmp_path / "work"), "--seeds", "0", *SIZES]
    words += ["--learner", "td3bc", "--mix", "synthetic"]

    def rows(*more):
        out.unlink(missing_ok=True)
        assert offline_rl.main([*words, "--out", str(out), *more]) == 0
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    (whole,) = rows("--data", "unguided")
    (file,) = tmp_path.glob("work/*/*/drawn/*.pt")
    kept = torch.load(file)["samples"]
    file.write_bytes(file.read_bytes()[:100])
    (again,) = rows("--data", "unguided")
    assert again["figures"] == whole["figures"]
    assert torch.equal(torch.load(file)["samples"], kept)
    ended = replace(beds.task_of("maze-umaze"), ended=lambda seen: torch.ones(len(seen), dtype=torch.bool))
    monkeypatch.setitem(beds.TASKS, "maze-umaze", ended)
    said = "TreeSearchError: no transitions: all 6 trajectories begin where the task has ended"
    assert [row["error"] for row in rows("--data", "real", "unguided")] == [said, said]


def test_data_of_another_environment_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", **beds.task_of("maze-umaze").data(Path(), 60, 60)._asdict())
    words = ["run", "--env", "hopper-medium", "--dataset", str(tmp_path / "own.npz"), *SIZES]
    assert offline_rl.main([*words, "--work", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]) == 1
    said = "observations of 4 numbers and actions of 2, but Hopper-v5 has 11 and 3: name the --env"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"n": 0}, "n is 0, expected 1 or more"),
        ({"starts": -1}, "starts is -1, expected 0 or more"),
        ({"n": 3, "starts": 4}, "n is 3, expected a trajectory of each of 4 starts"),
    ],
)
def test_sizes_that_leave_no_trajectories_are_refused(sizes, said):
    assert study.Protocol(n=1, starts=0, warmup=0).size == 1
    with pytest.raises(ValueError, match=said):
        study.Protocol(**sizes)


def test_a_chosen_lambda_has_cells_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "STRENGTHS", (3.0,))
    out, asked = tmp_path / "rows.jsonl", []
    make = synthetic.generate
    monkeypatch.setattr(
        synthetic, "generate", lambda *given, lam, **how: asked.append(lam) or make(*given, lam=lam, **how)
    )
    words = ["run", "--env", "maze-umaze", "--work", str(tmp_path / "work"), "--out", str(out), "--seeds", "0", *SIZES]
    assert offline_rl.main([*words, "--learner", "td3bc", "--data", "fk", "fk_chosen", "--mix", "synthetic"]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["data"], row["strength"]) for row in rows if "score" in row] == [("fk", None), ("fk_chosen", 3.0)]
    assert sorted(asked) == [1.0, 3.0, 3.0]  # the protocol's, the choice's, the cell's


def test_drawn_trajectories_cost_what_their_search_spent(monkeypatch):
    """Not what it might have spent."""
    made = SimpleNamespace(samples=torch.zeros(2, 3, 4), result=SimpleNamespace(cost=SimpleNamespace(nfe=7)))
    monkeypatch.setattr(synthetic, "generate", lambda *args, **how: made)
    how = {"lam": 1.0, "strength": 0.0, "seed": 0}
    assert synthetic.trajectories(None, None, "fk", 4, torch.zeros(0, 2), **how).nfe == 7


def test_a_behaviour_model_learns_to_go_on_from_a_start_and_from_anywhere(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(train_trajectory, "main", lambda args: told.append(args.unknown))
    beds.behaviour_model("hopper-medium", beds.Modelling(), tmp_path, tmp_path / "data.npz")
    mask = train_trajectory.draw_mask(torch.Size([400, 8, 5]), 3, 0, torch.Generator().manual_seed(0), told[0])
    assert 0.2 < mask[:, 0, 0].double().mean() < 0.8
    assert not mask[:, 1:].any()


def test_windows_hold_the_last_step_before_an_end_as_often_as_others(tmp_path, monkeypatch):
    told, horizon, steps = [], 8, 20
    monkeypatch.setattr(train_trajectory, "main", lambda args: told.append(args.absorbing))
    beds.behaviour_model("hopper-medium", beds.Modelling(horizon=horizon), tmp_path, tmp_path / "data.npz")
    one = OfflineData(
        observations=np.zeros((steps, 2), np.float32),
        actions=np.zeros((steps, 1), np.float32),
        rewards=np.ones(steps, np.float32),
        ends=np.array([steps]),
        terminated=np.array([True]),
        closing=np.zeros((1, 2), np.float32),
    )
    starts = train_trajectory.windows_of(absorbing(one, told[0]), 1, True).starts(horizon)
    counts = np.bincount((starts[:, None] + np.arange(horizon)).flatten())
    assert counts[:steps].tolist() == [*range(1, horizon), *[horizon] * (steps - horizon + 1)]


def test_nothing_is_known_of_windows_where_unknown_is_one():
    rng = torch.Generator().manual_seed(0)
    assert not train_trajectory.draw_mask(torch.Size([50, 8, 5]), 3, 2, rng, 1.0).any()
