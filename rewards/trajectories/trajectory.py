"""Rewards of trajectories: return, goal, smoothness, bounds of actions, novelty.

    discounted_return  Σ_h γ^h r_h                                     of the reward channel
    goal_reaching      -max(0, min_h |p_h - goal| - radius)            or of the last row alone; 0 where it is reached
    smoothness         -mean_h |p_{h+1} - 2 p_h + p_{h-1}|²
    action_bounds      -mean_h Σ_i max(0, a_hi - high, low - a_hi)
    novelty            min_j (mean_h |s_h - s_h^(j)|²)^{1/2}           distance to the nearest reference

p_h is the position, a few entries of the observation s_h. All are finite for any finite trajectory, endpoint
predictions included, and have a gradient almost everywhere. Walls are in `rewards/trajectories/maze.py`, dynamics in
`rewards/trajectories/dynamics.py`, policies in `rewards/trajectories/policy.py`, critics in
`rewards/trajectories/critic.py`.

Source of the novelty score: Abandoning Objectives: Evolution through the Search for Novelty Alone (Lehman and Stanley,
2011), with one neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.channels import TRAJECTORIES, Channels, as_channels, entry
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_number

RADIUS = 0.45
"""Distance at which PointMaze calls a goal reached."""


@facts(range="that of the rewards", differentiable=True, limits=f"{TRAJECTORIES}, with rewards")
def discounted_return(channels: Channels | Sequence[int], discount: float = 0.99) -> Reward:
    """r = Σ_h discount^h r_h.

    Raises:
        ValueError: trajectories without rewards, or a discount outside (0, 1].
    """
    channels = as_channels(channels)
    if not channels.reward:
        raise ValueError(f"{channels} has no rewards to sum: add the channel, or score with Critic")
    if not (is_number(discount, 0, 1) and discount > 0):
        raise ValueError(f"discount is {discount}, expected a number in (0, 1]")

    def fn(samples: Tensor, _: object) -> Tensor:
        rewards = channels.rewards(channels.checked(samples)).double()
        return (rewards * discount ** torch.arange(rewards.shape[1], device=rewards.device)).sum(1)

    return Reward(fn, f"discounted_return({discount:g})")


@facts(range="-inf to 0; 0 where the goal is reached", differentiable=True, prompts=True, limits=TRAJECTORIES)
def goal_reaching(
    channels: Channels | Sequence[int],
    goal: Sequence[float] | None = None,
    radius: float = RADIUS,
    position: Sequence[int] = (0, 1),
    when: Literal["any", "end"] = "any",
) -> Reward:
    """r = minus the distance that is missing to come within `radius` of the goal.

    Args:
        channels: of the trajectories.
        goal: a position; None reads the goal of each sample's prompt.
        radius: at which the goal counts as reached, in units of the position.
        position: which entries of an observation are the position.
        when: "any" if one row is enough, "end" if the last one must be there.

    Raises:
        ValueError: a radius below 0, entries that are not in an observation, a goal of another length; when called,
            prompts without a goal where none was given.
    """
    channels = as_channels(channels)
    columns = entries(channels, position)
    if not is_number(radius, 0):
        raise ValueError(f"radius is {radius}, expected 0 or more")
    if when not in ("any", "end"):
        raise ValueError(f"when is {when!r}, expected 'any' or 'end'")
    fixed = entry({"goal": goal}, "goal", len(columns))

    def fn(samples: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        p = channels.checked(samples)[..., columns].double()
        target = p.new_tensor(goals(len(p), prompts, fixed, len(columns)))
        away = distance((p if when == "any" else p[:, -1:]) - target[:, None]).amin(1)
        return -(away - radius).clamp(min=0)

    return Reward(fn, "goal_reaching" if fixed is None else f"goal_reaching({fixed})")


@facts(range="-inf to 0", differentiable=True, limits=f"{TRAJECTORIES}, three rows or more")
def smoothness(channels: Channels | Sequence[int], position: Sequence[int] = (0, 1)) -> Reward:
    """r = minus the mean squared second difference of the position.

    Raises:
        ValueError: entries that are not in an observation; when called, fewer than three rows.
    """
    channels = as_channels(channels)
    columns = entries(channels, position)

    def fn(samples: Tensor, _: object) -> Tensor:
        p = channels.checked(samples, 3)[..., columns].double()
        return -p.diff(n=2, dim=1).square().sum(2).mean(1)

    return Reward(fn, "smoothness")


@facts(
    range="-inf to 0; 0 where all actions are in bounds",
    differentiable=True,
    limits=f"{TRAJECTORIES}, with actions",
)
def action_bounds(channels: Channels | Sequence[int], low: float = -1.0, high: float = 1.0) -> Reward:
    """r = minus what the actions exceed [low, high] by, summed over an action, averaged over rows.

    Raises:
        ValueError: trajectories without actions, or low not below high.
    """
    channels = as_channels(channels)
    if not channels.action:
        raise ValueError(f"{channels} has no actions to bound")
    if not (is_number(low) and is_number(high) and low < high):
        raise ValueError(f"bounds are {low} and {high}, expected low < high")

    def fn(samples: Tensor, _: object) -> Tensor:
        a = channels.actions(channels.checked(samples)).double()
        return -((a - high).clamp(min=0) + (low - a).clamp(min=0)).sum(2).mean(1)

    return Reward(fn, f"action_bounds({low:g}, {high:g})")


@facts(
    range="0 to inf",
    differentiable=True,
    limits=f"{TRAJECTORIES}, as long as the reference",
    source="Lehman and Stanley 2011, novelty search",
)
def novelty(
    reference: Tensor,
    channels: Channels | Sequence[int],
    position: Sequence[int] | None = None,
) -> Reward:
    """r = root mean squared distance per row to the nearest of the reference trajectories.

    Args:
        reference: trajectories (m, H, C) of the same length as those to be scored.
        channels: of both.
        position: which entries of an observation are compared; None for all.

    Raises:
        ValueError: no reference, or one that is not such trajectories; when called, another length.
    """
    channels = as_channels(channels)
    columns = entries(channels, range(channels.observation) if position is None else position)
    known = channels.checked(reference)[..., columns].detach()
    if not len(known):
        raise ValueError("expected one reference trajectory or more, got none")

    def fn(samples: Tensor, _: object) -> Tensor:
        s = channels.checked(samples)[..., columns]
        if s.shape[1] != known.shape[1]:
            raise ValueError(
                f"trajectories have {s.shape[1]} rows, the reference has {known.shape[1]}: cut to one length"
            )
        return torch.cdist(s.double().flatten(1), known.to(s.device).double().flatten(1)).amin(1) / s.shape[1] ** 0.5

    return Reward(fn, f"novelty({len(known)} references)")


def entries(channels: Channels, position: Sequence[int]) -> list[int]:
    """Which entries of an observation are meant, as a list.

    Raises:
        ValueError: none, or one that is not in an observation.
    """
    columns = list(position)
    if not columns or any(c not in range(channels.observation) for c in columns):
        raise ValueError(f"position is {columns}, expected entries of an observation, 0 to {channels.observation - 1}")
    return columns


def goals(n: int, prompts: Sequence[Any] | None, fixed: Sequence[float] | None, size: int) -> list[list[float]]:
    """The goal of each of n samples: the fixed one, or that of its prompt.

    Raises:
        ValueError: neither is there.
    """
    if fixed is not None:
        return [list(fixed)] * n
    found = [entry(prompt, "goal", size) for prompt in prompts or ()]
    if len(found) != n or any(goal is None for goal in found):
        raise ValueError("no goal: give one to the reward, or prompts made with known(goal=...)")
    return [goal for goal in found if goal is not None]


def distance(gap: Tensor) -> Tensor:
    """|gap| over the last axis, with gradient 0 at 0."""
    square = gap.square().sum(-1)
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
