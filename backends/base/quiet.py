"""The caller's networks as a kernel calls them: in evaluation mode, and without gradients to their weights.

Between the calls they are as the caller left them, so that a search can stand in the middle of a training loop.
"""

from __future__ import annotations

from types import TracebackType
from typing import final

from torch import nn


@final
class Quiet:
    """A context in which networks are called.

    Args:
        networks: of a kernel; they stay what they are.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks
        self._changed: list[tuple[list[nn.Module], list[nn.Parameter]]] = []
        self.look()

    def look(self) -> None:
        """See which parts there are: adapters may have come since. A walk through a large network takes a while."""
        self._parts = [part for network in self.networks for part in network.modules()]
        self._weights = [weight for network in self.networks for weight in network.parameters()]

    def __enter__(self) -> None:
        training = [part for part in self._parts if part.training]
        weights = [weight for weight in self._weights if weight.requires_grad]
        self._changed.append((training, weights))
        _set(training, weights, on=False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _set(*self._changed.pop(), on=True)


def _set(parts: list[nn.Module], weights: list[nn.Parameter], *, on: bool) -> None:
    for part in parts:
        part.training = on
    for weight in weights:
        weight.requires_grad_(on)
