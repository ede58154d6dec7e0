"""What is held against what before a pipeline is searched by code that is not written for it.

‖one - other‖ ≤ √eps ‖scale‖ + 2 eps ‖other‖      eps of the network's dtype
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Schedule

FEW, MORE = "", "a red cube beside two blue ones"
LONG = "; ".join(7 * [MORE])
"""Prompts of unequal length, to try rows on."""


def is_memoryless(scheduler: Any, schedule: Schedule) -> bool:
    """Whether a step of a scheduler, without noise, is the chain's at η = 0 and in the same coordinates.

    DDIM's goes N // T training steps down: the next of the grid for leading spacing, for trailing spacing where T
    divides N, and never for linspace.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in ("DDIMScheduler", "CogVideoXDDIMScheduler"):
        lands = schedule.timestep - config["num_train_timesteps"] // schedule.num_steps
        return torch.equal(lands[1:], schedule.timestep[:-1]) and bool(lands[0] < 0)
    return name == "FlowMatchEulerDiscreteScheduler" and not config.get("stochastic_sampling")


def refuse_difference(
    name: str, dtype: torch.dtype, what: str, one: Tensor, other: Tensor, scale: Tensor | None = None
) -> None:
    """Refuse a pipeline of which two ways to the same thing differ.

    Args:
        name: of the pipeline's class.
        dtype: of its network.
        what: the two, for the message.
        one, other: (n, *state).
        scale: by whose norm they may differ, `other` by default.

    Raises:
        ValueError: they differ; the message has the difference.
    """
    eps = torch.finfo(dtype).eps
    bound = eps**0.5 * float((other if scale is None else scale).norm()) + 2 * eps * float(other.norm())
    found = float((one - other).norm())
    if not math.isfinite(found):
        raise ValueError(f"{name} cannot be searched: its network says NaN or infinity, are its weights whole?")
    if not found <= bound:
        raise ValueError(f"{name} cannot be searched: {what} differ by {found:.3g}, expected {bound:.3g} at most; it "
                         "keeps something that is not of the row")  # fmt: skip
