"""DSRL on bandits with a known optimum: what it reaches, that the policy stays a black box, and that runs go on."""

import copy

import numpy as np
import pytest
import torch
from gymnasium.wrappers import FrameStackObservation, TransformReward

from experiments.policies.bandit import BOUND, bandit, folded, near, optimum, ring, worth
from experiments.policies.two_routes import TwoRoutes, two_routes
from tests.support import tiny
from treesearch.backends.models.policy import policy
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.errors import StoreError
from treesearch.policies.critic import action_value
from treesearch.policies.dsrl import DSRL, Steering
from treesearch.policies.frozen import FrozenPolicy
from treesearch.policies.learner import Diverged
from treesearch.policies.noise_env import Among, NoiseEnv, Prompted
from treesearch.rewards.base import Reward
from treesearch.rewards.images.image import brightness

ONE = torch.ones(1, 1)
SMALL = {
    "updates": 1, "noise_steps": 1, "batch_size": 64, "width": 32, "layers": 2, "lr": 3e-3, "tau": 0.05,
    "temperature": 0.01, "warmup": 100, "every": 50, "replay": 1000,
}  # fmt: skip


def learnt(method, steps, seed=0, env=None, **settings):
    made = DSRL(env or bandit(ring(4)), Steering(method=method, **SMALL | settings), seed=seed)
    return made.learn(steps)


@pytest.mark.parametrize(("method", "steps"), [("na", 300), ("sac", 250)])
def test_the_bandit_is_solved_to_95_percent_of_its_optimum(method, steps):
    env = bandit(ring(4))
    best, base = optimum(env, side=100)
    assert 2 * base < best
    for seed in range(3):
        made = learnt(method, steps, seed)
        assert worth(env, made.noise(ONE)).item() >= 0.95 * best


def test_two_noises_of_one_action_are_worth_the_same():
    env = bandit(folded())
    made = learnt("na", 200, env=env, noise_steps=6)
    w = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)).clamp(-BOUND, BOUND)
    mine, other = (made.q_noise(ONE.expand(256, 1), v) for v in (w, -w))
    states = env.frozen.states(ONE.expand(256, 1), w)
    through = made.q_action(ONE.expand(256, 1), states)
    assert (mine - other).abs().mean() < 0.25 * worth(env, w).std()
    assert (mine - through).abs().mean() < 0.25 * worth(env, w).std()
    assert np.corrcoef(mine.numpy(), worth(env, w).numpy())[0, 1] > 0.8


def test_the_policy_is_a_black_box():
    kernel, asked = ring(2), []
    network = kernel.model

    def watched(x, timestep):
        asked.append(x.requires_grad or torch.is_grad_enabled())
        return network(x, timestep)

    kernel.model = watched
    learnt("na", 50, env=bandit(kernel), warmup=25, batch_size=16)
    assert len(asked) > 50
    assert not any(asked)


