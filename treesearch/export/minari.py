"""A search over trajectories as a Minari dataset: one trajectory is one episode.

    τ = (s_h, a_h, r_h), h = 0..H-1   ->   observations s_0..s_{H-1}, actions a_0..a_{H-2}, rewards r_0..r_{H-2}

The last observation closes the episode, which ends by truncation; the last row's action and reward lead nowhere and are
left out. Trajectories without a reward channel get the search's reward r(τ) at their last step and 0 before it, so that
an episode's return is r(τ). A trajectory of reward -inf is forbidden and is no episode.

Episodes: every leaf, the best k, or draws of the method's estimate of π. Each carries as its metadata task, node,
search_reward, log_weight, weight (its share of the estimate: 1/n for draws, else the softmax of log_weight over the
task's leaves) and the prompt; the dataset's metadata has under "treesearch" what the run's card says, and where the
model knows them its environment and how many of its steps a row spans.

Format: Minari, Farama Foundation, "Dataset standards" (episodes of T actions and T + 1 observations, HDF5).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.core.weights import normalise
from treesearch.errors import TreeSearchError, missing
from treesearch.results.result import SearchResult, TaskResult
from treesearch.results.summary import summary
from treesearch.rewards.channels import Channels

NAME = re.compile(r"[-\w]+-v\d+")
ALGORITHM = "treesearch"


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Trajectories with what is known of each.

    Args:
        samples: (n, H, C) in data units.
        notes: n records of plain numbers and strings; `search_reward` is among them.
        facts: of all of them, plain data.
    """

    samples: Tensor
    notes: Sequence[dict[str, Any]]
    facts: dict[str, Any]


