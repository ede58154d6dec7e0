"""Episodes of an environment under what acts by chunks: the last observations in, actions out, receding horizon.

history    the last h observations, the first one repeated where there were none before
act        actions (k, A) for it; they are made one after the other, then it is asked again
end        where the environment ends or cuts an episode, be it within a chunk
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Read = Callable[[Any], Tensor]
"""An observation of the environment -> numbers (S,) that the policy is told of it."""
Act = Callable[[Tensor], Tensor]
"""A history (h, S) -> actions (k, A)."""
SUCCESS = ("is_success", "success")  # what environments call it, in `info`


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What became of an episode.

    Attributes:
        seed: that the environment began with.
        success: whether it was reached at any time; None where the environment does not say.
        returns: sum of its rewards.
        actions: that were made.
        ended: by the environment itself; False where time or actions ran out.
    """

    seed: int
    success: bool | None
    returns: float
    actions: int
    ended: bool


def play(env: Any, act: Act, read: Read, *, history: int = 1, seed: int = 0, limit: int = 1000) -> Episode:
    """One episode.

    Args:
        env: of gymnasium, with a Box of actions.
        history: h.
        limit: actions at most.

    Raises:
        ValueError: a reward or actions that are not finite, or actions so far out of bounds that they must be in other
            units.
    """
    observation, _ = env.reset(seed=seed)
    frames = deque([read(observation)] * history, history)
    total, made, success, ended, cut = 0.0, 0, None, False, False
    while made < limit and not (ended or cut):
        for action in bounded(act(torch.stack(tuple(frames))), env.action_space)[: limit - made]:
            observation, reward, ended, cut, info = env.step(action)
            total, made, success = total + finite(reward), made + 1, _reached(info, success)
            frames.append(read(observation))
            if ended or cut:
                break
    return Episode(seed=seed, success=success, returns=total, actions=made, ended=bool(ended))


def bounded(actions: Tensor, box: Any) -> Array:
    """Actions (k, A) within the bounds of a space, those that leave them a little are cut.

    Raises:
        ValueError: other actions than the space's, numbers that are not finite, or ones that seem to be in other units.
    """
    if actions.shape[1:] != box.shape or not len(actions) or not hasattr(box, "high"):
        raise ValueError(f"actions have shape {tuple(actions.shape)}, expected one or more of the environment's, {box}")
    made = actions.float().cpu().numpy()
    far = np.maximum(made - box.high, box.low - made).max() if np.isfinite(made).all() else math.inf
    if far > np.max(box.high - box.low):
        raise ValueError(
            f"actions leave the bounds {box.low.min():g}..{box.high.max():g} by {far:g}: are they normalised, or the "
            "weights not those of this environment? The kernel's `decode` must return the environment's units"
        )
    return np.clip(made, box.low, box.high)


def finite(reward: Any) -> float:
    """A reward of the environment.

    Raises:
        ValueError: it is not finite.
    """
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the environment's reward is {reward}: expected finite numbers")
    return value


def flat(observation: Any) -> Tensor:
    """The numbers of an observation in a row; of named ones its `observation`.

    Raises:
        ValueError: named ones without it, or something that is no array of numbers.
    """
    named = isinstance(observation, dict)
    try:
        return torch.as_tensor(np.asarray(observation["observation"] if named else observation, np.float32).reshape(-1))
    except (KeyError, TypeError, ValueError) as error:
        shown = sorted(observation) if named else f"a {type(observation).__name__}"
        raise ValueError(
            f"the environment shows {shown}, expected numbers, or `observation` among names: wrap it with gymnasium's "
            "FlattenObservation or TransformObservation"
        ) from error


@final
@dataclass(frozen=True)
class Told:
    """A reader whose observations have as many numbers as the policy is told.

    Args:
        read: what of an observation it is told.
        size: S.
    """

    read: Read
    size: int

    def __call__(self, observation: Any) -> Tensor:
        """Its numbers (S,).

        Raises:
            ValueError: others, or some that are not finite.
        """
        found = self.read(observation)
        if found.shape != (self.size,):
            raise ValueError(f"the environment shows {found.numel()} numbers, the policy is told {self.size}")
        if not found.isfinite().all():
            raise ValueError(f"the environment shows numbers that are not finite: {found.tolist()}")
        return found


@final
@dataclass(frozen=True)
class Stacked:
    """Reads observations that gymnasium's `FrameStackObservation` stacked, the last one last.

    Args:
        read: one of them.
        history: h.
    """

    read: Read
    history: int

    def __call__(self, stacked: Any) -> Tensor:
        """Their numbers (h S,) in a row."""
        return torch.cat([self.read(_one(stacked, i)) for i in range(self.history)])


def _one(stacked: Any, i: int) -> Any:
    return {name: _one(value, i) for name, value in stacked.items()} if isinstance(stacked, dict) else stacked[i]


def _reached(info: dict[str, Any], before: bool | None) -> bool | None:
    said = [bool(info[name]) for name in SUCCESS if name in info]
    return before if not said else bool(before) or any(said)
