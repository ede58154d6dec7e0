"""What a planner is given: numbers of environments, and a kernel that plans actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import optional

NEEDED = ("renoise", "encode_samples")


def numbers(values: Any, what: str) -> Tensor:
    """Numbers as float64.

    Raises:
        ValueError: no numbers, or some that are not finite.
    """
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} {values!r}: expected numbers ({error})") from error
    if not found.isfinite().all():
        where = [tuple(i) for i in (~found.isfinite()).nonzero().tolist()]
        raise ValueError(f"{what} not finite at {where[:3]}: expected finite numbers; reset that environment")
    return found


def check_kernel(kernel: Any, warm_start: bool) -> None:
    channels = optional(kernel, "channels")
    if not getattr(channels, "action", 0):
        raise TypeError(
            f"{type(kernel).__name__} has no channels with actions: "
            "expected a kernel of trajectories, see treesearch.backends.models.trajectory.TrajectoryKernel"
        )
    absent = [name for name in NEEDED if optional(kernel, name) is None]
    if warm_start and absent:
        raise ValueError(f"{type(kernel).__name__} has no {' and no '.join(absent)}: use warm_start=False")


def observed_by(kernel: Any) -> int:
    """Numbers in the observation of a prompt: of the history that a policy is told, or of a row of a plan."""
    told = optional(kernel, "observed")
    return optional(kernel, "channels").observation if told is None else int(told)


def histories(observations: Any, observed: int) -> Tensor:
    """Observations (n, observed), given so or as histories (n, h, S) with the last one last.

    Raises:
        ValueError: no finite numbers, or another number of them.
    """
    starts = numbers(observations, "observations")
    flat = starts.flatten(1) if starts.ndim > 2 else starts
    if flat.ndim != 2 or flat.shape[1] != observed:
        raise ValueError(
            f"observations have shape {tuple(starts.shape)}, expected (n, {observed}), or (n, h, {observed} / h) for a "
            "policy that is told h of them: give as many numbers as the kernel observes"
        )
    return flat
