"""Offline learners: their targets and losses by values, how they go on, what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.offline_rl.learners import (
    LEARNERS,
    Diverged,
    Law,
    Learner,
    Mean,
    Settings,
    Transitions,
)
from treesearch.errors import StoreError

pytest.importorskip("torchrl")
SMALL = Settings(width=8, batch_size=8, chunk=5)


def transitions(n=60):
    rng = torch.Generator().manual_seed(0)
    seen, after = (torch.randn(n, 3, generator=rng) for _ in range(2))
    actions, rewards = 2 * torch.rand(n, 2, generator=rng) - 1, torch.randn(n, generator=rng)
    return Transitions(seen, actions, rewards, after, torch.rand(n, generator=rng) < 0.1)


def same(one, other):
    assert one["step"] == other["step"]
    assert one["loss"].keys() == other["loss"].keys()
    assert all(torch.equal(one["loss"][name], other["loss"][name]) for name in one["loss"])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_goes_on_bit_for_bit(name, tmp_path):
    data, file = transitions(), tmp_path / "learner.pt"
    whole = Learner(name, data, SMALL, 0).learn(data, 20)
    Learner(name, data, SMALL, 0).learn(data, 10, file)
    same(Learner(name, data, SMALL, 0).learn(data, 20, file).state(), whole.state())
    other = Learner(name, data, SMALL, 1).learn(data, 20)
    assert not torch.equal(other.policy()(data.observations), whole.policy()(data.observations))
    fresh = Learner(name, data, SMALL, 0)
    assert not torch.equal(fresh.policy()(data.observations), whole.policy()(data.observations))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_that_diverges_keeps_its_last_finite_weights(name, tmp_path):
    data, file = transitions(), tmp_path / "learner.pt"
    learner = Learner(name, data, SMALL, 0).learn(data, 10, file)
    before = learner.state()
    with pytest.raises(Diverged, match=f"{name} diverged between steps 10 and 15; the weights of step 10 are kept"):
        learner.learn(replace(data, rewards=data.rewards * 1e30), 20, file)
    same(learner.state(), before)
    same(Learner(name, data, SMALL, 0).load(file).state(), before)


def test_a_checkpoint_that_cannot_be_gone_on_from_is_named(tmp_path):
    data, file = transitions(), tmp_path / "learner.pt"
    Learner("iql", data, SMALL, 0).learn(data, 5, file)
    whole = file.read_bytes()
    for name, settings, text in (
        ("td3bc", SMALL, whole), ("iql", replace(SMALL, width=4), whole), ("iql", SMALL, whole[: len(whole) // 2]),
        ("iql", SMALL, b""), ("iql", SMALL, b"no checkpoint"),
    ):  # fmt: skip
        file.write_bytes(text)
        with pytest.raises(StoreError, match=rf"learner\.pt is damaged, or no checkpoint of this {name}: remove it"):
            Learner(name, data, settings, 0).learn(data, 10, file)
    file.write_bytes(whole)
    with pytest.raises(StoreError, match=r"learner\.pt is of seed 0, not 1: remove it"):
        Learner("iql", data, SMALL, 1).learn(data, 10, file)


def test_learners_are_better_than_what_they_clone():
    """Reward -(a - 1)²: cloned actions are at 0, better ones above."""
    n, rng = 400, torch.Generator().manual_seed(0)
    actions = (0.5 * torch.randn(n, 1, generator=rng)).clamp(-1, 1)
    seen, over = torch.randn(n, 2, generator=rng), torch.ones(n, dtype=torch.bool)
    data = Transitions(seen, actions, -((actions[:, 0] - 1) ** 2), seen, over)

    def learnt(name, **how):
        settings = Settings(width=16, batch_size=64, chunk=100, lr=1e-2, **how)
        return float(Learner(name, data, settings, 0).learn(data, 100).policy()(seen).mean())

    cloned = learnt("td3bc", alpha=0.0)
    assert abs(cloned) < 0.1
    assert all(learnt(name) > cloned + 0.1 for name in LEARNERS)


def flat(name, worth, scale, **bias):
    """A learner whose networks have no weights: each Q is `worth`, each V `bias` or as much."""
    learner = Learner(name, transitions(), SMALL, 0, scale)
    for key, value in learner.loss.state_dict().items():
        if not key.endswith(("mean", "std", "gamma")):  # TorchRL shares γ between losses
            value.fill_(0.0)
        if key.endswith("4.bias") and "actor" not in key:
            value.fill_(bias.get("value", worth) if "qvalue" not in key else worth)
    return learner


@pytest.mark.parametrize("name", LEARNERS)
def test_targets_end_with_the_task_and_go_on_over_a_limit_of_time(name):
    """Q = k r where the task ended, k r + γ Q elsewhere: no error there, and one where the flags are others."""
    worth, scale, data = 2.0, 0.5, transitions()
    learner = flat(name, worth, scale)
    due = torch.where(data.terminated, worth, worth * (1 - SMALL.gamma)) / scale
    right = replace(data, rewards=due)
    for given, low, high in ((right, 0, 1e-9), (replace(right, terminated=~data.terminated), 1, 99)):
        assert low <= float(learner.loss(learner._batch(given))["loss_qvalue"].detach().sum()) <= high


def test_a_seed_decides_first_weights_and_draws():
    data = transitions()
    one, other = (Learner("iql", data, SMALL, seed) for seed in (0, 1))
    assert not torch.equal(one.policy()(data.observations), other.policy()(data.observations))
    other._restore(one.state())
    assert not torch.equal(one._chunk(data, 2), other._chunk(data, 2))


@pytest.mark.parametrize("name", LEARNERS)
def test_targets_follow_by_tau_and_td3bc_delays_its_actor_and_them(name):
    data, settings = transitions(), replace(SMALL, tau=0.25)
    learner = Learner(name, data, settings, 0)
    for step in range(4):
        before = learner.state()["loss"]
        learner._update(learner._batch(data))
        after, due = learner.state()["loss"], name == "iql" or step % settings.delay == 0
        for key in (key for key in after if key.startswith("target_")):
            new = torch.lerp(before[key], after[key.removeprefix("target_")], settings.tau)
            torch.testing.assert_close(after[key], new if due else before[key])
        moved = {key.partition(".")[0] for key in after if not torch.equal(after[key], before[key])}
        assert ("actor_network_params" in moved) == due
        assert "qvalue_network_params" in moved


@pytest.mark.parametrize("name", LEARNERS)
def test_observations_are_normalised_by_the_moments_of_real_data(name):
    data = transitions()
    far = replace(data, observations=100 * data.observations + 70)
    near, wide = (Learner(name, each, SMALL, 0) for each in (data, far))
    torch.testing.assert_close(wide.policy()(far.observations), near.policy()(data.observations), atol=0.01, rtol=0)


def test_target_actions_are_smoothed_within_bounds_and_policies_have_limits():
    loss = Learner("td3bc", transitions(), SMALL, 0).loss
    assert (loss.policy_noise, loss.noise_clip, loss.min_action.tolist(), loss.max_action.tolist()) == (
        0.2, 0.5, [-1, -1], [1, 1]
    )  # fmt: skip
    law = Law(Mean(transitions().observations, 2, 8), 2)
    law.log_std.data[:] = torch.tensor([-9.0, 9.0])
    law.inner.net[-1].bias.data[:] = 30.0
    mean, std = law(torch.zeros(1, 3))
    assert std.log().tolist()[0] == pytest.approx([-5, 2])
    assert mean.tolist() == [[1, 1]]


def test_the_value_of_iql_is_an_upper_expectile():
    """Q above V weighs τ, below it 1 - τ."""
    above, below = (flat("iql", worth, 1.0, value=0.0) for worth in (1.0, -1.0))
    batch = above._batch(transitions())
    ratio = above.loss(batch.clone())["loss_value"] / below.loss(batch)["loss_value"]
    assert float(ratio.detach()) == pytest.approx(SMALL.expectile / (1 - SMALL.expectile))


def test_the_policy_of_iql_weighs_actions_by_their_advantage():
    level, above = (flat("iql", 1.0, 1.0, value=value) for value in (1.0, 0.5))
    batch = level._batch(transitions())
    ratio = above.loss(batch.clone())["loss_actor"] / level.loss(batch)["loss_actor"]
    assert float(ratio.detach()) == pytest.approx(np.exp(SMALL.temperature * 0.5))
