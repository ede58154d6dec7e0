"""Locomotion: agents whose actions are disturbed, by grade.

    medium          one agent, noise of one σ
    medium-replay   σ of an episode drawn from several

Returns are normalised as D4RL's are, by its reference returns (Fu et al., 2020, table 4), which are those of older
versions of the same tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from experiments.offline_rl.tasks import Ended, Task, never
from experiments.planning import locomotion
from experiments.planning.locomotion import NOISE, Actor, Array, Data
from treesearch.errors import TreeSearchError

GRADES: dict[str, tuple[float, ...]] = {"medium": (0.6,), "medium-replay": NOISE}


def hopper_fell(observations: Tensor) -> Tensor:
    """Whether observations (n, S) end an episode of Hopper: the torso low or tilted, or a state far off."""
    far = (observations[:, 1:].abs() >= 100).any(1)
    return far | (observations[:, 0] <= 0.7) | (observations[:, 1].abs() >= 0.2)


def walker_fell(observations: Tensor) -> Tensor:
    """Whether observations (n, S) end an episode of Walker2d: the torso low, high or tilted."""
    height = observations[:, 0]
    return (height <= 0.8) | (height >= 2.0) | (observations[:, 1].abs() >= 1.0)


@dataclass(frozen=True, kw_only=True)
class BodyTask(Task):
    """A MuJoCo task whose observations are positions without the first, the way travelled, and velocities.

    Args:
        agent: file of the actor that its data come from.
        noise: σ of an episode is one of them.
    """

    agent: str
    noise: tuple[float, ...]

    def make(self) -> Any:
        return locomotion.make(self.environment)

    def place(self, env: Any, observation: Array) -> None:
        positions = env.model.nq - 1
        env.set_state(np.concatenate([[0.0], observation[:positions]]), observation[positions:])

    def data(self, agents: Path, steps: int, limit: int) -> Data:
        if not (agent := agents / self.agent).exists():
            raise TreeSearchError(
                f"no data: put the actor {self.agent} into {agents}, or give --dataset a file of {self.environment}"
            )
        return locomotion.generate(Actor.load(agent), self.environment, steps, limit, 0, self.noise)


def _graded(
    name: str, environment: str, agent: str, random: float, expert: float, ended: Ended = never
) -> dict[str, BodyTask]:
    return {
        f"{name}-{grade}": BodyTask(
            environment=environment, agent=agent, random=random, expert=expert, ended=ended, noise=noise
        )
        for grade, noise in GRADES.items()
    }


TASKS: dict[str, BodyTask] = {
    **_graded("halfcheetah", "HalfCheetah-v5", "sac_HalfCheetah.npz", -280.178953, 12135.0),
    **_graded("hopper", "Hopper-v5", "sac_Hopper.npz", -20.272305, 3234.3, hopper_fell),
    **_graded("walker2d", "Walker2d-v5", "sac_Walker2d.npz", 1.629008, 4592.3, walker_fell),
}
