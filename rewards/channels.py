"""What a trajectory is made of, and what is known of one before it is planned; rewards and kernels share it.

    τ = (s_h, a_h, r_h) for h = 0..H-1,  a float tensor (n, H, C) in data units, C = observation + action + reward

Layout of the last axis as in Diffuser (Planning with Diffusion for Flexible Behavior Synthesis, Janner et al., 2022),
observations first. A prompt is plain data, for it is stored with a run: {"start": [...], "goal": [...]}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KNOWN = ("start", "goal")
TRAJECTORIES = "trajectories (n, H, C) of finite numbers"
"""What rewards of trajectories take, `Facts.limits`."""
Prompt = dict[str, list[float]]


@dataclass(frozen=True)
class Channels:
    """How the last axis of a trajectory (..., H, C) is split.

    Args:
        observation: numbers in an observation, the first of them the position; 0 for chunks of actions alone, whose
            observation is in the prompt.
        action: numbers in an action, 0 for trajectories of observations alone.
        reward: 1 if each row ends in its reward, else 0.

    Raises:
        ValueError: counts that are no such numbers.
    """

    observation: int
    action: int
    reward: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("observation", 0, None), ("action", 0, None), ("reward", 0, 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low or (high is not None and value > high):
                span = f"{low} or more" if high is None else f"{low} or {high}"
                raise ValueError(f"Channels.{name} is {value!r}, expected {span}")
        if not self.observation and not self.action:
            raise ValueError("Channels of neither observations nor actions: expected one of the two")

    @property
    def size(self) -> int:
        """C, all channels of a row."""
        return self.observation + self.action + self.reward

    def observations(self, x: Tensor) -> Tensor:
        """s of x (..., H, C), a view (..., H, observation)."""
        return x[..., : self.observation]

    def actions(self, x: Tensor) -> Tensor:
        """a of x (..., H, C), a view (..., H, action)."""
        return x[..., self.observation : self.observation + self.action]

    def rewards(self, x: Tensor) -> Tensor:
        """r of x (..., H, C), a view (..., H).

        Raises:
            ValueError: rows without rewards.
        """
        if not self.reward:
            raise ValueError(
                f"{self} has no reward channel: train on trajectories with rewards, or score with a critic"
            )
        return x[..., -1]

    def checked(self, x: Any, length: int = 1) -> Tensor:
        """x, if it is trajectories (n, H, C) of finite numbers with H at least `length`.

        Raises:
            ValueError: another shape, or NaN or infinite entries; the message names the first row.
        """
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.size:
            raise ValueError(f"expected trajectories (n, H, {self.size}) of {self}, got {got}")
        if x.shape[1] < length:
            raise ValueError(f"expected trajectories of {length} or more rows, got {got}")
        bad = ~torch.isfinite(x)
        if bad.any():
            row, step, channel = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{int(bad.flatten(1).any(1).sum())} of {len(x)} trajectories have NaN or infinite entries, "
                f"first at row {row}, step {step}, channel {channel}: drop such data before training"
            )
        return x


def as_channels(channels: Channels | Sequence[int]) -> Channels:
    """Channels from counts (observation, action) or (observation, action, reward), as the command line writes them.

    Raises:
        ValueError: not two or three counts.
    """
    if isinstance(channels, Channels):
        return channels
    if not isinstance(channels, Sequence) or len(channels) not in (2, 3):
        raise ValueError(f"channels is {channels!r}, expected (observation, action) or (observation, action, reward)")
    return Channels(*channels)


def known(start: Any = None, goal: Any = None) -> Prompt:
    """The prompt of one plan: what its first observation is and where its last one must be; either may be left out.

    Args:
        start: the first observation, numbers or an array (observation,).
        goal: the position of the last observation, the first numbers of one.

    Raises:
        ValueError: not a vector of finite numbers.
    """
    given = zip(KNOWN, (start, goal), strict=True)
    return {name: _vector(value, name) for name, value in given if value is not None}


def entry(prompt: Any, name: str, size: int | None = None) -> list[float] | None:
    """The "start" or "goal" of a prompt, None where it has none.

    Args:
        prompt: a mapping as `known` makes it, the same as JSON (as a command line has it), or None.
        name: "start" or "goal".
        size: numbers expected; None for any.

    Raises:
        ValueError: not such a mapping, a key it may not have, or another number of numbers.
    """
    if isinstance(prompt, str):
        prompt = _json(prompt)
    if prompt is None:
        return None
    if not isinstance(prompt, Mapping) or set(prompt) - set(KNOWN):
        got = sorted(map(str, prompt)) if isinstance(prompt, Mapping) else type(prompt).__name__
        raise ValueError(
            f"a prompt of a trajectory has the keys {' and '.join(KNOWN)}, got {got}: make it with known()"
        )
    if prompt.get(name) is None:
        return None
    value = _vector(prompt[name], name)
    if size is not None and len(value) != size:
        raise ValueError(f"{name} has {len(value)} numbers, expected {size}")
    return value


def _json(prompt: str) -> Any:
    try:
        return json.loads(prompt)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'cannot read the prompt {prompt!r}: {error}; write {{"start": [0, 0], "goal": [1, 2]}}'
        ) from error


def _vector(value: Any, name: str) -> list[float]:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not numbers:
        raise ValueError(f"{name} is {value!r}, expected a list of numbers")
    try:
        floats = [float(v) for v in numbers]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected a list of numbers") from error
    if not all(map(math.isfinite, floats)):
        raise ValueError(f"{name} is {floats}, expected finite numbers")
    return floats
