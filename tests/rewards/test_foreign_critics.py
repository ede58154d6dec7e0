"""Critics and policies of other libraries as rewards: Stable-Baselines3, and d3rlpy and TorchRL where installed."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from treesearch.rewards.trajectories.critic import Critic
from treesearch.rewards.trajectories.foreign import StableBaselinesPolicy, StableBaselinesQ, d3rlpy_q, torchrl_q
from treesearch.rewards.trajectories.policy import PolicyLikelihood

GENERATOR = torch.Generator().manual_seed(0)
S, A = 5 * torch.randn(6, 3, generator=GENERATOR), torch.rand(6, 2, generator=GENERATOR) * 3 - 0.5


class World(gymnasium.Env):
    """Actions in [-1, 3]²."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-1.0, 3.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample() * 3 + 1, {}

    def step(self, action):
        return self.observation_space.sample() * 3 + 1, 0.0, False, True, {}


def agent(kind, normalised=True, norm_obs=True, **settings):
    envs = DummyVecEnv([World])
    if normalised:
        envs = VecNormalize(envs, norm_obs=norm_obs)
        envs.seed(0)
        envs.reset()
        for _ in range(20):
            envs.step(np.zeros((1, 2), np.float32))
    return kind("MlpPolicy", envs, policy_kwargs={"net_arch": [8]}, device="cpu", seed=0, **settings)


def test_rewards_alone_are_normalised():
    model = agent(SAC, norm_obs=False)
    own = torch.cat(model.critic(S, torch.as_tensor(model.policy.scale_action(A.numpy()))), 1).amin(1)
    torch.testing.assert_close(StableBaselinesQ(model)(S, A), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [SAC, TD3])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_critic_of_stable_baselines_is_asked_in_its_own_units(kind, normalised):
    model = agent(kind, normalised)
    seen = S.numpy()
    if normalised:
        model.get_vec_normalize_env().clip_obs = 0.5
        seen = model.get_vec_normalize_env().normalize_obs(seen)
        assert abs(seen).max() == 0.5
    scaled = torch.as_tensor(model.policy.scale_action(A.numpy()))
    own = torch.cat(model.critic(torch.as_tensor(seen), scaled), 1).amin(1)
    torch.testing.assert_close(StableBaselinesQ(model)(S, A), own, atol=1e-5, rtol=1e-5)
    plans = torch.cat([S, A], 1)[:, None].requires_grad_()
    reward = Critic(StableBaselinesQ(model), (3, 2))
    torch.testing.assert_close(reward(plans).float(), own, atol=1e-5, rtol=1e-5)
    reward.attached(plans).sum().backward()
    assert plans.grad.abs().sum() > 0


def test_a_policy_of_stable_baselines_has_its_density():
    model = agent(SAC)
    policy = StableBaselinesPolicy(model)
    seen = torch.as_tensor(model.get_vec_normalize_env().normalize_obs(S.numpy()))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        scaled, own = model.actor.action_log_prob(seen)
    made = torch.as_tensor(model.policy.unscale_action(scaled.numpy()))
    left = 1 - scaled.double().square()
    own += torch.log(1 + model.actor.action_dist.epsilon / left).sum(1)  # the library's is off by that near the bounds
    expected = own.float() - 2 * math.log(2)
    torch.testing.assert_close(policy.log_prob(S, made).detach(), expected, atol=2e-4, rtol=2e-4)
    plans = torch.cat([S, A], 1)[:, None]
    found = PolicyLikelihood(policy, (3, 2))(plans)
    torch.testing.assert_close(found.float(), policy.log_prob(S, A), atol=1e-5, rtol=1e-5)


def test_agents_without_what_is_asked_are_refused():
    with pytest.raises(ValueError, match="PPO has no critic of actions"):
        StableBaselinesQ(agent(PPO, False))
    with pytest.raises(ValueError, match="use_sde=False"):
        StableBaselinesPolicy(agent(SAC, False, use_sde=True))
    with pytest.raises(ValueError, match="TD3 has no density"):
        StableBaselinesPolicy(agent(TD3, False))


class Module:
    """What a TorchRL critic is, as far as it is asked."""

    in_keys, out_keys = ["observation", "action"], ["state_action_value"]

    def __call__(self, observation, action):
        return observation.sum(1, keepdim=True) * action.prod(1, keepdim=True)


class Algorithm:
    """What a d3rlpy algorithm is, as far as it is asked."""

    def predict_value(self, x, action):
        return x.sum(1) * action.prod(1)


@pytest.mark.parametrize("q", [torchrl_q(Module()), d3rlpy_q(Algorithm())])
def test_others_are_asked_by_row(q):
    plans = torch.cat([S, A], 1)[:, None]
    torch.testing.assert_close(Critic(q, (3, 2))(plans).float(), S.sum(1) * A.prod(1))


def test_torchrls_critic_with_other_keys_is_refused():
    with pytest.raises(ValueError, match="expected 'pixels'"):
        torchrl_q(Module(), observation="pixels")


def test_a_real_critic_of_torchrl():
    modules = pytest.importorskip("torchrl.modules")
    network = modules.MLP(in_features=5, out_features=1, num_cells=[8])
    critic = modules.ValueOperator(network, in_keys=["observation", "action"])
    torch.testing.assert_close(torchrl_q(critic)(S, A), network(S, A)[:, 0])


def test_a_real_critic_of_d3rlpy():
    d3rlpy = pytest.importorskip("d3rlpy")
    scaler = d3rlpy.preprocessing.StandardObservationScaler(mean=np.ones(3), std=2 * np.ones(3))
    made = [d3rlpy.algos.SACConfig(observation_scaler=s).create(device="cpu:0") for s in (scaler, None)]
    for one in made:
        one.create_impl((3,), 2)
    made[1].impl.modules.q_funcs.load_state_dict(made[0].impl.modules.q_funcs.state_dict())
    found = d3rlpy_q(made[0])(S, A)
    torch.testing.assert_close(found, d3rlpy_q(made[1])((S - 1) / (2 + scaler.eps), A), atol=1e-5, rtol=1e-5)
    assert math.isfinite(found.sum())


def test_a_critic_judges_chunks_by_what_their_prompts_say_was_observed():
    model = agent(SAC)
    chunks = torch.stack([A, A + 9], 1)
    prompts = [{"start": [9.0, 9.0, 9.0, *row]} for row in S.tolist()]
    found = Critic(StableBaselinesQ(model), (0, 2), last=3)(chunks, prompts)
    torch.testing.assert_close(found, Critic(StableBaselinesQ(model), (3, 2))(torch.cat([S, A], 1)[:, None]))
    for wrong in (None, [{"start": [1.0, 2.0]}] * 6):
        with pytest.raises(ValueError, match="where 3 was observed"):
            Critic(StableBaselinesQ(model), (0, 2), last=3)(chunks, wrong)
    with pytest.raises(ValueError, match="row=0"):
        Critic(StableBaselinesQ(model), (0, 2), row=-1)
