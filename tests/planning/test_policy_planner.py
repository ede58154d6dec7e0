"""The planner over chunks of actions: histories in, actions out."""

import pytest
import torch

import treesearch as ts
from treesearch.backends.models.policy import policy
from treesearch.rewards.base import Reward

SEEN = torch.tensor([[[0.0, -1.0, 0, 0], [0.02, -1.0, 0.5, 0]], [[0.9, 0.2, 0, 1], [0.9, 0.3, 0, 2]]])


def rightwards(samples, prompts):
    assert all(len(p["start"]) == 8 for p in prompts)
    return samples[..., 0].double().mean(1)


def planner(**settings):
    how = {"budget": ts.Budget(nfe=20), "steps": 8, "warm_start": False} | settings
    return ts.Planner(policy(num_steps=5, eta=1.0), Reward(rightwards), ts.BestOfN(), **how)


def test_histories_become_the_best_chunk_of_each():
    made = planner()
    actions = made.act_many(SEEN)
    assert actions.shape == (2, 8, 2)
    for i in range(2):
        samples, rewards = made.tasks[i].best(1)
        torch.testing.assert_close(actions[i], samples[0])
        assert rewards[0] == made.decision.rewards[i]
    assert made.decision.nfe == 40
    flat = planner()
    assert torch.equal(flat.act_many(SEEN.flatten(1)), actions)
    assert torch.equal(planner().act(SEEN[0]), actions[0])


def test_a_warm_start_goes_on_from_what_is_left_of_a_chunk():
    made = planner(warm_start=True, steps=3)
    first = made.act_many(SEEN)
    again = made.act_many(SEEN)
    assert first.shape == again.shape == (2, 3, 2)
    assert made.decision.warm == (True, True)


@pytest.mark.parametrize("seen", [torch.zeros(2, 4), torch.zeros(2, 3, 4), torch.full((2, 8), float("nan"))])
def test_observations_of_another_shape_are_refused(seen):
    with pytest.raises(ValueError, match=r"expected \(n, 8\)|not finite"):
        planner().act_many(seen)
