"""Rewards built from one expression are one reward: a guide's values serve the search, and nothing is scored twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS
from treesearch.distributed.station import Station
from treesearch.registry import registry as specs
from treesearch.rewards import analytic
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.compose import cached, normalise
from treesearch.rewards.facts import facts

SCORED = [0]


@facts(range="any", differentiable=True)
def counted(c: float = 1.0, batch_size: int = 8) -> Reward:
    """c·x, counted."""

    def fn(x: torch.Tensor, _: object) -> torch.Tensor:
        SCORED[0] += len(x)
        return c * x.double().flatten(1).sum(1)

    return Reward(fn, "counted")


def other(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("make", "another"),
    [
        (lambda: counted(2), lambda: counted(c=2.0, batch_size=1)),
        (lambda: 2 * counted() + analytic.linear((1, 2)), lambda: 2.0 * counted(1.0) + analytic.linear([1.0, 2.0])),
        (lambda: counted().clip(-1, 1), lambda: counted().clip(-1.0, 1.0)),
        (lambda: counted().gate(counted(2), above=0), lambda: counted().gate(counted(2), above=0)),
        (lambda: normalise(cached(counted()), 0, 2), lambda: normalise(cached(counted()), 0, 2)),
        (lambda: as_reward(other), lambda: as_reward(other)),
        (lambda: specs.reward("2*digit(8) + brightness()"), lambda: specs.reward("2*digit(8) + brightness")),
    ],
)
def test_one_expression_is_one_reward(make: Callable[[], Reward], another: Callable[[], Reward]) -> None:
    assert make() == another()
    assert hash(make()) == hash(another())


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (counted(1.0), counted(2.0)),
        (counted().clip(-1, 1), counted().clip(-1, 1.0000001)),  # of one name
        (counted() + 0.123456789, counted() + 0.123456788),
        (counted().gate(counted(), above=0), counted().gate(counted(), above=0, otherwise=-9)),
        (counted() - analytic.linear(), analytic.linear() - counted()),
        (as_reward(other), as_reward(lambda x: other(x), name="other")),
        (analytic.linear(1.0), analytic.linear(torch.tensor(1.0))),  # a tensor is known by its object alone
        (analytic.linear(torch.ones(2)), analytic.linear(torch.ones(2))),
    ],
)
def test_other_expressions_are_other_rewards(one: Reward, another: Reward) -> None:
    assert one != another


def scored(kernel: Any, reward: Reward) -> tuple[int, ts.SearchResult]:
    before = SCORED[0]
    found = ts.search(kernel, reward, ts.FeynmanKac(num_particles=16), budget=ts.Budget(nfe=160))
    return SCORED[0] - before, found


def test_a_guide_s_values_serve_the_search() -> None:
    base, guide = LinearGaussian(num_steps=5), counted(0.5)
    one, straight = scored(TDS(base, guide), guide)
    two, apart = scored(TDS(base, counted(0.5)), counted(0.5))
    more, _ = scored(TDS(base, counted(0.5)), Reward(counted(0.5).fn, "counted"))
    assert one == two
    assert more > two  # a reward that is not known to be the guide's is scored beside it
    torch.testing.assert_close(apart.rewards, straight.rewards, rtol=0, atol=0)
    assert apart.cost.reward_calls == straight.cost.reward_calls == two


def test_a_worker_that_built_both_knows_the_guide_s_values() -> None:
    made = TDS(LinearGaussian(num_steps=5), counted(0.5))
    how = {"sample": True, "prompts": None, "encoded": {}, "batch_size": 8, "batch_invariant": False}
    assert Station(made, counted(0.5), **how).model.guide_scores
    assert not Station(made, counted(0.6), **how).model.guide_scores
