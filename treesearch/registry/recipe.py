"""Recipes: how to make a kernel or a reward, as data that can travel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from treesearch.registry.expressions import absolute
from treesearch.registry.registry import kernel, reward


@dataclass(frozen=True)
class Recipe:
    """How to make a kernel or a reward where it is needed: each worker builds its own, with weights from its own disk.

    Args:
        what: an expression, as on the command line, or a factory that can be imported.
        settings: keyword arguments of the factory; one named `device` is filled in by the worker.
    """

    what: str | Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.what, str) and self.settings:
            raise TypeError(
                f"Recipe({self.what!r}, ...): write the settings of an expression into it, as name(eta=1.0)"
            )
        if not isinstance(self.what, str) and not callable(self.what):
            raise TypeError(f"Recipe({self.what!r}): expected an expression or a factory")
        if isinstance(self.what, str):
            object.__setattr__(self, "what", absolute(self.what))

    def kernel(self, device: str | None = None) -> Any:
        """The kernel, on a device if one is named."""
        return place(kernel(self.what) if isinstance(self.what, str) else self._call(device), device)

    def reward(self, device: str | None = None) -> Any:
        """The reward."""
        return reward(self.what) if isinstance(self.what, str) else self._call(device)

    def _call(self, device: str | None) -> Any:
        assert callable(self.what)
        settings = dict(self.settings)
        if device is not None and "device" in inspect.signature(self.what).parameters:
            settings.setdefault("device", device)
        return self.what(**settings)


def place(kernel: Any, device: str | None) -> Any:
    """A kernel on a device; one without `to` stays where it is."""
    return kernel.to(device) if device is not None and hasattr(kernel, "to") else kernel
