"""Tasks by name, logged episodes of each, and a trajectory model of them.

A behaviour model knows windows of H rows (s, a, r), of half of which nothing is given and of the others the first
observation, for trajectories begin anywhere or at one of the data. An episode that the task ended goes on
for H - 1 rows where it ended, so that windows hold its last step as often as any other, but for those near its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.offline_rl import bodies, mazes
from experiments.offline_rl.tasks import Task
from experiments.planning import train_trajectory
from treesearch.offline.data import OfflineData
from treesearch.offline.readers import read

FIRST_STATES = 7_000_000  # seeds of evaluation, apart from those of data
TASKS: dict[str, Task] = {**bodies.TASKS, **mazes.TASKS}


def task_of(env: str) -> Task:
    """A task by its name, such as hopper-medium-replay.

    Raises:
        ValueError: an unknown name.
    """
    if env not in TASKS:
        raise ValueError(f"unknown env {env!r}: choose {', '.join(TASKS)}")
    return TASKS[env]


@dataclass(frozen=True, kw_only=True)
class Modelling:
    """Size of the data and of the behaviour model."""

    steps: int = 200_000
    """of the data"""
    limit: int = 1_000
    """steps of an episode, at most"""
    horizon: int = 16
    """H"""
    widths: tuple[int, ...] = train_trajectory.WIDTHS
    """of the network"""
    epochs: int = 40
    """of its training, each of `updates` optimiser steps"""
    updates: int = 250
    """optimiser steps an epoch"""
    batch_size: int = 128
    """windows of a step"""


def episodes_of(env: str, modelling: Modelling, agents: Path, folder: Path, dataset: Path | None) -> OfflineData:
    """Logged episodes: a file of the caller's, or made by the task and kept in the folder.

    Raises:
        TreeSearchError: there is neither, and the agent that would make them is missing.
        DataError: a file that is refused, see `treesearch.offline`.
    """
    task = task_of(env)
    if dataset is not None:
        return read(dataset)
    out = folder / "data.npz"
    if not out.exists():
        part = folder / "data.part.npz"
        np.savez(part, **task.data(agents, modelling.steps, min(modelling.limit, task.limit))._asdict())
        part.replace(out)
    return read(out)


def behaviour_model(env: str, modelling: Modelling, folder: Path, data: Path) -> Path:
    """Weights of the trajectory model of some data, trained until its epochs are done; returns their file."""
    weights, task = folder / "behaviour.safetensors", task_of(env)
    train_trajectory.main(
        train_trajectory.Args(
            data=(data,), out=folder / "behaviour", weights=weights, curve=folder / "behaviour.csv",
            horizons=(modelling.horizon,), stride=1, goal=0, environment=task.environment, maze=task.maze,
            reward=True, unknown=0.5, absorbing=modelling.horizon - 1, widths=modelling.widths,
            epochs=modelling.epochs, steps=modelling.updates, batch_size=modelling.batch_size,
        )
    )  # fmt: skip
    return weights
