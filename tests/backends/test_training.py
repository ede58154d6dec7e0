"""The training loop: its steps are AdamW's, its average and its learning rate their formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from treesearch.backends.training import loop as training
from treesearch.backends.training.loop import Plan

PLAN = Plan(epochs=2, steps=3, lr=0.1, warmup=2, cooldown=0.5, ema=0.5)
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def losses(network):
    return (1e3 * network(X).square().mean() for _ in range(3))  # a gradient that is clipped


def test_weights_after_three_steps_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    plain = copy.deepcopy(network)
    average, optimizer = copy.deepcopy(plain), torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = (0.05, 0.1, 0.1)[step]
        optimizer.zero_grad()
        (1e3 * plain(X).square().mean()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), plain.parameters(), strict=True):
                mean.lerp_(weight, 1 - (1 / 10, 2 / 11, 3 / 12)[step])
    state = training.begin(network, PLAN)
    first = (1e3 * network(X).square().mean()).item()
    assert training.run_epoch(state, losses(network), PLAN) != first
    for one, other in ((state.network, plain), (state.ema, average)):
        for weight, expected in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(weight, expected)
    assert (state.epoch, state.step) == (1, 3)


def test_the_learning_rate_rises_stays_and_falls():
    plan = Plan(epochs=10, steps=10, lr=2.0, warmup=10, cooldown=0.5)
    assert [plan.learning_rate(step) for step in (0, 9, 50)] == [0.2, 2.0, 2.0]
    assert plan.learning_rate(75) == pytest.approx(1.0)
    assert plan.learning_rate(99) == pytest.approx(1 + math.cos(math.pi * 0.98))


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    seen = []

    def run(plan):
        state = training.create(lambda: nn.Linear(3, 1), plan, 0, tmp_path)
        training.train(state, plan, lambda _: losses(state.network), tmp_path, lambda *_: seen.append(state.epoch))
        return state

    run(Plan(epochs=1, steps=3, lr=0.1, warmup=2, cooldown=0.5))
    assert run(PLAN).step == 6
    assert seen == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_without_an_average_the_network_is_its_own():
    plan = Plan(epochs=1, steps=3, lr=0.1, warmup=1, cooldown=1.0, ema=None, clip=None)
    state = training.begin(nn.Linear(3, 1), plan)
    training.run_epoch(state, losses(state.network), plan)
    assert state.ema is state.network


def test_timesteps_are_stratified():
    found = training.stratified(10, 100, torch.Generator().manual_seed(0))
    assert (found // 10).tolist() == list(range(10))
