"""Guiders of diffusers in a loop whose rows are at steps of their own.

A guider is told which of T steps it is at, and reads from that whether a window is open (`start`, `stop`, layers
PAG and SLG skip, first steps that CFG-Zero* leaves out). A level t of the chain is step T - t of the grid, so that a
window of steps is one of levels. Rows for which the same windows are open share a call.

A guider that remembers earlier steps has no place in a search, whose steps come from different paths: momentum is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines.skipping import Weaker, layers_of
from treesearch.backends.pipelines.windows import Steps

Group = tuple[int, Tensor]  # a step, and which rows (n,) are where it stands for


def check_guider(guider: Any) -> None:
    """Refuse what is no guider, or has a memory.

    Raises:
        TypeError: no guider of diffusers.
        ValueError: one with momentum.
    """
    from diffusers.guiders.guider_utils import BaseGuidance

    name = type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"guider is {name}, expected one of diffusers.guiders, such as ClassifierFreeGuidance(...)")
    layers_of(guider)
    for setting, value in guider.config.items():
        if "momentum" in setting and value:
            raise ValueError(f"{name} has {setting}={value}, a memory of the steps before, which in a search are those "
                             f"of other paths: set {setting}=None")  # fmt: skip


@contextmanager
def explained(guider: Any, network: Any) -> Iterator[None]:
    """Say of whatever is raised that it is about a guider on a network; None is no guider.

    Raises:
        ValueError: something was raised.
    """
    try:
        yield
    except Exception as error:  # of guiders, hooks and registries of diffusers
        if guider is None:
            raise
        what = f"{type(guider).__name__} does not go with {type(network).__name__} in diffusers"
        raise ValueError(f"{what}: {error}") from error


class Stepped:
    """A guider that is told the steps of rows.

    Args:
        guider: the user's; it is copied, and not changed.
    """

    def __init__(self, guider: Any) -> None:
        self.guider = copy.copy(guider)
        self._weaker = Weaker(self.guider)
        self._set_state = self.guider.set_state
        self.guider.set_state = self._told
        self._at: int | None = None
        self._steps: Steps | None = None
        self._open = list[tuple[Any, ...]]()

    def on(self, schedule: Schedule) -> Stepped:
        """The same, on a grid."""
        steps = schedule.num_steps
        self._steps = Steps(schedule)
        self._open = [self._windows(step, steps) for step in range(steps)]
        self.reset()
        return self

    def reset(self) -> None:
        """At no step: every window is open, as prompts are encoded."""
        self._set_state(None, None, None)  # pyright: ignore[reportArgumentType]

    @property
    def first_steps(self) -> list[int]:
        """The first step at which each set of windows is open."""
        return [self._open.index(each) for each in dict.fromkeys(self._open)]

    @property
    def num_conditions(self) -> int:
        """Most rows of the network that a row takes."""
        return max((count for count, *_ in self._open), default=self.guider.num_conditions)

    def groups(self, timestep: Tensor) -> list[Group]:
        """Rows (n,) by the windows that are open for them; all in one on the meta device, which has no values."""
        if timestep.is_meta:
            most = max(range(len(self._open)), key=lambda step: self._open[step][0])
            return [(most, torch.ones_like(timestep, dtype=torch.bool))]
        assert self._steps is not None
        steps = self._steps.of(timestep)
        first: dict[tuple[Any, ...], int] = {}
        found = [first.setdefault(self._open[step], step) for step in steps]
        of = torch.tensor(found, device=timestep.device)
        return [(step, of == step) for step in sorted(set(found))]

    @contextmanager
    def at(self, step: int, network: Any) -> Iterator[None]:
        """While the guider is at a step of the grid; whatever happens, its hooks are off the network afterwards."""
        self._at = step
        try:
            yield
        finally:
            self._at = None
            self.release(network)
            self.reset()

    def _told(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        if self._at is not None:
            step, num_inference_steps = self._at, len(self._open)
        self._set_state(step, num_inference_steps, timestep)

    def _windows(self, step: int, steps: int) -> tuple[Any, ...]:
        """Rows of the network a row at a step, and which windows are open."""
        self._set_state(step, steps, None)
        names = (name for name in dir(type(self.guider)) if name.startswith("_is_") and name.endswith("_enabled"))
        open_ = [getattr(self.guider, name)() for name in names]
        return self.guider.num_conditions, step < getattr(self.guider, "zero_init_steps", 0), *open_

    def release(self, network: Any) -> None:
        """Take the guider's hooks off a network."""
        from diffusers.hooks import HookRegistry

        self._weaker.put_back()
        registry = HookRegistry.check_if_exists_or_initialize(network)
        for attribute, names in vars(self.guider).items():
            if attribute.endswith("_hook_names"):
                for name in names:
                    registry.remove_hook(name, recurse=True)
