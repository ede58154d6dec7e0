"""Offline data of reinforcement learning: episodes from D4RL's HDF5, Minari and npz as flat arrays, and windows.

    episode e = rows ends[e-1] .. ends[e]-1,  row = (s, a, r);   terminated[e]: the task ended it, not a limit of time

Formats: D4RL: Datasets for Deep Data-Driven Reinforcement Learning (Fu et al., 2020): observations, actions, rewards,
terminals, timeouts, one row a step; Minari, "Dataset standards": T actions and T + 1 observations an episode.

What is refused, each with the row: arrays of different lengths, NaN or infinite numbers, actions out of bounds, files
that do not say where their episodes end. An episode that the end of the file cuts counts as ended by time. Episodes
may have different lengths: `windows` leaves out those shorter than its horizon and counts them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.shared.arrays import check_hdf5, read_hdf5
from experiments.shared.arrays import read_npz as read_npz_arrays
from treesearch.rewards.channels import Channels

Array = NDArray[Any]
Bounds = tuple[float | Array, float | Array] | None
UNIT = (-1.0, 1.0)
ROUNDING = 1e-5  # actions stored as float32 may lie this far outside
NAMES = {
    "observations": ("observations", "observation"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminals": ("terminals", "terminal", "terminations"),
    "timeouts": ("timeouts", "timeout", "truncations"),
}
"""What a file may call its arrays."""


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
    bounds: Bounds = None
    source: str = "data"

    def __post_init__(self) -> None:
        steps = len(self.observations)
        for name, ndim in (("observations", 2), ("actions", 2), ("rewards", 1)):
            value = getattr(self, name)
            if value.ndim != ndim or len(value) != steps:
                wanted = f"({steps}{', number of channels' if ndim == 2 else ','})"
                raise DataError(f"{self.source}: {name} have shape {value.shape}, expected {wanted}")
            _check_finite(self.source, name, value)
        edges = np.concatenate([[0], self.ends])
        if not steps or edges[-1] != steps or (np.diff(edges) <= 0).any() or len(self.terminated) != len(self.ends):
            raise DataError(f"{self.source}: ends must increase up to the number of steps, {steps}, and be as many")
        _check_bounds(self.source, self.actions, self.bounds)

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
    names = ("observations", "actions", "rewards", "terminated")
    return OfflineData(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
        ends=np.concatenate([part.ends + n for part, n in zip(parts, before, strict=False)]),
        source=", ".join(part.source for part in parts),
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


def read_d4rl(
    path: str | os.PathLike[str], *, episode_length: int | None = None, bounds: Bounds = UNIT, source: str | None = None
) -> OfflineData:
    """A D4RL file (HDF5).

    Args:
        path: the file.
        episode_length: limit of time of its episodes, for files without `timeouts`; more than the file has steps for
            one uninterrupted episode.
        bounds: of the actions; None takes them as they are.
        source: name in errors, the file's by default.

    Raises:
        DataError: see `OfflineData`; arrays that are missing; neither timeouts nor an episode_length.
    """
    try:
        arrays = read_hdf5(path, itertools.chain(*NAMES.values()))
    except ImportError as error:
        raise ImportError("D4RL files need h5py: pip install 'treesearch[rl]'") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable HDF5 file: {error}") from error
    return from_arrays(arrays, source or Path(path).name, episode_length=episode_length, bounds=bounds)


def read_npz(
    path: str | os.PathLike[str], *, episode_length: int | None = None, bounds: Bounds = UNIT, source: str | None = None
) -> OfflineData:
    """An npz file of the same arrays; arguments and errors are those of `read_d4rl`."""
    try:
        arrays = read_npz_arrays(path, itertools.chain(*NAMES.values()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable npz file: {error}") from error
    return from_arrays(arrays, source or Path(path).name, episode_length=episode_length, bounds=bounds)


def from_arrays(
    arrays: Mapping[str, Array], source: str, *, episode_length: int | None = None, bounds: Bounds = UNIT
) -> OfflineData:
    """Episodes from flat arrays under one of `NAMES`; arguments and errors are those of `read_d4rl`."""
    found = {name: next((arrays[n] for n in known if n in arrays), None) for name, known in NAMES.items()}
    if lost := [name for name in ("observations", "actions", "rewards") if found[name] is None]:
        raise DataError(f"{source} has no {', '.join(lost)}: got {', '.join(sorted(arrays)) or 'nothing'}")
    steps = len(found["observations"])  # type: ignore[arg-type]
    flags = [_flags(source, name, found[name], steps) for name in ("terminals", "timeouts")]
    ends, terminated = _ends(source, steps, flags[0], flags[1], episode_length)
    floats = {name: np.asarray(found[name], np.float32) for name in ("observations", "actions", "rewards")}
    if floats["rewards"].ndim == 2 and floats["rewards"].shape[1] == 1:
        floats["rewards"] = floats["rewards"][:, 0]
    return OfflineData(**floats, ends=ends, terminated=terminated, bounds=bounds, source=source)


def read_minari(folder: str | os.PathLike[str], *, observation: str = "observation") -> OfflineData:
    """A Minari dataset; its action space has the bounds.

    The observation after the last action of each episode has no action and is left out.

    Args:
        folder: of the dataset, the one that holds `data`.
        observation: which part of observations that are dictionaries.

    Raises:
        DataError: see `OfflineData`; no dataset, or observations or actions that are no vectors.
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError("Minari datasets need minari: pip install 'treesearch[rl]'") from error
    try:
        for file in sorted((Path(folder) / "data").glob("*.hdf5")):
            check_hdf5(file)
        data = minari.MinariDataset(Path(folder) / "data")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no Minari dataset: {error}") from error
    episodes = list(_minari_episodes(data, observation, Path(folder).name))
    if not episodes:
        raise DataError(f"{folder} has no episodes")
    observations, actions, rewards, terminated = zip(*episodes, strict=True)
    low, high = getattr(data.action_space, "low", None), getattr(data.action_space, "high", None)
    return OfflineData(
        observations=np.concatenate(observations),
        actions=np.concatenate(actions),
        rewards=np.concatenate(rewards),
        ends=np.cumsum([len(r) for r in rewards]),
        terminated=np.array(terminated),
        bounds=None if low is None or high is None else (low, high),
        source=data.id,
    )


