"""Log-likelihood of the actions of a trajectory under a torch policy.

    r(τ) = Σ_h log π(a_h | s_h)

A policy is anything with log_prob(observation=, action=), or a function from observations to actions, which stands for
the unit Gaussian about them: log π(a | s) = -|a - π(s)|²/2 - (A/2) log 2π.

Source: Policy-Guided Diffusion (Jackson et al., 2024), sec. 3: behaviour trajectories weighted by their likelihood
under a target policy, deterministic policies as unit Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.channels import TRAJECTORIES, Channels, as_channels
from treesearch.rewards.facts import facts


@facts(
    range="any; about -A H to A H for A actions",
    differentiable=True,
    limits=f"{TRAJECTORIES}, with actions",
    source="Jackson et al. 2024, Policy-Guided Diffusion",
)
def PolicyLikelihood(
    policy: Any,
    channels: Channels | Sequence[int],
    bounds: tuple[float, float] | None = None,
) -> Reward:
    """r = Σ_h log π(a_h | s_h), over all rows of a trajectory.

    Args:
        policy: a network or an object with log_prob(observation=, action=) -> (n,), or a function from observations
            (n, S) to actions (n, A). It is called where its parameters live, on n·H rows at once.
        channels: of the trajectories.
        bounds: actions are clipped to them first: a policy squashed into (-1, 1) has no density outside, and
            denoised actions overshoot a little.

    Raises:
        ValueError: trajectories without actions, or bounds out of order; when called, a policy on no or several
            devices, or one that returns another shape.
    """
    channels = as_channels(channels)
    if not channels.action:
        raise ValueError(f"{channels} has no actions for a policy to judge")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds is {bounds}, expected (low, high) with low < high")

    def fn(samples: Tensor, _: object) -> Tensor:
        x = channels.checked(samples)
        s, a = channels.observations(x), channels.actions(x)
        a = a if bounds is None else a.clamp(*bounds)
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            return log_policy(policy, s.flatten(0, 1), a.flatten(0, 1)).reshape(a.shape[:2]).double().sum(1)

    return Reward(fn, f"policy_likelihood({type(policy).__name__})")


def log_policy(policy: Any, observations: Tensor, actions: Tensor) -> Tensor:
    """log π(a | s) of n rows (n, S) and (n, A), shape (n,).

    Raises:
        ValueError: the policy returns another shape, or lives on no or several devices.
    """
    if not hasattr(policy, "log_prob"):
        mean = placed(policy, observations)
        if mean.shape != actions.shape:
            raise ValueError(f"the policy returned shape {tuple(mean.shape)}, expected actions {tuple(actions.shape)}")
        gap = (actions - mean).double()
        return -0.5 * gap.square().sum(1) - 0.5 * gap.shape[1] * math.log(2 * math.pi)
    return per_row(
        placed(policy, observations, actions, call=lambda s, a: policy.log_prob(observation=s, action=a)),
        "policy.log_prob",
    )


def placed(network: Any, *rows: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
    """network(*rows) where its parameters live, in their precision, the result where the rows are.

    Args:
        network: anything callable; without parameters it gets the rows as they are.
        rows: tensors; gradients pass through the moves.
        call: what to call instead of the network itself, a method of it.

    Raises:
        ValueError: a network without storage (the meta device), or one that is spread over devices.
    """
    weights = [*network.parameters(), *network.buffers()] if isinstance(network, torch.nn.Module) else []
    devices = {w.device for w in weights}
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        got = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{type(network).__name__} lives on {got}, expected one device with storage: move it with .to")
    function: Callable[..., Tensor] = network if call is None else call
    if not weights:
        return function(*rows)
    precision = next((w.dtype for w in weights if w.is_floating_point()), rows[0].dtype)
    return function(*(r.to(weights[0].device, precision) for r in rows)).to(rows[0].device)


def per_row(values: Tensor, name: str) -> Tensor:
    """Numbers (n,) from (n,) or (n, 1).

    Raises:
        ValueError: another shape.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise ValueError(f"{name} returned shape {tuple(values.shape)}, expected one number per row")
    return values
