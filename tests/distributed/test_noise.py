"""Learnt noise and critics on workers, which are sent what was learnt and not what it was learnt from."""

import threading

import pytest
import torch
from ray import cloudpickle

import treesearch as ts
from experiments.policies.two_routes import two_routes
from treesearch.backends.guidance.noise import NoiseProposal
from treesearch.backends.guidance.noise_law import NoiseLaw
from treesearch.backends.models.policy import policy
from treesearch.policies.critic import action_value
from treesearch.policies.dsrl import DSRL, Steering
from treesearch.policies.frozen import FrozenPolicy
from treesearch.policies.noise_env import NoiseEnv

SEEN = [{"start": [0.0, -1.0, 0.0, 0.0] * 2}, {"start": [0.5, -1.0, 0.0, 0.0] * 2}]


@pytest.fixture(scope="module")
def learnt():
    env = two_routes()
    env.unwrapped.window = threading.Lock()  # which nobody can send
    settings = Steering(warmup=2, every=2, width=8, batch_size=2, updates=1, noise_steps=1)
    return DSRL(NoiseEnv(env, FrozenPolicy(policy(num_steps=2))), settings).learn(4)


@pytest.mark.parametrize("kind", [NoiseProposal, NoiseLaw])
def test_workers_draw_the_same_noise_and_score_the_same(kind, learnt, three):
    kernel, reward = kind(policy(num_steps=2, eta=1.0), learnt), action_value(learnt)
    how = {"prompts": SEEN, "budget": ts.Budget(nfe=24), "progress": False}
    here, there = (ts.search(kernel, reward, ts.BestOfN(), workers=w, **how) for w in (None, three))
    for one, other in zip(here.tasks, there.tasks, strict=True):
        torch.testing.assert_close(one.rewards, other.rewards, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.log_weights, other.log_weights, rtol=1e-5, atol=1e-5)
    assert len(cloudpickle.dumps(kernel)) < 2**20
    assert len(cloudpickle.dumps(reward)) < 2**20
