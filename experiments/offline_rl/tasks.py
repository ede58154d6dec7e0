"""What is learnt on: an environment that can be put into any state, data of it, and what a return is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.planning.locomotion import Array, Data, Runners

Ended = Callable[[Tensor], Tensor]
Policy = Callable[[Tensor], Tensor]


def never(observations: Tensor) -> Tensor:
    """No observation (n, S) ends an episode."""
    return torch.zeros(len(observations), dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """An environment and its data.

    Args:
        environment: gymnasium id.
        random, expert: reference returns.
        limit: decisions of an episode, at most.
        ended: which observations end an episode.
        maze: whose walls the environment has; "" for none.
    """

    environment: str
    random: float
    expert: float
    limit: int = 1_000
    ended: Ended = never
    maze: str = ""

    def normalised(self, returns: float) -> float:
        """100 (R - random) / (expert - random)."""
        return 100 * (returns - self.random) / (self.expert - self.random)

    @abstractmethod
    def make(self) -> Any:
        """The environment: `reset(seed=)`, `step(action)` and spaces as gymnasium's, without a limit of time."""

    @abstractmethod
    def place(self, env: Any, observation: Array) -> None:
        """Put one that was reset into the state that an observation (S,) is of."""

    @abstractmethod
    def data(self, agents: Path, steps: int, limit: int) -> Data:
        """At least so many steps of logged episodes.

        Args:
            agents: folder of the actors that data may be made with.
            steps: decisions.
            limit: of an episode.

        Raises:
            TreeSearchError: the actor is missing.
        """


def returns_of(task: Task, policy: Policy, seeds: Sequence[int], steps: int) -> Array:
    """Undiscounted returns (n,) of a policy, observations (n, S) to actions (n, A), one episode a seed.

    Args:
        task: what is played.
        policy: what plays.
        seeds: of the first states.
        steps: decisions of an episode, if that is less than the task's.
    """
    runners = Runners(task.make, seeds)
    for _ in range(min(steps, task.limit)):
        if not runners.alive.any():
            break
        with torch.no_grad():
            actions = policy(torch.from_numpy(runners.observations).float())
        runners.run(actions.numpy()[:, None])
    return runners.returns


class Simulator:
    """The environment's own next observation and reward, from any observation."""

    def __init__(self, task: Task) -> None:
        self.task, self.env = task, task.make()
        self.env.reset(seed=0)

    def step(self, observations: Array, actions: Array) -> tuple[Array, Array]:
        """Next observations (n, S) and rewards (n,)."""
        after, rewards = [], []
        for seen, action in zip(observations.astype(np.float64), actions.astype(np.float64), strict=True):
            self.task.place(self.env, seen)
            found, reward, *_ = self.env.step(np.clip(action, -1, 1))
            after.append(found)
            rewards.append(reward)
        return np.array(after), np.array(rewards)
