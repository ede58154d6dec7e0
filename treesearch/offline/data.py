"""Offline data of reinforcement learning: episodes as flat arrays, and windows of them.

    episode e = rows ends[e-1] .. ends[e]-1,  row = (s, a, r);   terminated[e]: the task ended it, not a limit of time

What is refused, each with the row: arrays of different lengths, NaN or infinite numbers, actions out of bounds.
Episodes may have different lengths: `windows` leaves out those shorter than its horizon and counts them.
`treesearch.offline.readers` reads files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.rewards.channels import Channels

Array = NDArray[Any]
Bounds = tuple[float | Array, float | Array] | None
ROUNDING = 1e-5  # actions stored as float32 may lie this far outside


class DataError(ValueError):
    """Data that cannot be read as episodes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OfflineData:
    """Steps of episodes, one after the other.

    Args:
        observations: (N, S) float32.
        actions: (N, A) float32.
        rewards: (N,) float32.
        ends: (E,) int64, increasing, the row after each episode's last; the last of them is N.
        terminated: (E,) bool, False for an episode that a limit of time or the end of the file cut.
        closing: (E, S) float32, the observation after each episode's last action; None where the data lack it.
        bounds: of the actions, checked where they are known.
        source: shown in errors.

    Raises:
        DataError: arrays that do not fit together, NaN or infinite numbers, actions out of bounds.
    """

    observations: Array
    actions: Array
    rewards: Array
    ends: Array
    terminated: Array
    closing: Array | None = None
    bounds: Bounds = None
    source: str = "data"

    def __post_init__(self) -> None:
        steps = len(self.observations)
        for name, ndim in (("observations", 2), ("actions", 2), ("rewards", 1)):
            value = getattr(self, name)
            if value.ndim != ndim or len(value) != steps:
                wanted = f"({steps}{', number of channels' if ndim == 2 else ','})"
                raise DataError(f"{self.source}: {name} have shape {value.shape}, expected {wanted}")
            check_finite(self.source, name, value)
        edges = np.concatenate([[0], self.ends])
        if not steps or edges[-1] != steps or (np.diff(edges) <= 0).any() or len(self.terminated) != len(self.ends):
            raise DataError(f"{self.source}: ends must increase up to the number of steps, {steps}, and be as many")
        if self.closing is not None:
            if self.closing.shape != (len(self.ends), self.observations.shape[1]):
                raise DataError(f"{self.source}: closing has shape {self.closing.shape}, expected one row an episode")
            check_finite(self.source, "closing observations", self.closing, "episode")
        check_bounds(self.source, self.actions, self.bounds)

    @property
    def lengths(self) -> Array:
        """Steps of each episode, (E,)."""
        return np.diff(self.ends, prepend=0)

    @property
    def channels(self) -> Channels:
        """Of the rows (s, a, r)."""
        return Channels(self.observations.shape[1], self.actions.shape[1], 1)

    @property
    def returns(self) -> Array:
        """Undiscounted sum of each episode's rewards, float64 (E,)."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.ends - self.lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def rows(self) -> Tensor:
        """All steps as rows (s, a, r), (N, C)."""
        return torch.from_numpy(np.concatenate([self.observations, self.actions, self.rewards[:, None]], 1))

    def describe(self) -> str:
        """One line for people."""
        lengths, over = self.lengths, int(self.terminated.sum())
        return (
            f"{self.source}: {len(self.rewards)} steps, {len(self)} episodes of {lengths.min()} to {lengths.max()} "
            f"steps, {over} terminated, mean return {self.returns.mean():.4g}"
        )


def joined(parts: Sequence[OfflineData]) -> OfflineData:
    """The episodes of several data sets, one after the other.

    Raises:
        DataError: none, or channels that differ.
    """
    if not parts or any(part.channels != parts[0].channels for part in parts):
        found = ", ".join(f"{part.source} {part.channels}" for part in parts) or "none"
        raise DataError(f"expected data sets of the same channels, got {found}")
    before = np.cumsum([0, *(len(part.rewards) for part in parts)])
    closing = [part.closing for part in parts if part.closing is not None]
    return OfflineData(
        observations=np.concatenate([part.observations for part in parts]),
        actions=np.concatenate([part.actions for part in parts]),
        rewards=np.concatenate([part.rewards for part in parts]),
        terminated=np.concatenate([part.terminated for part in parts]),
        ends=np.concatenate([part.ends + n for part, n in zip(parts, before, strict=False)]),
        closing=np.concatenate(closing) if len(closing) == len(parts) else None,
        source=", ".join(part.source for part in parts),
    )


def absorbing(data: OfflineData, rows: int) -> OfflineData:
    """The same, each episode that the task ended followed by rows that stay where it ended, of no action and no reward.

    Windows of up to rows + 1 rows then hold the end of an episode as often as any other step; otherwise only the last
    one would.

    Raises:
        DataError: where it ended is not known.
    """
    if not rows or not data.terminated.any():
        return data
    if data.closing is None:
        raise DataError(f"{data.source} has no closing observations, which next_observations of a file would be")
    at, count = data.ends[data.terminated], rows * int(data.terminated.sum())
    where = np.repeat(at, rows)
    return OfflineData(
        observations=np.insert(data.observations, where, np.repeat(data.closing[data.terminated], rows, 0), 0),
        actions=np.insert(data.actions, where, np.zeros((count, data.actions.shape[1]), np.float32), 0),
        rewards=np.insert(data.rewards, where, np.zeros(count, np.float32)),
        ends=data.ends + rows * data.terminated.cumsum(),
        terminated=data.terminated,
        closing=data.closing,
        bounds=data.bounds,
        source=data.source,
    )


@dataclass(frozen=True, eq=False)
class Windows:
    """Pieces of `horizon` rows that lie within one episode.

    Args:
        steps: (N, C), all rows.
        starts: (W,) int64, the first row of each.
        horizon: H.
        short: episodes left out because they are shorter.
    """

    steps: Tensor
    starts: Tensor
    horizon: int
    short: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: Any) -> Tensor:
        """Windows (n, H, C) by number, slice or tensor of numbers; one number gives (H, C)."""
        return self.steps[self.starts[which][..., None] + torch.arange(self.horizon)]


def windows(data: OfflineData, horizon: int, stride: int = 1, *, reward: bool = True) -> Windows:
    """Windows of a fixed horizon, `stride` rows apart, none of them across two episodes.

    Args:
        data: episodes of any lengths.
        horizon: rows of a window, at least 1.
        stride: rows from one start to the next within an episode, at least 1.
        reward: whether rows end in their reward.

    Raises:
        DataError: no episode is long enough.
    """
    if horizon < 1 or stride < 1:
        raise ValueError(f"horizon {horizon} and stride {stride}: expected at least 1")
    lengths = data.lengths
    long = lengths >= horizon
    if not long.any():
        raise DataError(
            f"{data.source}: no episode has {horizon} steps, the longest has {lengths.max()}: lower the horizon"
        )
    spans = zip((data.ends - lengths)[long].tolist(), data.ends[long].tolist(), strict=True)
    starts = torch.cat([torch.arange(first, end - horizon + 1, stride) for first, end in spans])
    rows = data.rows()
    return Windows(rows if reward else rows[:, :-1].contiguous(), starts, horizon, int((~long).sum()))


def check_finite(source: str, name: str, values: Array, unit: str = "step") -> None:
    """Refuse NaN and infinite numbers, by their row.

    Raises:
        DataError: there are some.
    """
    bad = np.unique(np.argwhere(~np.isfinite(values))[:, 0])
    if len(bad):
        raise DataError(
            f"{source}: {name} have NaN or infinite numbers in {len(bad)} of {len(values)} {unit}s, first in "
            f"{unit} {bad[0]}: drop those episodes before reading"
        )


def check_bounds(source: str, actions: Array, bounds: Bounds) -> None:
    """Refuse actions (n, A) that lie outside, by their row.

    Raises:
        DataError: there are some.
    """
    if bounds is None:
        return
    low, high = (np.asarray(b, np.float64) for b in bounds)
    outside = ((actions < low - ROUNDING) | (actions > high + ROUNDING)).any(1)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(
            f"{source}: actions of {int(outside.sum())} of {len(actions)} steps lie out of bounds, "
            f"first in step {row}: {actions[row].tolist()}, expected {low.min():g} to {high.max():g}: "
            "give the environment's bounds, or bounds=None to take them as they are"
        )
