"""Critics: the action value Q(s, a) of a trajectory, the pessimistic minimum over an ensemble.

    r(τ) = min_j Q_j(s_h, a_h)    at one row h, or its mean over all rows

At the first row it ranks plans by the action they would execute; at the last it completes a return that stops there,
discounted_return(channels, γ) + γ^H Critic(q, channels, row=-1). Chunks of a diffusion policy hold actions alone: s_0
is what their prompt says was observed, and the row is the first.

Source of the minimum: Addressing Function Approximation Error in Actor-Critic Methods (Fujimoto et al., 2018), eq. 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.channels import TRAJECTORIES, Channels, as_channels, entry
from treesearch.rewards.facts import facts
from treesearch.rewards.trajectories.policy import per_row, placed

Q = Callable[[Tensor, Tensor], Tensor]
"""(observations (n, S), actions (n, A)) -> (n,) or (n, 1)."""


@facts(
    range="that of Q",
    differentiable=True,
    prompts=None,
    limits=f"{TRAJECTORIES}, with actions",
    source="Fujimoto et al. 2018, clipped double Q-learning",
)
def Critic(
    q_functions: Q | Sequence[Q], channels: Channels | Sequence[int], row: int | None = 0, last: int | None = None
) -> Reward:
    """r = the smallest Q(s_h, a_h) of an ensemble.

    Args:
        q_functions: one network or several, each called as q(observations, actions) where its parameters live.
        channels: of the trajectories.
        row: h, counted from the end if negative; None for the mean over all rows.
        last: of chunks of actions, how many numbers of their prompt's `start` the critics are told, the last ones:
            those of one observation, where the prompt has a history; None for all.

    Raises:
        ValueError: no critic, trajectories without actions, or another row of chunks than the first; when called, a row
            that is not there, prompts that do not say what was observed, a critic on no or several devices, or one that
            returns another shape.
    """
    channels = as_channels(channels)
    if isinstance(q_functions, str):
        raise ValueError(f"the critic is the text {q_functions!r}: write file.py:name without quotes")
    ensemble = list(q_functions) if isinstance(q_functions, Sequence) else [q_functions]
    if not ensemble:
        raise ValueError("expected one critic or more, got none")
    if not channels.action:
        raise ValueError(f"{channels} has no actions for a critic to judge")

    if not channels.observation and row != 0:
        raise ValueError(f"row is {row!r}, but chunks of actions are judged where they begin: row=0")

    def fn(samples: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        x = _row(channels.checked(samples), row)
        s, a = channels.observations(x).flatten(0, 1), channels.actions(x).flatten(0, 1)
        if not channels.observation:
            s = observed(prompts, len(x), last).to(a)
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            values = torch.stack([_checked(per_row(placed(q, s, a), "the critic"), len(s)) for q in ensemble])
        return values.double().amin(0).reshape(x.shape[:2]).mean(1)

    return Reward(fn, f"critic({len(ensemble)} Q)")


def observed(prompts: Sequence[Any] | None, n: int, last: int | None) -> Tensor:
    """What prompts of n chunks say was observed, (n, S).

    Raises:
        ValueError: they do not say, or less than is asked for.
    """
    found = [entry(prompt, "start") for prompt in prompts or ()]
    if len(found) != n or any(start is None or len(start) < (last or 1) for start in found):
        raise ValueError(
            f'a critic judges actions where {last or "something"} was observed: prompts={{"start": [...]}}'
        )
    rows = torch.tensor(found, dtype=torch.float32, device="cpu")
    return rows if last is None else rows[:, -last:]


def _row(x: Tensor, row: int | None) -> Tensor:
    """Row `row` of trajectories (n, H, C) as (n, 1, C), or all of them."""
    if row is None:
        return x
    if not -x.shape[1] <= row < x.shape[1]:
        raise ValueError(f"row is {row}, but trajectories have {x.shape[1]} rows")
    return x[:, row % x.shape[1]][:, None]


def _checked(values: Tensor, n: int) -> Tensor:
    if len(values) != n:
        raise ValueError(f"the critic returned {len(values)} values for {n} rows")
    return values
