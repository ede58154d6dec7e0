"""`treesearch plan`: policies of this library and of LeRobot, searched at every decision of an environment."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from tests.backends.test_lerobot import stand_in
from treesearch.backends import models
from treesearch.cli.main import main
from treesearch.planning.planner import Planner

MAZE = "experiments.policies.two_routes:TwoRoutes"
OURS = ["plan", "--policy", "two_routes.safetensors", "--num-steps", "2", "--nfe", "4", "--max-actions", "12"]


@pytest.fixture
def right(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def right(samples, prompts=None):\n"
        "    assert all(len(p['start']) == 8 for p in prompts)\n"
        "    return samples[..., 0].double().mean(1)\n"
        "def none():\n    import gymnasium\n    return gymnasium.make('MountainCarContinuous-v0')\n"
    )
    return f"{tmp_path}/mine.py:right"


def test_episodes_are_kept_and_the_same_command_goes_on(right, tmp_path, capsys):
    words = [*OURS, "--env", MAZE, "--reward", right, "--store", str(tmp_path / "plan")]
    assert main([*words, "--episodes", "1"]) == 0
    first = (tmp_path / "plan/episodes.jsonl").read_text()
    assert "did not succeed, return 0 after 12 actions" in capsys.readouterr().out
    assert main([*words, "--episodes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "plan/episodes.jsonl").read_text().startswith(first)
    assert [(line["seed"], line["actions"], line["decisions"], line["nfe"]) for line in found["each"]] == [
        (0, 12, 2, 8), (1, 12, 2, 8)
    ]  # fmt: skip
    assert (found["episodes"], found["success"], found["return"]) == (2, 0.0, 0.0)
    assert "| 1 | no | 0 | 12 | 2 | 8 |" in (tmp_path / "plan/README.md").read_text()
    assert main([*words, "--eta", "0.5"]) == 1
    assert "of another plan: its eta is 1.0, not 0.5; ask for the same, or name" in capsys.readouterr().err


@pytest.fixture
def begun(right, tmp_path, capsys):
    """Words of a plan with weights and a reward of its own, after its first episode, and its folder."""
    shutil.copy(Path(models.__file__).parents[1] / "weights/two_routes.safetensors", tmp_path / "own.safetensors")
    words = [*OURS, "--policy", f"{tmp_path}/own.safetensors", "--env", MAZE, "--reward", right]
    words += ["--store", str(tmp_path / "plan")]
    assert main([*words, "--episodes", "1"]) == 0
    capsys.readouterr()
    return words, tmp_path / "plan"


def test_a_plan_that_was_cut_off_goes_on_and_an_episode_counts_once(begun, capsys):
    words, folder = begun
    first = (folder / "episodes.jsonl").read_text()
    (folder / "episodes.jsonl").write_text(2 * first + first[:20])  # two that ran at once, and a crash
    assert main([*words, "--episodes", "2", "--json"]) == 0
    assert [line["seed"] for line in json.loads(capsys.readouterr().out)["each"]] == [0, 1]
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 0, 1]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("episodes.jsonl", '{"seed": 0}\n', "episodes.jsonl, line 1, is damaged: remove the line"),
        ("episodes.jsonl", "{\n", "episodes.jsonl, line 1, is damaged"),
        ("plan.json", "[1]", "plan.json is damaged: name another --store"),
        ("plan.json", "\x00", "plan.json is damaged"),
    ],
)
def test_a_damaged_folder_is_named(file, text, said, begun, capsys):
    words, folder = begun
    (folder / file).write_text(text)
    assert main([*words, "--episodes", "1"]) == 1
    assert said in capsys.readouterr().err


def test_other_weights_and_another_reward_under_the_same_names_are_another_plan(begun, tmp_path, capsys):
    words, _ = begun
    own = tmp_path / "own.safetensors"
    before = own.read_bytes()
    own.write_bytes(before[:-4] + b"\x00\x00\x00\x01")
    assert main([*words, "--episodes", "2"]) == 1
    assert "of another plan: its policy has other content by now; ask" in capsys.readouterr().err
    own.write_bytes(before)
    (tmp_path / "mine.py").write_text(
        "def right(samples, prompts=None):\n    return -samples[..., 0].double().mean(1)\n"
    )
    assert main([*words, "--episodes", "2"]) == 1
    assert "of another plan: its reward has other content by now; ask" in capsys.readouterr().err


def test_a_dry_run_says_what_it_costs_and_leaves_nothing(right, tmp_path, monkeypatch, capsys):
    taken = iter((9.0, 0.5))

    def act(self, history):
        assert history.shape == (2, 4)
        self.decisions.append(SimpleNamespace(seconds=next(taken)))

    monkeypatch.setattr(Planner, "act", act)
    words = [*OURS, "--env", MAZE, "--reward", right, "--store", str(tmp_path / "plan"), "--dry-run", "--json"]
    assert main([*words, "--episodes", "3", "--steps", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["decision_nfe"], found["decisions_at_most"], found["nfe_at_most"]) == (4, 9, 36)
    assert (found["decision_seconds"], found["seconds_at_most"]) == (0.5, 4.5)
    assert not (tmp_path / "plan").exists()


def test_a_critic_from_a_file_is_told_the_last_observation(tmp_path, capsys):
    (tmp_path / "q.py").write_text(
        "def q(observations, actions):\n"
        "    assert observations.shape[1] == 4\n"
        "    return actions[:, 0] + observations[:, 0]\n"
    )
    reward = f"critic({tmp_path}/q.py:q, (0, 2), last=4)"
    words = [*OURS, "--env", MAZE, "--reward", reward, "--episodes", "1", "--json", "--store", str(tmp_path / "plan")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["each"][0]["reward"] > -1
    assert main([*words[:-1], str(tmp_path / "other"), "--reward", "critic('q.py:q', (0, 2))"]) == 2
    assert "without quotes" in capsys.readouterr().err


def test_the_environment_is_its_own_model_by_default(tmp_path, capsys):
    assert main([*OURS, "--env", MAZE, "--episodes", "1", "--store", str(tmp_path / "plan"), "--eta", "0"]) == 0
    assert "BestOfN draws x_T" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env", "MountainCarContinuous-v0"], "the policy's have 2 numbers"),
        (["--env", "CartPole-v1"], "takes actions Discrete"),
        (["--env", f"{__file__}:Wide"], "shows 10 numbers, the policy is told 4"),
        (["--env", f"{__file__}:Older"], "makes Older, expected a gymnasium.Env"),
        (["--env", f"{__file__}:Lost"], "numbers that are not finite: [0.0, nan,"),
        (["--env", f"{__file__}:Shown"], "wrap it with gymnasium's FlattenObservation"),
        (["--env", "Cartpole-v1"], "did you mean 'CartPole-v1'"),
        (["--env", "Nowhere_UMaze-v3"], "those of another package are package:Name-v0"),
        (["--env", MAZE, "--device", "gpu"], "--device gpu: this torch cannot compute there"),
        (["--env", MAZE, "--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--env", MAZE, "--steps", "9"], "expected 1..8"),
        (["--env", MAZE, "--env-settings", "g"], "is no JSON"),
        (["--env", MAZE, "--env-settings", "3"], "expected an object"),
        (["--env", MAZE, "--nfe", "1"], "one rollout"),
        (["--env", MAZE, "--episodes", "0"], "expected 1 or more"),
        (["--env", MAZE, "--policy", "./nowhere"], "no policy at nowhere"),
        (["--env", MAZE, "--policy", ""], "--policy is empty: name a file"),
        (["--env", f"{__file__}:Bare"], "Bare has no action_space: expected an environment of gymnasium"),
        (["--env", MAZE, "--policy", "digits.safetensors"], "digits.safetensors"),
    ],
)
def test_words_that_cannot_be_right_are_named(words, said, tmp_path, capsys):
    assert main([*OURS, *words, "--store", str(tmp_path / "plan")]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()


def test_a_file_is_no_folder_of_a_plan(capsys):
    assert main([*OURS, "--env", MAZE, "--store", __file__]) == 1
    assert "test_plan.py is a file: name a folder with --store" in capsys.readouterr().err


class Shown(gymnasium.Env):
    """Shows what the stand-in for LeRobot's policies observes, and ends after some actions."""

    action_space = Box(-5.0, 5.0, (2,), np.float32)
    observation_space = Dict()
    lacks = ""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return self.seen(), {}

    def seen(self):
        every = {
            "agent_pos": np.full(2, 0.1 * self.made),
            "pixels": np.full((4, 4, 3), 10 * self.made, np.uint8),
            "environment_state": np.zeros(3),
        }
        return {name: value for name, value in every.items() if name != self.lacks}

    def step(self, action):
        self.made += 1
        return self.seen(), float(action[0]), self.made == 7, False, {"is_success": self.made == 7}


