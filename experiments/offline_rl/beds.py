"""What is learnt on: an environment, logged episodes of graded quality, and a trajectory model of them.

    medium          one agent, its actions disturbed by noise of one σ
    medium-replay   σ of an episode drawn from several

Returns are normalised as D4RL's are, 100 (R - random) / (expert - random), by its reference returns (Fu et al., 2020,
table 4), which are those of older versions of the same tasks.

A behaviour model knows windows of H rows (s, a, r), of half of which nothing is given and of the others the first
observation, for trajectories begin anywhere or at one of the data. An episode that the task ended goes on
for H - 2 rows where it ended, so that windows hold ends as often as any other step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.planning import locomotion, train_trajectory
from experiments.planning.locomotion import NOISE, Array
from treesearch.errors import TreeSearchError
from treesearch.offline.data import OfflineData
from treesearch.offline.readers import read

FIRST_STATES = 7_000_000  # seeds of evaluation, apart from those of data
Ended = Callable[[Tensor], Tensor]


def never(observations: Tensor) -> Tensor:
    """No observation (n, S) ends an episode."""
    return torch.zeros(len(observations), dtype=torch.bool)


def hopper_fell(observations: Tensor) -> Tensor:
    """Whether observations (n, S) end an episode of Hopper: the torso low or tilted, or a state far off."""
    far = (observations[:, 1:].abs() >= 100).any(1)
    return far | (observations[:, 0] <= 0.7) | (observations[:, 1].abs() >= 0.2)


def walker_fell(observations: Tensor) -> Tensor:
    """Whether observations (n, S) end an episode of Walker2d: the torso low, high or tilted."""
    height = observations[:, 0]
    return (height <= 0.8) | (height >= 2.0) | (observations[:, 1].abs() >= 1.0)


@dataclass(frozen=True, kw_only=True)
class Task:
    """An environment.

    Args:
        environment: gymnasium id.
        agent: file of the actor that its data come from.
        random, expert: D4RL's reference returns.
        ended: which observations end an episode.
    """

    environment: str
    agent: str
    random: float
    expert: float
    ended: Ended = never

    def normalised(self, returns: float) -> float:
        """100 (R - random) / (expert - random)."""
        return 100 * (returns - self.random) / (self.expert - self.random)


TASKS = {
    "halfcheetah": Task(environment="HalfCheetah-v5", agent="sac_HalfCheetah.npz", random=-280.178953, expert=12135.0),
    "hopper": Task(
        environment="Hopper-v5", agent="sac_Hopper.npz", random=-20.272305, expert=3234.3, ended=hopper_fell
    ),
    "walker2d": Task(
        environment="Walker2d-v5", agent="sac_Walker2d.npz", random=1.629008, expert=4592.3, ended=walker_fell
    ),
}
GRADES: dict[str, tuple[float, ...]] = {"medium": (0.6,), "medium-replay": NOISE}
ENVS = tuple(f"{task}-{grade}" for task in TASKS for grade in GRADES)


def task_of(env: str) -> tuple[Task, str]:
    """A task and the grade of its data, from a name such as hopper-medium-replay.

    Raises:
        ValueError: an unknown name.
    """
    name, _, grade = env.partition("-")
    if name not in TASKS or grade not in GRADES:
        raise ValueError(f"unknown env {env!r}: choose {', '.join(ENVS)}")
    return TASKS[name], grade


@dataclass(frozen=True, kw_only=True)
class Modelling:
    """Size of the data and of the behaviour model."""

    steps: int = 200_000
    """of the data"""
    limit: int = 1_000
    """steps of an episode"""
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
    """Logged episodes: a file of the caller's, or made by the task's agent and kept in the folder.

    Raises:
        TreeSearchError: there is neither.
        DataError: a file that is refused, see `treesearch.offline`.
    """
    task, grade = task_of(env)
    if dataset is not None:
        return read(dataset)
    out = folder / "data.npz"
    if not out.exists():
        if not (agent := agents / task.agent).exists():
            raise TreeSearchError(
                f"no data: put the actor {task.agent} into {agents}, or give --dataset a file of {env}"
            )
        part = folder / "data.part.npz"
        locomotion.main(
            locomotion.Args(
                agent=agent, out=part, environment=task.environment, steps=modelling.steps, limit=modelling.limit,
                noise=GRADES[grade],
            )
        )  # fmt: skip
        part.replace(out)
    return read(out)


def behaviour_model(env: str, modelling: Modelling, folder: Path, data: Path) -> Path:
    """Weights of the trajectory model of some data, trained until its epochs are done; returns their file."""
    weights = folder / "behaviour.safetensors"
    train_trajectory.main(
        train_trajectory.Args(
            data=(data,), out=folder / "behaviour", weights=weights, curve=folder / "behaviour.csv",
            horizons=(modelling.horizon,), stride=1, goal=0, environment=task_of(env)[0].environment, maze="",
            reward=True, unknown=0.5, absorbing=modelling.horizon - 2, widths=modelling.widths,
            epochs=modelling.epochs, steps=modelling.updates, batch_size=modelling.batch_size,
        )
    )  # fmt: skip
    return weights


def returns_of(environment: str, policy: Callable[[Tensor], Tensor], seeds: Sequence[int], steps: int) -> Array:
    """Undiscounted returns (n,) of a policy, observations (n, S) to actions (n, A), one episode a seed."""
    runners = locomotion.Runners(environment, seeds)
    for _ in range(steps):
        if not runners.alive.any():
            break
        with torch.no_grad():
            actions = policy(torch.from_numpy(runners.observations).float())
        runners.run(actions.numpy()[:, None])
    return runners.returns


class Simulator:
    """The environment's own next observation and reward, from any observation: its state but for the way travelled.

    Args:
        environment: gymnasium id of a MuJoCo task whose observations are positions without the first, and velocities.
    """

    def __init__(self, environment: str) -> None:
        self.env: Any = locomotion.make(environment)
        self.env.reset(seed=0)

    def step(self, observations: Array, actions: Array) -> tuple[Array, Array]:
        """Next observations (n, S) and rewards (n,)."""
        after, rewards, positions = [], [], self.env.model.nq - 1
        for seen, action in zip(observations.astype(np.float64), actions.astype(np.float64), strict=True):
            self.env.set_state(np.concatenate([[0.0], seen[:positions]]), seen[positions:])
            found, reward, *_ = self.env.step(np.clip(action, -1, 1))
            after.append(found)
            rewards.append(reward)
        return np.array(after), np.array(rewards)
