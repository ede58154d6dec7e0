"""The environment as its own model: what a chunk of actions earns in a copy of it.

    r(a_0..a_{k-1}) = Σ_i r_env(s_i, a_i),  s_0 the state that the environment is in now

Copies draw random numbers of their own, so that a plan is not told what chance holds in store. A real robot has no such
copy: a critic, or a model that was learnt, stands in for it there.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.policies.episodes import bounded, finite
from treesearch.rewards.base import Reward


def rehearsal(env: Any, seed: int = 0) -> Reward:
    """r = return of a chunk (n, k, A) in copies of the environment, from where it is when asked.

    Args:
        env: of gymnasium, which is left as it is.
        seed: of the copies' random numbers.

    Raises:
        ValueError: when called, an environment that cannot be copied.
    """

    def fn(samples: Tensor, _: object) -> Tensor:
        return torch.tensor([_earned(env, chunk, seed) for chunk in samples], dtype=torch.float64)

    return Reward(fn, "env")


def _earned(env: Any, chunk: Tensor, seed: int) -> float:
    made = copied(env)
    made.unwrapped.np_random = np.random.default_rng(seed)
    total = 0.0
    for action in bounded(chunk, made.action_space):
        _, reward, ended, cut, _ = made.step(action)
        total += finite(reward)
        if ended or cut:
            break
    return total


def copied(env: Any) -> Any:
    """A copy that lives on by itself.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return copy.deepcopy(env)
    except Exception as error:
        kind = type(env.unwrapped).__name__
        raise ValueError(
            f"{kind} cannot be copied ({type(error).__name__}: {error}) and is no model of itself: name a reward"
        ) from error
