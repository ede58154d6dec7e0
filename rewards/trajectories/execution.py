"""What becomes of a plan for PointMaze when it is carried out in a model of the maze, walls included.

    u = clip(gain (p̂ - p) + damping (v̂ - v), -1, 1)            by = "plan": towards planned position p̂ and velocity v̂
    u = clip(a, -1, 1)                                           by = "actions": what the plan says to do, open loop
    (p, v) ← one step of the point mass under u
    p ← p + (radius - c) n,  v ← v - min(0, v·n) n              where the clearance c is below the ball's radius
    r(τ) = -max(0, min_steps w(p) - reach)                      0 where the plan arrives

w is the length of the way to the goal round the walls, n points away from the nearest wall: a contact without friction
or bounce. Planned rows are `stride` steps apart, with straight lines between them; an action is held for a row.
`maze_plan` asks whether a plan looks sound; this asks whether it works, at a higher cost.

Source: tracking of planned states, and execution of planned actions, as in Planning with Diffusion for Flexible
Behavior Synthesis (Janner et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.channels import TRAJECTORIES, Channels, as_channels, entry
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_whole
from treesearch.rewards.trajectories.dynamics import PointMass
from treesearch.rewards.trajectories.maze import POINT, Map, Maze, check_reachable
from treesearch.rewards.trajectories.trajectory import RADIUS, distance, goals
from treesearch.rewards.trajectories.ways import way


@facts(
    range="-inf to 0; 0 where the plan arrives",
    differentiable=True,
    prompts=True,
    limits=f"{TRAJECTORIES} of PointMaze",
)
def maze_execution(
    maze_map: Map | Maze,
    channels: Channels | Sequence[int] = (4, 2),
    goal: Sequence[float] | None = None,
    stride: int = 1,
    by: Literal["plan", "actions"] = "plan",
    gain: float = 10.0,
    damping: float = 1.0,
    radius: float = RADIUS,
) -> Reward:
    """r = minus the way to the goal that is missing when the plan is carried out in a model of PointMaze.

    Args:
        maze_map: a map (rows, cols) where 1 is a wall, or a name in MAZES.
        channels: of the trajectories; observations are x, y, v_x, v_y.
        goal: a position; None reads the goal of each sample's prompt.
        stride: simulation steps from one row to the next.
        by: "plan" tracks its positions and velocities, "actions" makes its actions.
        gain: force per unit of distance to the planned position.
        damping: force per unit of velocity off the planned one.
        radius: at which the goal counts as reached.

    Raises:
        ValueError: a bad map or goal, or observations of other than four numbers; when called, a goal that lies in a
            wall or that walls keep apart from the prompt's start.
    """
    maze, channels = Maze.of(maze_map), as_channels(channels)
    fixed = entry({"goal": goal}, "goal", 2)
    if channels.observation != 4:
        raise ValueError(f"{channels}: expected the four numbers x, y, v_x, v_y in an observation")
    if by not in ("plan", "actions"):
        raise ValueError(f"by is {by!r}, expected 'plan' or 'actions'")
    if not is_whole(stride):
        raise ValueError(f"stride is {stride}, expected the number of steps from row to row, 1 or more")

    def fn(samples: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        for prompt in prompts or [None]:
            check_reachable(maze, prompt, fixed)
        plan = channels.observations(channels.checked(samples)).double()
        if not len(plan):
            return plan.new_zeros(0)
        ends = goals(len(plan), prompts, fixed, 2)
        if by == "plan":
            path = followed(maze, plan, stride, gain, damping)
        else:
            path = acted(maze, plan[:, 0], channels.actions(samples).double(), stride)
        arrived = distance(path - path.new_tensor(ends)[:, None]).amin(1) <= radius
        missing = torch.stack([way(maze, p, end).amin(0) for p, end in zip(path, ends, strict=True)])
        return -torch.where(arrived, 0.0, (missing - radius).clamp(min=0))

    return Reward(fn, "maze_execution")


def followed(maze: Maze, plan: Tensor, stride: int, gain: float = 10.0, damping: float = 1.0) -> Tensor:
    """Positions (n, (H - 1) stride + 1, 2) of points that follow plans (n, H, 4) from their first rows."""
    step, state = PointMass(), plan[:, 0]
    path = [state[:, :2]]
    for wanted in _between(plan, stride).unbind(1):
        gap = wanted - state
        state = pushed_out(maze, step(state, gain * gap[:, :2] + damping * gap[:, 2:]))
        path.append(state[:, :2])
    return torch.stack(path, 1)


def acted(maze: Maze, start: Tensor, actions: Tensor, stride: int) -> Tensor:
    """Positions (n, (H - 1) stride + 1, 2) of points at start (n, 4) that make actions (n, H, 2), but for the last."""
    step, state = PointMass(), start
    path = [state[:, :2]]
    for push in actions[:, :-1].repeat_interleave(stride, 1).unbind(1):
        state = pushed_out(maze, step(state, push))
        path.append(state[:, :2])
    return torch.stack(path, 1)


def pushed_out(maze: Maze, state: Tensor) -> Tensor:
    """States (n, 4) whose ball does not overlap a wall and does not move into one that it touches."""
    p, v = state[:, :2], state[:, 2:]
    offset = maze.from_walls(p)
    clearance = distance(offset)[:, None]
    normal = (offset / torch.where(clearance > 0, clearance, 1.0)).detach()
    touches = clearance < POINT
    inwards = (v * normal).sum(1, keepdim=True).clamp(max=0)
    out = torch.cat([p + (POINT - clearance) * normal, v - inwards * normal], 1)
    return torch.where(touches, out, state)


def _between(plan: Tensor, stride: int) -> Tensor:
    """Rows (n, (H - 1) stride, S) at every step after the first, on straight lines between the rows of a plan."""
    share = torch.arange(1, stride + 1, device=plan.device, dtype=plan.dtype)[:, None] / stride
    legs = plan[:, :-1, None] + share * plan.diff(dim=1)[:, :, None]
    return legs.flatten(1, 2)