def write_minari(
    result: SearchResult,
    folder: str | os.PathLike[str],
    kernel: Any,
    *,
    observation: int | None = None,
    action: int | None = None,
    task: int | None = None,
    draws: int | None = None,
    best: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a result as a dataset.

    Args:
        result: of a search whose samples are trajectories.
        folder: of the dataset; its name is the dataset's, such as datasets/plans-v0.
        kernel: that was searched, for its `channels` and its `card`.
        observation, action: channels of each, where the kernel does not know; see `layout`.
        task, draws, best, seed: which trajectories; see `collect`.

    Returns:
        The folder. `minari.load_dataset(folder.name)` finds it where MINARI_DATASETS_PATH is its parent.

    Raises:
        ValueError, TreeSearchError, ImportError: see `collect`, `layout` and `write_episodes`.
    """
    found = collect(result, task=task, draws=draws, best=best, seed=seed)
    channels = layout(kernel, found.samples.shape[2], observation, action)
    return write_episodes(replace(found, facts=found.facts | origin(kernel)), folder, channels)


def collect(
    result: SearchResult,
    *,
    task: int | None = None,
    draws: int | None = None,
    best: int | None = None,
    seed: int = 0,
) -> Episodes:
    """The trajectories of a result: every leaf, or draws, or the best.

    Args:
        result: of a search whose samples are trajectories.
        task: which one; None for all of them.
        draws: this many draws of each task's estimate of π, with replacement.
        best: this many of each task's trajectories of highest reward, best first.
        seed: of the draws.

    Raises:
        ValueError: both draws and best, or one below 1.
        TreeSearchError: samples that are no trajectories, or no sample at all.
        ZeroWeights: draws of a task in which no leaf carries weight.
    """
    if draws is not None and best is not None:
        raise ValueError("draws and best are two datasets: ask for one of them")
    for name, count in (("draws", draws), ("best", best)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1")
    chosen = range(len(result.tasks)) if task is None else [task]
    rows = {i: _rows(result.tasks[i], draws, best, seed) for i in chosen}
    if not sum(map(len, rows.values())):
        raise TreeSearchError("no trajectory to write: the search scored none above -inf; give it more budget")
    parts = [trajectories(result.tasks[i].pick(found)) for i, found in rows.items() if len(found)]
    notes = [note for i, found in rows.items() for note in _notes(i, result.tasks[i], found, draws)]
    how = "draws" if draws else "best" if best else "leaves"
    return Episodes(samples=torch.cat(parts), notes=notes, facts={"episodes": how} | _facts(result, rows))


def trajectories(samples: Any) -> Tensor:
    """Samples, if they may be trajectories (n, H, C).

    Raises:
        TreeSearchError: they are not.
    """
    if isinstance(samples, Tensor) and samples.ndim == 3 and samples.is_floating_point():
        return samples
    got = f"{samples.dtype} {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
    raise TreeSearchError(
        f"the samples of this search are no trajectories: expected a float tensor (n, H, C), got {got}; export npz"
    )


def layout(kernel: Any, width: int, observation: int | None = None, action: int | None = None) -> Channels:
    """How rows of `width` channels split: as told here, else as the kernel's `channels` say.

    Raises:
        TreeSearchError: neither says, or they do not add up.
    """
    if (observation is None) != (action is None):
        raise TreeSearchError("observation and action go together: give how many channels of a row each has")
    if observation is not None and action is not None:
        if not 0 <= (rest := width - observation - action) <= 1:
            raise TreeSearchError(
                f"observation {observation} and action {action} leave {rest} of {width} channels, "
                "expected none, or one for the reward"
            )
        return Channels(observation, action, rest)
    if (known := getattr(kernel, "channels", None)) is None:
        raise TreeSearchError(
            f"{type(kernel).__name__} does not say how its rows of {width} channels split: "
            "give observation and action (--observation N --action M); one channel beyond them is the reward"
        )
    return known


def origin(kernel: Any) -> dict[str, Any]:
    """What a trained kernel's card says of its rows: the environment, and its steps a row."""
    card = getattr(kernel, "card", None)
    return {name: getattr(card, name) for name in ("environment", "stride") if getattr(card, name, None)}


def write_episodes(episodes: Episodes, folder: str | os.PathLike[str], channels: Channels) -> Path:
    """Write trajectories as a Minari dataset.

    Args:
        episodes: at least one, of two or more rows.
        folder: of the dataset; its name is the dataset's, such as datasets/plans-v0.
        channels: how the rows split; actions of at least one number.

    Raises:
        ValueError: trajectories that the channels do not fit, with NaN, or of a single row.
        TreeSearchError: a name that Minari does not take, a folder that exists, no actions.
        ImportError: Minari is not installed.
    """
    folder = _checked(Path(folder))
    samples = channels.checked(episodes.samples, length=2).cpu()
    if not channels.observation:
        raise TreeSearchError("chunks of a policy have no observations, and episodes need them: export npz")
    if not channels.action:
        raise TreeSearchError(f"{channels} has no actions, and episodes need them: export npz")
    _library()
    facts = {
        "channels": {name: getattr(channels, name) for name in ("observation", "action", "reward")},
        "rewards": "reward channel" if channels.reward else "search reward, at the last step of an episode",
        "distinct": len(samples.unique(dim=0)),
    } | episodes.facts
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Minari joins a relative path onto itself
    with tempfile.TemporaryDirectory(dir=folder.parent.resolve(), prefix=".minari-") as scratch:
        _write(Path(scratch) / "data", folder.name, samples, channels, episodes.notes, facts)
        folder.mkdir()
        os.replace(Path(scratch) / "data", folder / "data")
    return folder


def named(text: str) -> str:
    """A name that Minari takes, version 0."""
    return f"{re.sub(r'[^a-zA-Z0-9_]+', '-', text).strip('-') or 'plans'}-v0"


def _checked(folder: Path) -> Path:
    if not NAME.fullmatch(folder.name):
        raise TreeSearchError(
            f"{folder.name!r} is no name of a Minari dataset: give its folder a name that ends in a version, "
            f"such as {named(folder.name)}"
        )
    if folder.exists():
        raise TreeSearchError(f"{folder} exists: remove it, or write the dataset under another name or version")
    return folder


def _write(
    data: Path, name: str, samples: Tensor, channels: Channels, notes: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> None:
    """The files of a dataset, in a folder that does not exist yet."""
    minari, storage_class, box = _library()
    dtype = samples.numpy().dtype.type
    sizes = (channels.observation, channels.action)
    spaces = [box(-math.inf, math.inf, (size,), dtype) for size in sizes]
    storage = storage_class.new(data, *spaces, data_format="hdf5")
    storage.update_metadata(
        {
            "dataset_id": name,
            "minari_version": minari.__version__,
            "algorithm_name": str(facts.get("method", {}).get("name", ALGORITHM)),
            "description": f"{len(samples)} trajectories of {samples.shape[1]} rows, found by {ALGORITHM}",
            ALGORITHM: json.loads(json.dumps(facts, default=str)),
        }
    )
    storage.update_episodes(_buffers(samples, channels, notes))
    storage.update_episode_metadata(notes)


def _buffers(samples: Tensor, channels: Channels, notes: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Minari's episodes."""
    from minari.data_collector import EpisodeBuffer

    steps = samples.shape[1] - 1
    ends = np.arange(steps) == steps - 1
    observations, actions = channels.observations(samples).numpy(), channels.actions(samples).numpy()[:, :-1]
    if channels.reward:
        rewards = channels.rewards(samples).numpy()[:, :-1]
    else:
        rewards = np.array([note["search_reward"] for note in notes])[:, None] * ends
    for i in range(len(samples)):
        yield EpisodeBuffer(
            observations=observations[i],
            actions=actions[i],
            rewards=rewards[i],
            terminations=[False] * steps,
            truncations=ends.tolist(),
        )


def _rows(task: TaskResult, draws: int | None, best: int | None, seed: int) -> np.ndarray[Any, Any]:
    """Positions of a task's samples, in the order of the episodes."""
    rewards = task.rewards.numpy()
    if draws is not None:
        return task.draw_rows(draws, seed)
    if best is not None:
        order = np.argsort(-rewards, kind="stable")
        return order[rewards[order] > -math.inf][:best]
    return np.flatnonzero(rewards > -math.inf)


def _notes(i: int, task: TaskResult, rows: np.ndarray[Any, Any], draws: int | None) -> Iterator[dict[str, Any]]:
    log_w = task.log_weights.numpy()
    share = normalise(log_w) if log_w.max() > -math.inf else np.zeros(len(log_w))
    prompt = {} if task.prompt is None else {"prompt": json.dumps(task.prompt, default=str)}
    for row in rows.tolist():
        yield {
            "task": i,
            "node": int(task.leaves[row]),
            "search_reward": float(task.rewards[row]),
            "log_weight": float(log_w[row]),
            "weight": 1 / draws if draws else float(share[row]),
        } | prompt


def _facts(result: SearchResult, rows: dict[int, Any]) -> dict[str, Any]:
    """What the card of a run says."""
    config = result.tasks[0].context.config
    told = ("method", "kernel", "fingerprint", "reward", "reward_settings", "seed", "num_steps", "budget", "versions")
    figures = summary(result)
    return {key: config[key] for key in told} | {
        "cost": result.cost.as_dict(),
        "tasks": [figures[i] | {"task": i, "written": len(found)} for i, found in rows.items()],
    }


def _library() -> tuple[Any, Any, Any]:
    """Minari, its storage and a box of numbers."""
    try:
        import minari
        from gymnasium.spaces import Box
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise missing("minari[hdf5]", "rl") from error
    return minari, MinariStorage, Box
