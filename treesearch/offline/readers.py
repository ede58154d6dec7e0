"""Readers of offline data: D4RL's HDF5, Minari, OGBench, npz.

    D4RL, npz   s, a, r, terminals, timeouts: one row a step
    Minari      T actions, T + 1 observations an episode
    OGBench     s, a, terminals: T + 1 rows an episode, the last one its closing observation, whose action leads nowhere

Files that do not say where their episodes end are refused, and what `treesearch.offline.data` refuses, with the row.
An episode that the end of a file cuts counts as ended by time. Files are data: nothing that one holds is run.

Sources: D4RL: Datasets for Deep Data-Driven Reinforcement Learning (Fu et al., 2020). Minari, "Dataset standards"
(Farama Foundation). OGBench: Benchmarking Offline Goal-Conditioned RL (Park et al., 2025), section 4.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treesearch.offline.arrays import check_hdf5, read_hdf5
from treesearch.offline.arrays import read_npz as read_npz_arrays
from treesearch.offline.data import Array, Bounds, DataError, OfflineData, check_bounds, check_finite

UNIT = (-1.0, 1.0)
NAMES = {
    "observations": ("observations", "observation"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminals": ("terminals", "terminal", "terminations"),
    "timeouts": ("timeouts", "timeout", "truncations"),
    "next_observations": ("next_observations", "next_observation"),
}
"""What a file may call its arrays."""


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
    closing = None
    if (after := found["next_observations"]) is not None:
        if after.shape != floats["observations"].shape:
            raise DataError(f"{source}: next_observations have shape {after.shape}, expected that of observations")
        closing = np.asarray(after, np.float32)[ends - 1]
    return OfflineData(**floats, ends=ends, terminated=terminated, closing=closing, bounds=bounds, source=source)


def read_ogbench(
    path: str | os.PathLike[str],
    *,
    reward: Callable[[Array, Array, Array], Array] | None = None,
    bounds: Bounds = UNIT,
    source: str | None = None,
) -> OfflineData:
    """An OGBench file of vectors (npz); its `terminals` mark where a limit of time ended an episode.

    Args:
        path: the file.
        reward: of n steps, (s, a, s') -> (n,): these files have no rewards, for they are asked for many goals; None
            for 0.
        bounds, source: as for `read_d4rl`.

    Raises:
        DataError: see `OfflineData`, with rows of the file; arrays that are missing, images, or an episode of no step.
    """
    source = source or Path(path).name
    try:
        arrays = read_npz_arrays(path, ("observations", "actions", "terminals"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable npz file: {error}") from error
    if lost := {"observations", "actions", "terminals"} - arrays.keys():
        raise DataError(f"{source} has no {', '.join(sorted(lost))}: it is no file of OGBench")
    seen, actions = (np.asarray(arrays[name], np.float32) for name in ("observations", "actions"))
    if seen.ndim != 2 or actions.ndim != 2 or len(actions) != len(seen):
        raise DataError(
            f"{source}: observations and actions have shapes {seen.shape} and {actions.shape}, expected vectors"
        )
    last = _closing_rows(source, _flags(source, "terminals", arrays["terminals"], len(seen)))
    step = np.ones(len(seen), bool)
    step[last] = False
    check_finite(source, "observations", seen)
    acted = np.where(step[:, None], actions, 0.0)
    check_finite(source, "actions", acted)
    check_bounds(source, acted, bounds)
    before, made, after = seen[step], actions[step], seen[np.flatnonzero(step) + 1]
    return OfflineData(
        observations=before,
        actions=made,
        rewards=np.zeros(len(made), np.float32)
        if reward is None
        else np.asarray(reward(before, made, after), np.float32),
        ends=last - np.arange(len(last)),
        terminated=np.zeros(len(last), bool),
        closing=seen[last],
        bounds=bounds,
        source=source,
    )


def _closing_rows(source: str, terminals: Array | None) -> Array:
    """The last row of each episode; the file's end closes the last one."""
    assert terminals is not None
    last = np.unique(np.append(np.flatnonzero(terminals), len(terminals) - 1))
    short = np.diff(last, prepend=-1) < 2
    if short.any():
        row = int(last[short.argmax()])
        raise DataError(f"{source}: the episode that ends in row {row} has no step: drop it, or this is D4RL's format")
    return last


def read_minari(folder: str | os.PathLike[str], *, observation: str = "observation") -> OfflineData:
    """A Minari dataset; its action space has the bounds.

    The observation after the last action of each episode has no action: it is no row, but the episode's `closing`.

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
    observations, actions, rewards, terminated, closing = zip(*episodes, strict=True)
    low, high = getattr(data.action_space, "low", None), getattr(data.action_space, "high", None)
    return OfflineData(
        observations=np.concatenate(observations),
        actions=np.concatenate(actions),
        rewards=np.concatenate(rewards),
        ends=np.cumsum([len(r) for r in rewards]),
        terminated=np.array(terminated),
        closing=np.stack(closing),
        bounds=None if low is None or high is None else (low, high),
        source=data.id,
    )


def _minari_episodes(data: Any, observation: str, source: str) -> Iterator[tuple[Array, Array, Array, bool, Array]]:
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
        if not steps:
            raise DataError(f"{source}: episode {episode.id} has no step")
        floats = [np.asarray(v, np.float32) for v in (seen, episode.actions, episode.rewards)]
        yield floats[0][:-1], floats[1], floats[2], bool(episode.terminations[-1]), floats[0][-1]


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


READERS = {".npz": read_npz, ".hdf5": read_d4rl, ".h5": read_d4rl, "": read_minari}
"""By the ending of a path; a folder is a Minari dataset. An npz file of OGBench looks like one of D4RL's names."""


def read(path: str | os.PathLike[str]) -> OfflineData:
    """A file or folder by the ending of its path; OGBench's files have `read_ogbench`.

    Raises:
        DataError: another ending, or what its reader refuses.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise DataError(f"{path.name}: expected a file .npz, .hdf5 or .h5, or the folder of a Minari dataset")
    return READERS[path.suffix](path)