@pytest.mark.parametrize("method", ["na", "sac"])
def test_a_run_goes_on_bit_for_bit_where_it_was(tmp_path, method):
    settings = {"warmup": 25, "batch_size": 16, "every": 25}
    whole = learnt(method, 75, **settings)
    part = DSRL(bandit(ring(4)), Steering(method=method, **SMALL | settings)).learn(50, store=tmp_path)
    assert part.steps == 50
    state = torch.random.get_rng_state()
    again = DSRL(bandit(ring(4)), Steering(method=method, **SMALL | settings)).learn(75, store=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.episodes == whole.episodes
    assert len(again.episodes) == 75
    for name, value in whole.learner.weights().items():
        assert torch.equal(value, again.learner.weights()[name]), name
    assert len(list(tmp_path.glob("state-*"))) == 1
    other = DSRL(bandit(ring(4)), Steering(method=method, **SMALL | settings), seed=1)
    with pytest.raises(StoreError, match="its seed is 0, not 1"):
        other.load(tmp_path)
    with pytest.raises(StoreError, match="no learner in"):
        other.load(tmp_path / "elsewhere")


def test_a_store_is_of_one_policy_reward_and_environment(tmp_path):
    """What differs is named, by a learner that begins and by one that has learnt already; nothing is overwritten."""
    settings = Steering(method="sac", **SMALL | {"warmup": 4, "every": 4, "batch_size": 4, "width": 8})

    def one(kernel=None, reward=near, prompts=(None,)):
        frozen = FrozenPolicy(kernel or ring(2), ask=Among(prompts))
        return DSRL(Prompted(frozen, Reward(reward), prompts, bound=BOUND), settings)

    one().learn(4, store=tmp_path)
    kept = (tmp_path / "dsrl.json").read_bytes()
    for other, what in (
        (one(kernel=ring(5)), "policy"),
        (one(kernel=folded()), "policy"),
        (one(reward=lambda samples, prompts: -near(samples, prompts)), "reward"),
        (one(prompts=("a",)), "prompts"),
    ):
        for _ in range(2):
            with pytest.raises(StoreError, match=f"of another learner: its {what} is"):
                other.learn(8, store=tmp_path)
            other.learn(4)
    assert (tmp_path / "dsrl.json").read_bytes() == kept
    assert one().learn(8, store=tmp_path).steps == 8


def test_a_damaged_store_is_named(tmp_path):
    made = learnt("sac", 4, warmup=4, every=4, batch_size=4, width=8)
    for name, text in (("dsrl.json", '{"state"'), ("dsrl.json", "[1]"), ("state-4.safetensors", "")):
        made.save(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(StoreError, match=f"{name} is damaged or gone: put a copy of the folder back"):
            made.load(tmp_path)
    made.save(tmp_path)
    (tmp_path / "state-4.safetensors").unlink()
    with pytest.raises(StoreError, match="damaged or gone"):
        made.load(tmp_path)


def test_a_store_is_of_as_many_actions_of_a_chunk(tmp_path):
    settings = Steering(method="sac", **SMALL | {"warmup": 2, "every": 2, "batch_size": 2, "width": 8})
    some = DSRL(NoiseEnv(two_routes(), FrozenPolicy(policy(num_steps=1)), execute=3), settings)
    some.learn(2, store=tmp_path)
    with pytest.raises(StoreError, match="its execute is 3, not 8"):
        DSRL(NoiseEnv(two_routes(), FrozenPolicy(policy(num_steps=1))), settings).learn(2, store=tmp_path)


def test_a_store_is_of_one_environments_rewards(tmp_path):
    """Another class, another wrapper's function, other settings of one class."""
    settings = Steering(method="sac", **SMALL | {"warmup": 2, "every": 2, "batch_size": 2, "width": 8})

    class Slower(TwoRoutes):
        def step(self, action):
            seen, reward, *rest = super().step(action)
            return seen, reward - 0.01, *rest

    def one(env):
        return DSRL(NoiseEnv(FrameStackObservation(env, 2), FrozenPolicy(policy(num_steps=1))), settings)

    one(TwoRoutes()).learn(2, store=tmp_path / "plain")
    one(TransformReward(TwoRoutes(), lambda r: 2 * r)).learn(2, store=tmp_path / "twice")
    assert one(TwoRoutes()).learn(4, store=tmp_path / "plain").steps == 4
    assert one(TransformReward(TwoRoutes(), lambda r: 2 * r)).learn(4, store=tmp_path / "twice").steps == 4
    for folder, other, what in (
        ("plain", Slower(), "environment"),
        ("plain", TwoRoutes(spread=(0.3, 0.1)), "rewards"),
        ("plain", TransformReward(TwoRoutes(), lambda r: 2 * r), "rewards"),
        ("twice", TransformReward(TwoRoutes(), lambda r: 3 * r), "rewards"),
    ):
        with pytest.raises(StoreError, match=f"of another learner: its {what} is"):
            one(other).learn(6, store=tmp_path / folder)


def test_a_policy_that_cannot_be_told_has_no_store(tmp_path):
    class Nameless:
        fingerprint = None

        def __getattr__(self, name):
            return getattr(ring(2), name)

    made = DSRL(bandit(Nameless()), Steering(**SMALL))
    with pytest.raises(StoreError, match="no digest of the policy"):
        made.learn(50, store=tmp_path)


def test_the_best_of_several_leaves_is_made_and_kept():
    env = bandit(ring(4))
    plain, many = (learnt("na", 250, env=env, leaves=n) for n in (1, 8))
    earned = [np.mean([value for _, value in made.episodes[-100:]]) for made in (plain, many)]
    assert earned[1] > earned[0]
    kept = torch.as_tensor(many.learner.replay_buffer.actions[200:250, 0])
    assert near(kept, None).mean() == pytest.approx(np.mean([v for _, v in many.episodes[200:250]]), rel=1e-5)
    with pytest.raises(ValueError, match="judged by the critic of actions"):
        Steering(method="sac", leaves=8)


def test_what_is_asked_is_moved_to_the_learner():
    made = DSRL(bandit(ring(2)), Steering(**SMALL))
    for network in made.learner.modules_of().values():
        network.to("meta")
    made.learner.device = torch.device("meta")
    for found in (made.q_noise(ONE, torch.zeros(1, 2)), made.q_action(ONE, torch.zeros(1, 2)), made.noise(ONE)[0, :1]):
        assert (found.device.type, found.shape) == ("meta", (1,))


def test_what_is_told_is_the_smaller_critic_s_in_the_units_that_it_learns_in():
    made = DSRL(bandit(ring(2)), Steering(**SMALL))
    made.learner.noise_critic = made.learner.critic = lambda seen, x: (x[:, :1], -x[:, 1:])
    given = torch.tensor([[0.6, 0.9], [0.6, -0.3]])
    assert made.q_action(ONE.expand(2, 1), given).tolist() == pytest.approx([-0.9, 0.3])
    assert made.q_noise(ONE.expand(2, 1), given).tolist() == pytest.approx([-0.9 / BOUND, 0.3 / BOUND])


def test_settings_are_the_learner_s():
    made = DSRL(bandit(ring(2)), Steering(**SMALL, target_entropy=0.7, gamma=0.8)).learner
    found = (made.target_entropy, made.gamma, made.tau, made.batch_size, made.gradient_steps, made.learning_starts)
    assert found == (0.7, 0.8, *(SMALL[name] for name in ("tau", "batch_size", "updates", "warmup")))
    assert (made.lr_schedule(1), made.buffer_size) == (SMALL["lr"], SMALL["replay"])


def test_observations_of_another_shape_are_refused():
    made = DSRL(bandit(ring(2)), Steering(**SMALL))
    for seen in (torch.ones(1, 3), torch.full((1, 1), torch.nan)):
        for asked in (made.noise, made.moments, lambda s: made.q_noise(s, torch.zeros(1, 2))):
            with pytest.raises(ValueError, match=r"expected \(n, 1\), finite"):
                asked(seen)


def test_a_reward_of_the_critics_is_of_those_when_it_was_made():
    made = learnt("na", 50, warmup=40, batch_size=16)
    reward, states = action_value(made), torch.zeros(1, 2)
    before = reward(states, [None])
    torch.testing.assert_close(before, made.q_action(ONE, states))
    made.learn(100)
    assert torch.equal(reward(states, [None]), before)
    assert not torch.equal(made.q_action(ONE, states), before)
    assert action_value(made).settings != reward.settings


def test_segments_begin_in_an_environment_that_begins_anew(tmp_path):
    """A walk that a segment cut off would go on in one run, and not in the run that was interrupted."""

    def walker():
        env = NoiseEnv(two_routes(), FrozenPolicy(policy(num_steps=1)))
        return DSRL(env, Steering(method="sac", **SMALL | {"warmup": 4, "every": 4, "batch_size": 4, "width": 8}))

    whole = walker().learn(12)
    walker().learn(8, store=tmp_path)
    again = walker().learn(12, store=tmp_path)
    for name, value in whole.learner.weights().items():
        assert torch.equal(value, again.learner.weights()[name]), name


@pytest.mark.parametrize("method", ["na", "sac"])
def test_one_that_diverges_says_so_and_keeps_its_last_finite_weights(method):
    settings = SMALL | {"warmup": 25, "every": 25, "batch_size": 16}
    made = DSRL(bandit(ring(2)), Steering(method=method, **settings)).learn(50)
    before = copy.deepcopy(made.learner.weights())
    made.env.reward = Reward(lambda samples, prompts: 1e30 * near(samples, prompts))
    with pytest.raises(Diverged, match="last finite weights are kept: scale rewards"):
        made.learn(75)
    after = made.learner.weights()
    assert all(value.isfinite().all() for value in (after | made.learner.moments()).values())
    assert before.keys() == after.keys()
    assert 50 < made.steps < 75
    made.env.reward = Reward(near)
    made.learner.replay_buffer.rewards[:] = 0
    begun = []
    made.learner.set_random_seed = lambda seed: begun.append((made.steps, seed))
    assert made.learn(125).steps == 125
    assert [steps for steps, _ in begun][1:] == [75, 100]
    assert len({seed for _, seed in begun} | {2}) == 4
    assert made.noise(ONE).abs().max() <= BOUND


def test_moments_are_those_of_draws():
    made = learnt("sac", 50, warmup=40)
    mean, std = made.moments(ONE)
    z = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(0))
    draws = made.noise(ONE.expand(len(z), 1), z).double()
    assert ((draws.mean(0) - mean[0]).abs() < 4 * std[0] / len(z) ** 0.5 + 1e-6).all()
    torch.testing.assert_close(draws.std(0), std[0], rtol=0.03, atol=1e-6)


def test_the_same_class_steers_the_first_noise_of_a_picture(tiny_root):
    kernel = DiffusersKernel.from_pretrained(tiny.checkpoint("sd", tiny_root), num_steps=1, eta=0.0, device="cpu")
    prompts = ["a cat", "a dog"]
    env = Prompted(FrozenPolicy(kernel, ask=Among(prompts)), brightness(), prompts)
    settings = {"method": "sac", "warmup": 40, "batch_size": 16, "every": 40}
    made = DSRL(env, Steering(**SMALL | settings)).learn(80)
    seen = torch.eye(2)
    draws = torch.randn(24, env.frozen.size, generator=torch.Generator().manual_seed(1))
    base = env.reward(env.frozen.actions(seen.repeat(12, 1), draws), prompts * 12).mean()
    found = env.reward(made.actions(seen), prompts).mean()
    assert found > base
    assert not torch.equal(*made.noise(seen))


def test_settings_out_of_range_are_refused():
    for wrong in ({"method": "ppo"}, {"gamma": 1.5}, {"updates": 0}, {"lr": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="|".join([*wrong, "positive"])):
            Steering(**wrong)
    with pytest.raises(ValueError, match="multiple of every = 50"):
        DSRL(bandit(ring(2)), Steering(**SMALL)).learn(70)
    with pytest.raises(ValueError, match="no critic of actions"):
        DSRL(bandit(ring(2)), Steering(**SMALL | {"method": "sac"})).q_action(ONE, torch.zeros(1, 2))
