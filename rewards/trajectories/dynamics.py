"""Dynamics consistency: does each observation of a trajectory follow from the one before and the action taken there?

    r(τ) = -(1/(H-1)) Σ_h |(s_{h+1} - f(s_h, a_h)) / scale|²

f is a function or a network; `PointMass` is that of the PointMaze environments away from walls. With u = clip(a, -1, 1)
and w = clip(v, -5, 5) one simulation step of length dt is (MuJoCo's Euler integrator, damping implicit in the velocity)

    v' = (m w + dt g u) / (m + dt d)        x' = x + dt v'

Source: MuJoCo documentation, Computation, "Numerical integration"; constants from the point model of
gymnasium-robotics: a sphere of radius 0.1 and density 1000 (m = 4.189), damping d = 1, motor g = 100, dt = 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.channels import TRAJECTORIES, Channels, as_channels
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_positive
from treesearch.rewards.trajectories.policy import placed

Model = Callable[[Tensor, Tensor], Tensor]
"""(observations (..., S), actions (..., A)) -> the observations after them (..., S)."""


@dataclass(frozen=True, kw_only=True)
class PointMass:
    """The point of PointMaze: observations (x, y, v_x, v_y), actions a force in [-1, 1]².

    Args:
        stride: simulation steps from one row to the next; the action is held meanwhile.
        dt: seconds of a simulation step.
        mass: of the point.
        damping: of its joints.
        gear: force at action 1.
        max_speed: to which each velocity is clipped before a step.
    """

    stride: int = 1
    dt: float = 0.01
    mass: float = 1000 * 4 / 3 * math.pi * 0.1**3
    damping: float = 1.0
    gear: float = 100.0
    max_speed: float = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride is {self.stride!r}, expected the number of steps from row to row, 1 or more")
        for name in ("dt", "mass", "gear", "max_speed"):
            if not is_positive(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")

    def __call__(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The observations (..., 4) one row later.

        Raises:
            ValueError: observations of other than four numbers or actions of other than two.
        """
        if observations.shape[-1] != 4 or actions.shape[-1] != 2:
            got = f"{observations.shape[-1]} and {actions.shape[-1]}"
            raise ValueError(f"a point mass has 4 numbers in an observation and 2 in an action, got {got}")
        x, v = observations[..., :2], observations[..., 2:]
        push = self.dt * self.gear * actions.clamp(-1, 1)
        for _ in range(self.stride):
            v = (self.mass * v.clamp(-self.max_speed, self.max_speed) + push) / (self.mass + self.dt * self.damping)
            x = x + self.dt * v
        return torch.cat([x, v], -1)

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """Observations (n, H + 1, 4) from start (n, 4) under actions (n, H, 2), without walls."""
        rows = [start]
        for action in actions.unbind(1):
            rows.append(self(rows[-1], action))
        return torch.stack(rows, 1)


@facts(range="-inf to 0", differentiable=True, limits=f"{TRAJECTORIES}, with actions, two rows or more")
def dynamics_consistency(
    channels: Channels | Sequence[int],
    model: Model | int = 1,
    scale: float | Sequence[float] = 1.0,
) -> Reward:
    """r = minus the mean squared error of one-row predictions, each entry in units of `scale`.

    Args:
        channels: of the trajectories.
        model: called as model(observations (n, H-1, S), actions (n, H-1, A)); a number is PointMaze's point mass with
            that many steps from row to row.
        scale: size of an error that counts as one, for all entries of an observation or one each.

    Raises:
        ValueError: trajectories without actions, a scale that is not positive or does not fit.
    """
    channels = as_channels(channels)
    units = [float(v) for v in scale] if isinstance(scale, Sequence) else [float(scale)] * channels.observation
    if not channels.action:
        raise ValueError(f"{channels} has no actions to predict from")
    if len(units) != channels.observation or min(units) <= 0:
        raise ValueError(f"scale is {scale}, expected a positive number or {channels.observation} of them")
    predict = PointMass(stride=model) if isinstance(model, int) else model

    def fn(samples: Tensor, _: object) -> Tensor:
        x = channels.checked(samples, 2)
        s, a = channels.observations(x), channels.actions(x)
        predicted = placed(predict, s[:, :-1], a[:, :-1])
        if predicted.shape != s[:, 1:].shape:
            raise ValueError(f"the model returned shape {tuple(predicted.shape)}, expected {tuple(s[:, 1:].shape)}")
        error = (s[:, 1:] - predicted) / s.new_tensor(units)
        return -error.double().square().sum(2).mean(1)

    return Reward(fn, "dynamics_consistency")
