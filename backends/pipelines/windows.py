"""Windows of steps, as pipelines set them, for rows at levels of their own.

A level t is step T - t of its grid: a window of steps is one of levels. Each window is read as its pipeline reads it:

    ControlNet    closed at step i where  i / T < start  or  (i + 1) / T > end
    skip-layer    open at step i where  T·start < i < T·stop
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Schedule

if TYPE_CHECKING:
    from treesearch.backends.pipelines.settings import Settings


def each(name: str, value: float | list[float], count: int) -> list[float]:
    """A share of the steps for each of some ControlNets.

    Raises:
        ValueError: another number of them.
    """
    found = value if isinstance(value, list) else [value] * count
    if len(found) != count:
        raise ValueError(f"{len(found)} values of {name} for {count} ControlNets: give one each, or a number")
    return found


class Controls:
    """Windows of ControlNets.

    Args:
        starts, ends: shares of the steps, one a ControlNet.

    Raises:
        ValueError: a window that is empty.
    """

    def __init__(self, starts: float | list[float], ends: float | list[float], count: int) -> None:
        self.starts, self.ends = (
            each("control_guidance_start", starts, count),
            each("control_guidance_end", ends, count),
        )
        for start, end in zip(self.starts, self.ends, strict=True):
            if start >= end:
                raise ValueError(f"control_guidance_start={start} is not below control_guidance_end={end}: leave out a "
                                 "ControlNet that takes part in no step")  # fmt: skip
        self._steps: Steps | None = None

    @classmethod
    def of_pipe(cls, pipe: Any, settings: Settings) -> Controls | None:
        """Those of a pipeline's ControlNets; None where it has none, or they take part in every step."""
        if (net := getattr(pipe, "controlnet", None)) is None:
            return None
        nets = getattr(net, "nets", [net])
        found = cls(settings.control_guidance_start, settings.control_guidance_end, len(nets))
        return None if found.always else found

    def on(self, schedule: Schedule) -> Controls:
        """The same, of the steps of a grid."""
        other = copy.copy(self)
        other._steps = Steps(schedule)
        return other

    @property
    def always(self) -> bool:
        """Whether all of them take part in every step."""
        return not any(self.starts) and all(end == 1 for end in self.ends)

    def of(self, timestep: Tensor) -> list[tuple[float, ...]]:
        """Of each row, 1 for the ControlNets that take part in its step and 0 for the others."""
        if self._steps is None or self.always or timestep.is_meta:
            return [(1.0,) * len(self.starts)] * len(timestep)
        return [controls(step, self._steps.count, self.starts, self.ends) for step in self._steps.of(timestep)]

    def scaled(self, timestep: Tensor, scale: float | list[float]) -> float | list[float]:
        """The scale of each ControlNet at one timestep (1,), as a pipeline takes it: 0 outside its window."""
        open_ = self.of(timestep)[0]
        if len(open_) == 1 and not isinstance(scale, list):
            return scale * open_[0]
        return [value * taken for value, taken in zip(each("control_scale", scale, len(open_)), open_, strict=True)]


class Steps:
    """The steps of a grid, by the timesteps of its levels."""

    def __init__(self, schedule: Schedule) -> None:
        self._timestep = schedule.timestep.double().cpu()

    @property
    def count(self) -> int:
        """T."""
        return len(self._timestep)

    def of(self, timestep: Tensor) -> list[int]:
        """Steps of rows at timesteps (n,).

        Raises:
            ValueError: one above those of the grid.
        """
        levels = torch.searchsorted(self._timestep, timestep.double().cpu() - 1e-3)
        if (levels == self.count).any():
            above, last = float(timestep.max()), float(self._timestep[-1])
            raise ValueError(
                f"timestep {above:g} is above the grid's, {last:g} at most: its windows are of another grid"
            )
        return (self.count - 1 - levels).tolist()


def controls(step: int, steps: int, starts: Sequence[float], ends: Sequence[float]) -> tuple[float, ...]:
    """1 for each ControlNet that takes part in a step, 0 for the others."""
    return tuple(
        1.0 - float(step / steps < start or (step + 1) / steps > end) for start, end in zip(starts, ends, strict=True)
    )


def skips(step: int, steps: int, start: float, stop: float) -> bool:
    """Whether a step is guided away from a network without some layers."""
    return steps * start < step < steps * stop