class Blind(Shown):
    lacks = "pixels"


class Bare(gymnasium.Env):
    """Does not say what it takes."""


class Wide(Shown):
    def seen(self):
        return np.zeros(10)


class Lost(Shown):
    def seen(self):
        return np.array([0.0, np.nan, 0.0, 0.0])


class Older:
    """No environment of gymnasium."""

    action_space = Box(-5.0, 5.0, (2,), np.float32)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder of a policy, and modules in LeRobot's place that read it."""
    policy, asked = stand_in(action="MIN_MAX"), []
    stats = {"action": {"min": np.array([-5.0, -5.0]), "max": np.array([5.0, 5.0])}}
    asked.append(SimpleNamespace(steps=[SimpleNamespace(stats=stats)]))
    modeling, factory = (ModuleType(f"lerobot.policies.{name}") for name in ("diffusion.modeling_diffusion", "factory"))
    modeling.DiffusionPolicy = SimpleNamespace(from_pretrained=lambda name: print("loading") or policy)
    factory.make_pre_post_processors = lambda config, name: asked
    for name in ("lerobot", "lerobot.policies", "lerobot.policies.diffusion"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lerobot.policies.diffusion.modeling_diffusion", modeling)
    monkeypatch.setitem(sys.modules, "lerobot.policies.factory", factory)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text('{"type": "diffusion"}')
    return SimpleNamespace(folder=folder, asked=asked)


def test_a_policy_of_lerobot_acts_by_what_it_is_shown(saved, tmp_path, capsys):
    words = ["plan", "--policy", str(saved.folder), "--env", f"{__file__}:Shown", "--nfe", "8", "--episodes", "1"]
    assert main([*words, "--store", str(tmp_path / "plan"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["each"][0]
    assert (found["actions"], found["decisions"], found["nfe"], found["success"]) == (7, 2, 16, True)
    blind = [word.replace(":Shown", ":Blind") for word in words]
    assert main([*blind, "--store", str(tmp_path / "other")]) == 1
    assert "but no 'observation.image', which the policy is told" in capsys.readouterr().err
    saved.asked.clear()
    assert main([*words, "--store", str(tmp_path / "other")]) == 1
    assert "no statistics to normalise by" in capsys.readouterr().err


def test_what_is_no_policy_of_lerobot_is_named(saved, capsys):
    words = ["plan", "--policy", str(saved.folder), "--env", MAZE]
    (saved.folder / "config.json").write_text('{"type": "act"}')
    assert main(words) == 1
    assert "is a policy of type 'act', expected 'diffusion'" in capsys.readouterr().err
    (saved.folder / "config.json").unlink()
    assert main(words) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_without_lerobot_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lerobot", None)
    assert main(["plan", "--policy", "lerobot/diffusion_pusht", "--env", "PushT-v0"]) == 1
    assert "install lerobot and this library in an environment of their own" in capsys.readouterr().err
