"""Steps of DSRL's learner by hand: targets, distillation, actor, temperature, what is made and kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.policies.bandit import BOUND, bandit, ring
from treesearch.policies.dsrl import DSRL, Steering

SMALL = {
    "updates": 1, "noise_steps": 1, "batch_size": 16, "width": 8, "layers": 1, "lr": 3e-3, "tau": 0.05,
    "temperature": 0.01, "warmup": 25, "every": 50, "replay": 1000,
}  # fmt: skip


def made(**settings):
    """A learner whose kernel leaves scaled noise as it is."""
    learner = DSRL(bandit(ring(2)), Steering(**SMALL | settings)).learner
    learner._made = lambda observations, scaled: scaled
    return learner


class Heads(torch.nn.Module):
    """Two critics of constant values a row, by gradient descent in one step at their targets."""

    def __init__(self, n):
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(2, n, 1))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=float(n))

    def forward(self, observations, actions):
        return tuple(self.values)


def test_the_target_of_a_step_is_that_of_the_paper():
    """r + (1 - d) γ (min_j Q̄_j(s', π(s', w')) - α log π(w' | s')), by hand, in a chain whose second step ends it."""
    learner = DSRL(bandit(ring(2)), Steering(**SMALL | {"gamma": 0.9})).learner
    w, log_prob = torch.tensor([[0.2, -0.4], [0.6, 0.1]]), torch.tensor([0.5, -2.0])
    learner.actor.action_log_prob = lambda observations: (w, log_prob)
    learner.critic = Heads(2)
    learner.critic_target = lambda observations, made: (made.sum(1, keepdim=True) + 3, made.sum(1, keepdim=True) + 1)
    data = SimpleNamespace(
        observations=torch.ones(2, 1), next_observations=torch.ones(2, 1), actions=torch.zeros(2, 2),
        rewards=torch.tensor([[1.0], [2.0]]), dones=torch.tensor([[0.0], [1.0]]),
    )  # fmt: skip
    learner._td(data, torch.tensor(0.25))
    made = learner.frozen.states(torch.ones(2, 1), BOUND * w)
    first = 1 + 0.9 * (made[0].sum().item() + 1 - 0.25 * 0.5)
    for values in learner.critic.values:
        torch.testing.assert_close(values.detach(), torch.tensor([[first], [2.0]]))


def test_the_target_of_several_leaves_is_the_soft_value_of_their_tree():
    learner = DSRL(bandit(ring(2)), Steering(**SMALL | {"backup": 3})).learner
    w = torch.tensor([[0.2, -0.4], [0.6, 0.1], [-0.3, 0.9]])
    log_prob, alpha = torch.tensor([0.5, -2.0, 1.0]), torch.tensor(0.25)
    learner.actor.action_log_prob = lambda observations: (w, log_prob)
    learner.critic_target = lambda observations, made: (made.sum(1, keepdim=True) + 3, made.sum(1, keepdim=True) + 1)
    worth = learner.frozen.states(torch.ones(3, 1), BOUND * w).sum(1) + 1 - alpha * log_prob
    found = learner._value(torch.ones(1, 1), alpha)
    torch.testing.assert_close(found, alpha * (worth / alpha).exp().mean().log()[None, None])
    assert worth.mean() < found < worth.max()


def test_noise_of_no_worth_becomes_wide():
    learner = DSRL(bandit(ring(2)), Steering(**SMALL)).learner
    learner.noise_critic = Heads(32)

    def entropy():
        return -learner.actor.action_log_prob(torch.ones(2000, 1))[1].mean().item()

    with torch.random.fork_rng(), torch.no_grad():
        before = entropy()
    for _ in range(20):
        learner._improve(torch.ones(32, 1), torch.tensor(1.0))
    assert entropy() > before + 0.1


def test_critics_of_noise_are_told_by_the_critic_of_actions_of_their_own_number():
    """Q^W_j at noise of the policy's own, N(0, I) in units of b, is Q^A_j of what it makes."""
    learner, n, asked = made(), 4000, []
    heads = learner.noise_critic = Heads(n)
    learner.noise_optimizer = heads.optimizer
    learner.critic = lambda observations, scaled: asked.append(scaled) or (scaled[:, :1] + 1, scaled[:, 1:] - 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner._distil(torch.ones(n, 1))
    torch.testing.assert_close(heads.values.detach(), torch.stack([asked[0][:, :1] + 1, asked[0][:, 1:] - 2]))
    assert asked[0].std() * BOUND == pytest.approx(1, abs=0.05)


def test_the_actor_is_led_by_the_smaller_critic():
    learner = made()
    w = torch.nn.Parameter(torch.tensor([[0.1, 0.2]]))
    learner.actor.action_log_prob = lambda observations: (w, w[:, 1])
    learner.actor.optimizer = torch.optim.SGD([w], lr=1.0)
    learner.noise_critic = lambda observations, noise: (5 * noise[:, :1], 3 * noise[:, :1])
    learner._improve(torch.ones(1, 1), torch.tensor(0.25))
    torch.testing.assert_close(w.detach(), torch.tensor([[3.1, -0.05]]))


@pytest.mark.parametrize(("log_prob", "sign"), [(-0.5, 1), (-2.0, -1)])
def test_the_temperature_moves_towards_the_target_entropy(log_prob, sign):
    learner = made(target_entropy=1.0)
    learner.actor.action_log_prob = lambda observations: (None, torch.full((4,), log_prob))
    before = learner.log_ent_coef.item()
    alpha = learner._temperature(torch.ones(4, 1))
    assert alpha.item() == pytest.approx(SMALL["temperature"])
    assert (learner.log_ent_coef.item() - before) * sign > 0


def test_the_best_leaf_is_that_of_the_smaller_critic_among_own_and_prior_noise():
    """Rows by turns: the actor's own, the prior's; the first is what the actor chose."""
    learner, asked, n = made(leaves=2000), [], 2000
    learner._last_obs = np.ones((1, 1), np.float32)
    learner.actor.action_log_prob = lambda observations: (torch.full((n, 2), 0.3), None)
    learner.critic = lambda observations, scaled: asked.append(scaled) or (scaled[:, :1], -9 * scaled[:, 1:])
    own = torch.tensor([[0.5, -0.6]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        best = learner._best_leaf(own)
        prior = torch.randn(n, 2).div(BOUND).clamp(-1, 1)
    (tried,) = asked
    assert torch.equal(tried[:1], own)
    assert (tried[2::2] == 0.3).all()
    assert tried[1::2].std().item() == pytest.approx(prior.std().item(), rel=0.05)
    assert torch.equal(best[0], tried[torch.minimum(tried[:, 0], -9 * tried[:, 1]).argmax()])


def test_exploration_begins_with_the_policy_s_own_noise():
    learner = made()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise, scaled = learner._sample_action(10, n_envs=4000)
    np.testing.assert_allclose(noise, BOUND * scaled, rtol=1e-6)
    cut = torch.distributions.Normal(0, 1).cdf(torch.tensor(-BOUND)).item() * 2
    assert np.mean(np.abs(noise) == np.float32(BOUND)) == pytest.approx(cut, abs=0.02)


def test_target_critics_follow_by_tau():
    learner = DSRL(bandit(ring(2)), Steering(**SMALL)).learn(50).learner
    before = [value.clone() for value in learner.critic_target.parameters()]
    learner._train(1, 16)
    for old, new, now in zip(before, learner.critic_target.parameters(), learner.critic.parameters(), strict=True):
        torch.testing.assert_close(new, torch.lerp(old, now, SMALL["tau"]))