def _minari_episodes(data: Any, observation: str, source: str) -> Iterator[tuple[Array, Array, Array, bool]]:
    for episode in data:
        seen = episode.observations
        if isinstance(seen, dict):
            if observation not in seen:
                raise DataError(f"{source}: observations have no part {observation!r}, got {', '.join(sorted(seen))}")
            seen = seen[observation]
        steps = len(episode.rewards)
        for name, value, length in (("observations", seen, steps + 1), ("actions", episode.actions, steps)):
            if not isinstance(value, np.ndarray) or value.ndim != 2 or len(value) != length:
                got = getattr(value, "shape", type(value).__name__)
                raise DataError(f"{source}: {name} of episode {episode.id} are {got}, expected {length} vectors")
        floats = [np.asarray(v, np.float32) for v in (seen[:-1], episode.actions, episode.rewards)]
        yield floats[0], floats[1], floats[2], bool(episode.terminations[-1])


def _flags(source: str, name: str, values: Array | None, steps: int) -> Array | None:
    if values is None:
        return None
    flat = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if flat.shape != (steps,):
        raise DataError(f"{source}: {name} have shape {values.shape}, expected ({steps},), one a step")
    if not np.isin(flat, (0, 1)).all():
        raise DataError(f"{source}: {name} hold {flat[~np.isin(flat, (0, 1))][0]}, expected 0 and 1")
    return flat.astype(bool)


def _ends(
    source: str, steps: int, terminals: Array | None, timeouts: Array | None, episode_length: int | None
) -> tuple[Array, Array]:
    """Where episodes end, and which of them the task ended."""
    if timeouts is None and episode_length is None:
        what = "has terminals but no timeouts" if terminals is not None else "has neither terminals nor timeouts"
        raise DataError(
            f"{source} {what}, so where a limit of time cut an episode is unknown: give episode_length "
            f"(more than {steps} for one uninterrupted episode)"
        )
    if episode_length is not None and episode_length < 1:
        raise ValueError(f"episode_length is {episode_length}, expected at least 1")
    terminal = np.zeros(steps, bool) if terminals is None else terminals
    ended = terminal if timeouts is None else terminal | timeouts
    edges = np.concatenate([[0], np.flatnonzero(ended) + 1, [steps]])
    if episode_length is not None:
        cuts = [np.arange(a, b, episode_length) for a, b in itertools.pairwise(edges.tolist())]
        edges = np.concatenate([*cuts, [steps]])
    ends = np.unique(edges[edges > 0])
    return ends, terminal[ends - 1]


def _check_finite(source: str, name: str, values: Array) -> None:
    bad = np.unique(np.argwhere(~np.isfinite(values))[:, 0])
    if len(bad):
        raise DataError(
            f"{source}: {name} have NaN or infinite numbers in {len(bad)} of {len(values)} steps, first in step "
            f"{bad[0]}: drop those episodes before reading"
        )


def _check_bounds(source: str, actions: Array, bounds: Bounds) -> None:
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
