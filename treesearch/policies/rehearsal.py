"""The environment as its own model: what a chunk of actions earns in a second one that stands where the first stands.

    r(a_0..a_{k-1}) = Σ_i r_env(s_i, a_i),  s_0 the state that the environment is in now

The second one is a copy, or, where it cannot be copied or its copies are new ones, another of the same make that began
with the same seed and was told the same actions: then a decision costs as many steps as were made so far for each
chunk. From there on it draws random numbers of its own, so that a plan is not told what chance holds in store. A real
robot has no such model: a critic, or a model that was learnt, stands in for it there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from treesearch.policies.episodes import bounded, finite
from treesearch.rewards.base import Reward


@final
class Rehearsed:
    """An environment that remembers how it came where it is.

    Args:
        make: environments of gymnasium, each like the other.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.env = make, make()
        self.action_space, self.spec, self.unwrapped = self.env.action_space, self.env.spec, self.env.unwrapped
        self._second: Any = None

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self.seed, self.actions = seed, []
        self.shown, info = self.env.reset(seed=seed)
        return self.shown, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Make an action."""
        found = self.env.step(action)
        self.actions.append(np.array(action))
        self.shown = found[0]
        return found

    def twin(self) -> Any:
        """A second environment where this one stands.

        Raises:
            ValueError: it can neither be copied nor brought there.
        """
        from gymnasium.utils import EzPickle

        if isinstance(self.unwrapped, EzPickle):  # its copy is a new one, which stands at no episode's place
            return self._brought("EzPickle makes a new one")
        try:
            return copy.deepcopy(self.env)
        except Exception as error:
            return self._brought(f"{type(error).__name__}: {error}")

    def _brought(self, why: str) -> Any:
        self._second = self._second or self.make()
        shown, _ = self._second.reset(seed=self.seed)
        for action in self.actions:
            shown, *_ = self._second.step(action)
        if not _same(shown, self.shown):
            raise ValueError(
                f"{type(self.unwrapped).__name__} is no model of itself: it cannot be copied ({why}), and comes "
                "elsewhere with the same seed and actions; name a reward"
            )
        return self._second


def rehearsal(env: Rehearsed, seed: int = 0) -> Reward:
    """r = return of a chunk (n, k, A) in a second environment, from where the first is when asked.

    Args:
        env: it is left as it is.
        seed: of the second one's random numbers.
    """

    def fn(samples: Tensor, _: object) -> Tensor:
        return torch.tensor([_earned(env.twin(), chunk, seed) for chunk in samples], dtype=torch.float64)

    return Reward(fn, "env")


def _earned(env: Any, chunk: Tensor, seed: int) -> float:
    env.unwrapped.np_random = np.random.default_rng(seed)
    total = 0.0
    for action in bounded(chunk, env.action_space):
        _, reward, ended, cut, _ = env.step(action)
        total += finite(reward)
        if ended or cut:
            break
    return total


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_same(one[name], other[name]) for name in one)
    return bool(np.array_equal(one, other))
