"""What plans: mazes with their models and rewards, and the methods that are compared on them.

Sources: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), algorithm 1, the guided
rule; Monte Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), guidance scales as actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import treesearch as ts
from experiments.planning.plan_critic import critic_reward
from experiments.planning.pointmaze import Acting
from experiments.shared.cells import Row
from experiments.shared.grids import Entry, How
from treesearch.backends.guidance.diffuser import Diffuser
from treesearch.backends.models.trajectory import maze_kernel, trajectory_kernel
from treesearch.backends.wrappers.scales import GuidanceScales
from treesearch.methods.settings import spaced_levels
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.execution import maze_execution
from treesearch.rewards.trajectories.maze import maze_plan

NARROW: How = {"widening_c": 1.0, "widening_alpha": 0.5}
DYNAMICS = 3.0  # weight of the dynamics error in `maze_plan`
REACH = 0.35  # at which `maze_execution` counts a goal as reached: a margin for what its model of the maze gets wrong
SCALES = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Task:
    """What is asked of the planners.

    Args:
        maze: its name.
        horizon: rows of a plan; None for the longest that the model was trained with.
        reward: "execution" (does it arrive in a model of the maze?) or "plan" (does it look sound?).
    """

    maze: str
    horizon: int | None
    reward: str

    @property
    def row(self) -> Row:
        """Its identity."""
        return {"maze": self.maze, "horizon": self.horizon, "by": self.reward}


class Bed(NamedTuple):
    """A maze with its model."""

    maze: str
    kernel: Any
    reward: Reward
    control: Acting


class Setup(NamedTuple):
    """What plans."""

    kernel: Any
    reward: Reward
    method: Any


def plain(method: Callable[..., Any], bed: Bed, **how: Any) -> Setup:
    """A method of treesearch on the bare chain."""
    return Setup(bed.kernel, bed.reward, method(**how))


def value_guided(bed: Bed, **how: Any) -> Setup:
    """Diffuser's rule; the best of as many guided samples as the budget allows."""
    return Setup(Diffuser(bed.kernel, bed.reward, **how), bed.reward, ts.BestOfN())


def over_scales(bed: Bed, scale: float) -> Setup:
    """UCT over guidance scales: multiples of Diffuser's rule, drawn anew where the tree branches."""
    levels = spaced_levels(bed.kernel.num_steps, 5, top=True)
    kernel = GuidanceScales(
        Diffuser(bed.kernel, bed.reward, scale=scale), SCALES, tuple(t for t in levels if t < bed.kernel.num_steps)
    )
    return Setup(kernel, bed.reward, ts.DiffusionTreeSearch(**NARROW, branch_at=levels, wave=1))


def by_critic(bed: Bed, **how: Any) -> Setup:
    """Best-of-N by Q."""
    return Setup(bed.kernel, critic_reward(bed.maze, bed.kernel.channels, bed.control.stride, **how), ts.BestOfN())


GUIDES: tuple[How, ...] = ({"scale": 0.01}, {"scale": 0.1}, {"scale": 1.0}, {"scale": 10.0})
METHODS: dict[str, Entry] = {
    "base": Entry(partial(plain, partial(ts.BestOfN, n=1)), budgets=(1,)),
    "best_of_n": Entry(partial(plain, ts.BestOfN)),
    "fk": Entry(
        partial(plain, ts.FeynmanKac), ({"lam": 3.0}, {"lam": 10.0}, {"lam": 30.0}, {"lam": 10.0, "potential": "max"})
    ),
    "dts_star": Entry(
        partial(plain, partial(ts.DiffusionTreeSearch, wave=1)),
        (NARROW, NARROW | {"c_uct": 0.3}, NARROW | {"backup": "max"}, NARROW | {"branch_at": [8, 6, 4, 2]}),
    ),
    "tree_search": Entry(partial(plain, partial(ts.TreeSearch, wave=1))),
    "diffuser": Entry(value_guided, GUIDES, budgets=(4, 16)),
    "guidance_scales": Entry(over_scales, GUIDES, budgets=(4, 16)),
    "critic": Entry(by_critic, ({"row": None}, {"row": 0}), budgets=(4, 16)),
}


@cache
def bed_of(task: Task, num_steps: int, weights: Path | None = None, device: str = "cpu") -> Bed:
    """A maze with its model, shipped or from a file, read once."""
    make = maze_kernel if weights is None else trajectory_kernel
    kernel = make(weights or task.maze, num_steps, horizon=task.horizon, device=device)  # type: ignore[operator]
    if kernel.card is None:
        raise ValueError("the model has no card: expected one that experiments/planning/train_trajectory.py wrote")
    stride = kernel.card.stride
    return Bed(task.maze, kernel, reward_of(task, kernel.channels, stride), Acting(stride=stride))


def reward_of(task: Task, channels: Channels, stride: int) -> Reward:
    """The reward of a task."""
    if task.reward == "plan":
        return maze_plan(task.maze, channels, stride=stride, dynamics=DYNAMICS)
    if task.reward == "execution":
        return maze_execution(task.maze, channels, stride=stride, by="actions", radius=REACH)
    raise ValueError(f"unknown reward {task.reward!r}: choose execution or plan")
