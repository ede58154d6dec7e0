"""Environments of noise: chunks made one action after the other, and input that cannot be right."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

from experiments.policies.bandit import bandit, ring
from experiments.policies.two_routes import two_routes
from treesearch.backends.models.policy import policy
from treesearch.policies.frozen import FrozenPolicy
from treesearch.policies.noise_env import Among, NoiseEnv, Prompted
from treesearch.rewards.base import Reward


class World(gymnasium.Env):
    """Counts actions; ends after `length` of them."""

    def __init__(self, length=100, shape=(8,), reward=1.0, named=False, actions=2):
        self.action_space = Box(-1.0, 1.0, (actions,), np.float32)
        space = Box(-np.inf, np.inf, shape, np.float32)
        self.observation_space = Dict({"state": space}) if named else space
        self.length, self.reward, self.named, self.made = length, reward, named, []

    def seen(self):
        shape = self.observation_space["state"].shape if self.named else self.observation_space.shape
        value = np.full(shape, 0.1 * len(self.made), np.float32)
        return {"state": value} if self.named else value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = []
        return self.seen(), {}

    def step(self, action):
        self.made.append(action)
        return self.seen(), self.reward, len(self.made) >= self.length, False, {}


def frozen():
    return FrozenPolicy(policy(num_steps=2))


def test_a_chunk_is_made_and_its_rewards_are_summed():
    world = World()
    env = NoiseEnv(world, frozen(), execute=5)
    env.reset()
    w = 0.3 * np.ones(16, np.float32)
    _, reward, ended, cut, info = env.step(w)
    assert (reward, ended, cut) == (5.0, False, False)
    chunk = frozen().actions(torch.zeros(1, 8), torch.as_tensor(w)[None])[0, :5].clamp(-1, 1)
    np.testing.assert_allclose(np.stack(world.made), chunk.numpy(), atol=1e-6)
    assert info["state"].shape == (16,)
    env.step(w)  # where the first chunk led
    chunk = frozen().actions(torch.full((1, 8), 0.5), torch.as_tensor(w)[None])[0, :5].clamp(-1, 1)
    np.testing.assert_allclose(np.stack(world.made[5:]), chunk.numpy(), atol=1e-6)


def test_no_more_actions_are_made_than_samples_have():
    """A kernel whose samples are a part of a chunk."""
    kernel = policy(num_steps=2)
    object.__setattr__(kernel, "window", (1, 5))
    assert NoiseEnv(World(), FrozenPolicy(kernel)).execute == 4
    with pytest.raises(ValueError, match=r"expected 1..4"):
        NoiseEnv(World(), FrozenPolicy(kernel), execute=5)


def test_a_kernel_that_begins_at_its_own_noise_is_refused():
    class Begun:
        stochastic = torch.tensor([False, False, False])

        def __getattr__(self, name):
            return getattr(ring(2), name)

    with pytest.raises(ValueError, match="undo its from_noise"):
        FrozenPolicy(Begun(), ask=Among([None]))


def test_an_episode_that_ends_within_a_chunk_ends_there():
    env = NoiseEnv(World(length=3), frozen())
    env.reset()
    assert env.step(np.zeros(16, np.float32))[1:4] == (3.0, True, False)
    env = NoiseEnv(gymnasium.wrappers.TimeLimit(World(), 3), frozen())
    env.reset()
    assert env.step(np.zeros(16, np.float32))[1:4] == (3.0, False, True)  # a limit of time is no end


def test_the_maze_under_a_policy_has_noise_for_actions():
    env = NoiseEnv(two_routes(), frozen())
    seen, _ = env.reset(seed=0)
    assert env.observation_space.contains(seen)
    assert env.action_space.shape == (16,)
    assert (env.action_space.high == 1.5).all()
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])


@pytest.mark.parametrize(
    ("world", "how", "words"),
    [
        ({"shape": (4,)}, {}, "has 4 numbers, expected 8"),
        ({"named": True}, {}, r"keys \['state'\]: say by `read`"),
        ({"named": True}, {"read": lambda seen: seen["pixels"]}, r"no 'pixels', only \['state'\]"),
        ({}, {"read": lambda seen: (seen, 1.0)}, "an observation is a tuple, expected numbers"),
        ({}, {"read": lambda seen: seen * np.nan}, "an observation has numbers that are not finite"),
        ({"reward": float("nan")}, {}, "reward is nan"),
        ({"reward": None}, {}, "reward is None"),
        ({"actions": 1}, {}, r"actions have shape \(2,\), the environment takes Box"),
        ({}, {"execute": 9}, r"expected 1..8"),
        ({}, {"bound": 0.0}, "positive number"),
    ],
)
def test_input_that_cannot_be_right_is_named(world, how, words):
    def played():
        env = NoiseEnv(World(**world), frozen(), **how)
        env.reset()
        env.step(np.zeros(16, np.float32))

    with pytest.raises(ValueError, match=words):
        played()


def test_named_observations_are_read():
    env = NoiseEnv(World(named=True), frozen(), read=lambda seen: seen["state"])
    assert env.reset()[0].shape == (8,)


def test_actions_in_other_units_are_refused():
    kernel = policy(num_steps=2)
    object.__setattr__(kernel, "actions", type(kernel.actions)((0.0, 0.0), (50.0, 50.0)))
    env = NoiseEnv(World(), FrozenPolicy(kernel))
    env.reset()
    with pytest.raises(ValueError, match="are they normalised"):
        env.step(np.ones(16, np.float32))


def test_a_kernel_that_is_told_nothing_needs_to_say_what_observations_stand_for():
    with pytest.raises(ValueError, match="say by `ask`"):
        FrozenPolicy(ring(2))
    with pytest.raises(ValueError, match="observed"):
        NoiseEnv(World(), bandit(ring(2)).frozen)
    with pytest.raises(ValueError, match="one prompt or more"):
        Prompted(bandit(ring(2)).frozen, Reward(lambda s, p: s.sum(1)), [])
    env = Prompted(FrozenPolicy(ring(2), ask=Among([None])), Reward(lambda s, p: s.sum(1) - torch.inf), [None])
    env.reset()
    with pytest.raises(ValueError, match="learn from finite rewards"):
        env.step(np.zeros(2, np.float32))


def test_a_learner_may_observe_what_the_network_is_told():
    whole, encoded = frozen(), FrozenPolicy(policy(num_steps=2), encoded=True)
    seen, w = torch.randn(3, 8), torch.randn(3, 16)
    told = encoded.features(seen)
    assert not torch.allclose(told, seen)
    torch.testing.assert_close(encoded.states(told, w), whole.states(seen, w))
    assert np.array_equal(NoiseEnv(World(), encoded).reset()[0], encoded.features(torch.zeros(1, 8))[0])
    assert encoded.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match="no row of numbers: leave encoded=True out"):
        FrozenPolicy(ring(2), ask=Among([None]), encoded=True)
