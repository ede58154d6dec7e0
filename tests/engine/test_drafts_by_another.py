"""Drafts by another network, around offsets and under guides: where they lead, and what is charged, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.engine.test_drafting import REWARD, ROUNDING, Bed, N, T, candidates, drafted, engine, finish, ran, total
from tests.testing.test_drafts import restored, told
from treesearch.backends.base import describe
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.guidance import TDS
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.errors import BudgetError
from treesearch.rewards.base import Reward

LEVELS = (12, 9, 7, 6)  # that a draft of 4 from T = 12 evaluates: its jumps from 10 and 8 are probed at 9 and 7


class Shifted(Bed):
    """The chain of x - 5."""

    def prior(self, noise, cond=None):
        return super().prior(noise, cond) + 5

    def transition(self, x, t, cond=None):
        law = super().transition(x - 5, t, cond)
        return type(law)(law.mean + 5, law.std, law.endpoint + 5)

    def offset(self, x, cond):
        return torch.full_like(x, 5.0)


@pytest.mark.parametrize("around", [lambda k: k, lambda k: Drafted(k, k, 1.0)], ids=["own", "another's"])
def test_drafts_around_an_offset_are_those_of_the_chain_without(around):
    one, other = (drafted(4, kernel=around(kind()))[1].reward[1:] for kind in (Shifted, Bed))
    assert np.allclose(one, other + 6 * 5, rtol=0, atol=ROUNDING)


PROCESSES = {
    "mean reversion": MeanReverting,
    "velocity": lambda: MeanReverting(predicts="velocity"),
    "residual": lambda: Residual(predicts="residual"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_draft_of_every_step_by_the_kernel_itself_is_the_rollout_around_an_offset(name):
    kernel = restored(PROCESSES[name]())
    runner, tree = engine(Drafted(kernel, kernel, 1.0))
    walks = candidates(tree, kernel.num_steps)
    walks.draft = kernel.num_steps
    ran(runner, walks)
    ran(runner, finish(tree, walks.last), 1)
    room = 16 * 4 * 8 * 8 * 4 * 2.0**-24  # 16 entries below 8, 4 steps of 8 operations, through a network of slope 4
    assert np.allclose(tree.reward[walks.last], tree.reward[walks.last + N], rtol=0, atol=room)


class Counted:
    """A reward of states that counts what it is asked."""

    def __init__(self):
        self.asked = 0
        self.reward = Reward(self, "counted", "state")

    def __call__(self, x, prompts):
        self.asked += len(x)
        return total(x, prompts)


@pytest.mark.parametrize(
    ("make", "guided"),
    [
        (lambda r: TDS(Bed(), r), True),
        (lambda r: TDS(Drafted(Bed(), Bed(0.5), 1.0), r), True),
        (lambda r: Drafted(TDS(Bed(), r), Bed(0.5), 1.0), False),
    ],
    ids=["a guide", "a guide around both", "a guide around the kernel alone"],
)
def test_drafts_are_charged_what_drafts_and_not_what_is_searched(make, guided):
    counted = Counted()
    *_, cost = drafted(3, kernel=make(counted.reward), reward=counted.reward)
    assert (cost.nfe, cost.draft_nfe, cost.rows) == (3 * N, 3 * N, 3 * N)
    assert cost.backward_nfe == 3 * N * guided
    assert cost.reward_calls == counted.asked == N + 3 * N * guided


def test_reward_calls_of_guides_around_both_are_planned_by_no_budget():
    kernel = TDS(Drafted(Bed(), Bed(0.5), 1.0), REWARD)
    budget = ts.Budget(reward_calls=200)
    with pytest.raises(BudgetError, match="a guide calls the reward"):
        ts.search(kernel, REWARD, ts.BestOfN(draft=3), budget=budget, progress=False)


def test_work_is_charged_at_the_levels_that_are_evaluated():
    class Wide(Bed):
        rows_per_nfe = tuple(range(T + 1))

    *_, cost = drafted(4, kernel=Wide())
    assert cost.rows == N * sum(LEVELS)
    *_, cost = drafted(4, kernel=Drafted(Wide(), Bed(), 1.0))
    assert cost.rows == N * 4
    *_, cost = drafted(4, kernel=Drafted(Bed(), Wide(), 1.0))
    assert cost.rows == N * sum(LEVELS)


def test_a_guided_pipeline_that_drafts_without_guidance_takes_one_row_an_evaluation():
    kernel = Drafted(told(3.0), told(1.0), 0.5)
    runner, tree = engine(kernel, prompts=["ab"], encoded=kernel.encode(["ab"]))
    walks = candidates(tree, 4)
    walks.draft = 3
    cost = ran(runner, walks)
    assert (cost.nfe, cost.rows) == (N * 2, N * 3)  # 1.5 NFE, rounded up
    assert ran(runner, finish(tree, walks.last), 1).rows == N * 4 * 2


def test_a_draft_is_decoded_and_not_previewed():
    class Previewing(Bed):
        def preview(self, endpoint):
            return self.decode(endpoint) + 100

    def held(kernel):
        runner, tree = engine(kernel, reward=Reward(total, "total", "sample"))
        walks = candidates(tree, 8)
        walks.draft, walks.hold = 3, True
        ran(runner, walks)
        return tree.reward[walks.last]

    assert describe(Previewing()).previews
    assert np.array_equal(held(Previewing()), held(Bed()))
