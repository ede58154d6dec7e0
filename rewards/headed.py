"""Rewards that say what is in them: r(x) = head(network(x)).

A network that is known can be taught noise (`backends.guidance.transfer`); a reward that is a function alone can only
be imitated.

    reward = Reward(Headed(lambda device: classifier.to(device), LogProbability((8,))), "mine")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn


@final
@dataclass(frozen=True)
class LogProbability:
    """logits (n, C) -> max over `classes` of log p(c), (n,) float64."""

    classes: tuple[int, ...]

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.double().log_softmax(1)[:, list(self.classes)].amax(1)


def as_they_are(samples: Any) -> Tensor:
    """Samples of a network that takes any."""
    return samples


@final
@dataclass(frozen=True)
class Headed:
    """A network of samples and what is made of its outputs, as the function of a `Reward`.

    Args:
        network: device -> the network there, in evaluation mode; samples (n, ...) -> outputs (n, C).
        head: outputs -> (n,).
        check: what is asked of samples before the network sees them; returns them.
    """

    network: Callable[[str], nn.Module]
    head: Callable[[Tensor], Tensor]
    check: Callable[[Any], Tensor] = as_they_are

    def __call__(self, samples: Any, prompts: Sequence[Any] | None = None) -> Tensor:
        samples = self.check(samples)
        return self.head(self.network(str(samples.device))(samples))
