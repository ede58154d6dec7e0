"""Laws of rewards: a row's value does not depend on its batch or its place, and nothing is written to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.values import flat
from treesearch.testing.compare import LAM, UNSEEN, CheckFailed, Room, same


def total(samples: Any) -> Tensor:
    """A reward for tensors: the sum of a sample's entries."""
    return flat(torch.as_tensor(samples, device="cpu").double()).sum(1)


def check_reward(
    reward: Reward | Callable[..., Any],
    samples: Any,
    prompts: Sequence[Any] | None = None,
    *,
    atol: float | None = None,
) -> None:
    """Laws of a reward; give different prompts, or a misplaced one goes unseen.

    Args:
        reward: the reward.
        samples: at least three.
        prompts: one a sample.
        atol: how far a reward may move with its batch, None for what rounding explains in float32.

    Raises:
        CheckFailed: a law does not hold.
        ValueError: too few samples to compare.
    """
    reward, n = as_reward(reward), len(samples)
    if n < 3:
        raise ValueError(f"expected at least three samples to compare, got {n}")
    before = copy.deepcopy(samples)

    def score(rows: Sequence[int]) -> Tensor:
        chosen = (
            samples[torch.tensor(rows, device="cpu")] if isinstance(samples, Tensor) else [samples[i] for i in rows]
        )
        return reward(chosen, None if prompts is None else [prompts[i] for i in rows])

    try:
        whole = reward(samples, prompts)  # shape, NaN and +inf are checked by Reward itself
    except RewardError as error:
        raise CheckFailed(str(error)) from error
    largest = whole[whole.isfinite()].abs().max() if whole.isfinite().any() else torch.tensor(0.0, device="cpu")
    unit = torch.finfo(torch.float32).eps / 2
    room = Room(share=LAM * unit * UNSEEN).of(largest.expand(n)) if atol is None else Room(atol)
    same("reward wrote into its samples", samples, before)
    same("reward: two calls with the same samples", score(range(n)), whole, room)
    same("reward of n single rows beside one batch", torch.cat([score([i]) for i in range(n)]), whole, room)
    same("reward of two parts beside one batch", torch.cat([score(range(2)), score(range(2, n))]), whole, room)
    back = list(range(n))[::-1]
    same("reward of the rows in reverse order, turned back", score(back).flip(0), whole, room)
