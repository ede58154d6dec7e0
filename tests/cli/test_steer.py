"""`treesearch steer`, and `treesearch plan --steering`: the noise of a frozen policy, learnt and acted with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from safetensors.torch import load_file

from experiments.policies.two_routes import TwoRoutes, two_routes
from tests.cli import test_plan
from treesearch.backends import models
from treesearch.backends.models.policy import policy, with_eta
from treesearch.cli import commands
from treesearch.cli.main import main
from treesearch.policies.dsrl import DSRL, Steering
from treesearch.policies.frozen import FrozenPolicy
from treesearch.policies.noise_env import NoiseEnv

MAZE = "experiments.policies.two_routes:TwoRoutes"
ACTING = ["--policy", "two_routes.safetensors", "--env", MAZE]
SMALL = ["--warmup", "4", "--every", "4", "--updates", "1", "--noise-steps", "1", "--batch-size", "4", "--width", "8"]
LEARN = ["steer", *ACTING, *SMALL, "--num-steps", "2"]
SEEN = [[0.0, -1.0, 0.0, 0.0], [0.1, -0.9, 0.1, 0.2]]


class Great(TwoRoutes):
    """Rewards that no critic bears."""

    def step(self, action):
        seen, _, *rest = super().step(action)
        return seen, 1e30, *rest


class Stopped(TwoRoutes):
    """Somebody types Ctrl-C in its sixth chunk."""

    actions = 0

    def step(self, action):
        type(self).actions += 1
        if self.actions == 45:
            raise KeyboardInterrupt
        return super().step(action)


class Other(TwoRoutes):
    """The same with another reward."""

    def step(self, action):
        seen, reward, *rest = super().step(action)
        return seen, reward - 0.01, *rest


def state_of(folder):
    (file,) = folder.glob("state-*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    """The folder of one that has learnt a little."""
    folder = tmp_path_factory.mktemp("steer") / "dsrl"
    assert main([*LEARN, "--chunks", "12", "--store", str(folder), "--json"]) == 0
    return folder


def planned(*words):
    """The command of a plan, to ask what it does."""
    return commands.parse(["plan", *ACTING, *words], None)


def test_learning_that_goes_on_is_that_in_one_go(learner, tmp_path, capsys):
    words = [*LEARN, "--store", str(tmp_path / "dsrl")]
    assert main([*words, "--chunks", "8"]) == 0
    assert "chunks      8/8" in (said := capsys.readouterr().out)
    assert "no episode has ended" in said
    assert f"it alone: treesearch plan --policy two_routes.safetensors --env {MAZE} --steering" in said
    assert main([*words, "--chunks", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 12
    whole, again = state_of(learner), state_of(tmp_path / "dsrl")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert main([*words, "--chunks", "12", "--lr", "1e-3"]) == 1
    assert "of another learner: its lr is 0.0003, not 0.001" in capsys.readouterr().err
    assert main([*words, "--chunks", "12", "--seed", "1"]) == 1
    out, err = capsys.readouterr()
    assert "its seed is 0, not 1; ask for the same, or name another folder" in err
    assert "nothing is left to learn" not in out + err


def test_the_store_of_a_learner_in_python_is_the_commands(learner, tmp_path):
    settings = {"warmup": 4, "every": 4, "updates": 1, "noise_steps": 1, "batch_size": 4, "width": 8}
    env = NoiseEnv(two_routes(), FrozenPolicy(policy(num_steps=2)))
    made = DSRL(env, Steering(**settings)).learn(12, store=tmp_path / "dsrl")
    assert planned("--steering", str(tmp_path / "dsrl"))._learnt.fingerprint == made.fingerprint
    assert planned("--steering", str(learner))._learnt.fingerprint == made.fingerprint
    assert made.fingerprint != made.learn(16).fingerprint


def test_what_was_learnt_before_it_was_interrupted_is_kept(tmp_path, capsys):
    words = [*LEARN, "--env", f"{__file__}:Stopped", "--chunks", "8", "--store", str(tmp_path / "dsrl")]
    assert main(words) == 130
    assert "go on by the same command with --store" in capsys.readouterr().err
    assert json.loads((tmp_path / "dsrl/dsrl.json").read_text())["steps"] == 4
    assert main(words) == 0


@pytest.mark.parametrize("more", [["--leaves", "3", "--backup", "2"], ["--method", "sac"]])
def test_a_dry_run_knows_what_learning_evaluates(more, tmp_path, capsys):
    words = [*LEARN, *more, "--chunks", "8", "--store", str(tmp_path / "dsrl"), "--json"]
    assert main([*words, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "dsrl").exists()
    assert main(words) == 0
    assert (said["chunks"], said["gradient_steps"]) == (8, 4)
    assert said["nfe"] == json.loads(capsys.readouterr().out)["nfe"]
    assert main([*words, "--chunks", "12", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 4


def test_a_learner_that_diverges_keeps_its_last_finite_weights(tmp_path, capsys):
    words = [*LEARN, "--env", f"{__file__}:Great", "--chunks", "12", "--store", str(tmp_path / "dsrl")]
    assert main(words) == 1
    assert "the last finite weights are kept: scale rewards" in capsys.readouterr().err
    assert json.loads((tmp_path / "dsrl/dsrl.json").read_text())["steps"] == 5
    kept = {name: value for name, value in state_of(tmp_path / "dsrl").items() if name.startswith("weights")}
    assert kept
    assert all(value.isfinite().all() for value in kept.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chunks", "6"], "expected a multiple of --every 4"),
        (["--chunks", "4"], "nothing is learnt from the first --warmup 4"),
        (["--steps", "9"], "expected 1..8"),
        (["--env", "MountainCarContinuous-v0"], "the policy's have 2 numbers"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--bound", "0"], "bound is 0.0, expected a positive number"),
        (["--store", str(Path(__file__).parent)], "is no learner and not empty"),
        (["--store", __file__], "test_steer.py is a file: name a folder with --store"),
    ],
)
def test_words_that_cannot_be_right_are_named(words, said, tmp_path, capsys):
    assert main([*LEARN, "--chunks", "8", "--store", str(tmp_path / "dsrl"), *words]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "dsrl").exists()


def test_a_policy_of_other_noise_shares_its_network():
    noisy = policy(num_steps=2, eta=1.0)
    assert with_eta(noisy, 0.0).fingerprint == policy(num_steps=2, eta=0.0).fingerprint != noisy.fingerprint
    assert with_eta(noisy, 0.0).network is noisy.network


# LeRobot's


saved = test_plan.saved  # a fixture


class Pushed(test_plan.Shown):
    """With the spaces of what it shows."""

    observation_space = Dict({
        "agent_pos": Box(-10.0, 10.0, (2,)), "pixels": Box(0, 255, (4, 4, 3), np.uint8),
        "environment_state": Box(-10.0, 10.0, (3,)),
    })  # fmt: skip

    def seen(self):
        return {name: value.astype(self.observation_space[name].dtype) for name, value in super().seen().items()}


def test_a_learner_on_a_policy_of_lerobot_observes_what_its_network_is_told(saved, tmp_path, capsys):
    acting = ["--policy", str(saved.folder), "--env", f"{__file__}:Pushed"]
    learn = ["steer", *acting, *SMALL, "--num-steps", "2", "--chunks", "8", "--store", str(tmp_path / "dsrl")]
    assert main(learn) == 0
    plan = commands.parse(["plan", *acting, "--steering", str(tmp_path / "dsrl"), "--nfe", "4"], None)
    history = np.linspace(0, 1, plan._opened.kernel.observed, dtype=np.float32)
    told = plan._opened.kernel.encode([{"start": history.tolist()}])["condition"]
    assert told.shape[1] < len(history)
    torch.testing.assert_close(plan._learnt.observations([{"start": history.tolist()}]), told)
    assert state_of(tmp_path / "dsrl")["replay.observations"].shape == (8, 1, told.shape[1])
    torch.testing.assert_close(
        plan._learnt.frozen.states(told, z := torch.randn(1, plan._learnt.frozen.size)),
        FrozenPolicy(with_eta(plan._opened.kernel, 0.0)).states(torch.from_numpy(history)[None], z),
    )
    words = ["plan", *acting, "--steering", str(tmp_path / "dsrl"), "--nfe", "4", "--episodes", "1"]
    assert main([*words, "--store", str(tmp_path / "plan"), "--json"]) == 0
    assert '"decisions": 2' in capsys.readouterr().out


# plans


def test_the_chunk_of_largest_q_is_made(learner):
    plan = planned("--steering", str(learner), "--method", "best_of_n", "--nfe", "16")
    planner, dsrl = plan._planner(0), plan._learnt
    planner.act(torch.tensor(SEEN))
    samples = planner.result.tasks[0].samples
    seen = torch.tensor(SEEN).reshape(1, -1).expand(len(samples), -1)
    worth = dsrl.q_action(seen, plan._opened.kernel.encode_samples(samples))
    assert len(samples) == 8
    assert len(worth.unique()) > 1
    torch.testing.assert_close(planner.decision.plans[0], samples[worth.argmax()])
    torch.testing.assert_close(planner.decision.rewards[0], worth.max(), rtol=1e-4, atol=1e-5)


def test_one_chunk_without_noise_is_the_learner_alone(learner, monkeypatch):
    plan = planned("--steering", str(learner), "--method", "best_of_n(n=1)", "--eta", "0")
    dsrl, drawn = plan._learnt, []
    noise = type(dsrl).noise
    monkeypatch.setattr(type(dsrl), "noise", lambda self, seen, z=None: drawn.append((seen, z)) or noise(self, seen, z))
    found = plan._planner(3).act(torch.tensor(SEEN))
    (seen, z), *_ = drawn
    torch.testing.assert_close(seen, torch.tensor(SEEN).reshape(1, -1))
    torch.testing.assert_close(found, dsrl.actions(seen, z)[0])
    alone = ["--method", "best_of_n(n=1)", "--eta", "0", "--num-steps", "2", "--reward", "action_bounds((0, 2))"]
    assert not torch.allclose(found, planned(*alone)._planner(3).act(torch.tensor(SEEN)))


def test_a_plan_is_of_one_learner(learner, tmp_path, capsys):
    shutil.copytree(learner, tmp_path / "dsrl")
    words = ["plan", *ACTING, "--steering", str(tmp_path / "dsrl"), "--nfe", "4", "--max-actions", "8"]
    words += ["--episodes", "1", "--store", str(tmp_path / "plan")]
    assert main(words) == 0
    told = json.loads((tmp_path / "plan/plan.json").read_text())
    assert (told["eta"], told["num_steps"], told["reward"]) == (0.5, None, None)
    assert main([*LEARN, "--chunks", "16", "--store", str(tmp_path / "dsrl")]) == 0
    assert main(words) == 1
    assert "of another plan: its steering has other content by now; ask" in capsys.readouterr().err


def test_a_learner_of_something_else_is_refused(learner, tmp_path, capsys):
    own = tmp_path / "own.safetensors"
    before = (Path(models.__file__).parents[1] / "weights/two_routes.safetensors").read_bytes()
    own.write_bytes(before[:-4] + b"\x00\x00\x00\x01")
    (tmp_path / "none").mkdir()
    warm = tmp_path / "warm"
    shutil.copytree(learner, warm)
    told = json.loads((warm / "dsrl.json").read_text())
    (warm / "dsrl.json").write_text(json.dumps(told | {"steps": 4}))
    for words, said in (
        (["--policy", str(own)], "was learnt for another policy, or other weights of it"),
        (["--env", f"{__file__}:Other"], "was learnt for another environment"),
        (["--env", "MountainCarContinuous-v0"], "the policy's have 2 numbers"),
        (["--num-steps", "3"], "the noise was learnt for 2 steps, leave it out"),
        (["--steering", str(tmp_path / "none")], "no learner in"),
        (["--steering", str(warm)], "has learnt nothing yet, its 4 chunks are warm-up"),
    ):
        assert main(["plan", *ACTING, "--steering", str(learner), *words, "--store", str(tmp_path / "plan")]) in (1, 2)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()


def test_a_learner_without_a_critic_of_chunks_asks_for_a_reward(tmp_path, capsys):
    assert main([*LEARN, "--method", "sac", "--chunks", "8", "--store", str(tmp_path / "dsrl")]) == 0
    assert "--reward env" in capsys.readouterr().out
    words = ["plan", *ACTING, "--steering", str(tmp_path / "dsrl"), "--max-actions", "8", "--episodes", "1"]
    words += ["--nfe", "4", "--store", str(tmp_path / "plan")]
    assert main(words) == 2
    assert "no critic of chunks: name a --reward, such as env" in capsys.readouterr().err
    assert main([*words, "--reward", "env"]) == 0
