"""The weight of classifier-free guidance, another for each row: an action of a search.

    ε(∅) + w (ε(c) - ε(∅))  with  ε(c) <- ε(∅) + w'/w (ε(c) - ε(∅))  is the same under w'

It is done on the output of the network, where both blocks of rows are, so that no pipeline needs to know of it.

Source: Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import expand
from treesearch.backends.base.capture import changed
from treesearch.backends.interventions.base import Intervened, Intervention, Rows
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class Weight(Intervention):
    """Guidance weights.

    Args:
        weights: w', each a setting.
        of: w of the pipeline.
    """

    weights: tuple[float, ...]
    of: float

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"w = {w:g}" for w in self.weights)

    def on(self, network: nn.Module | tuple[nn.Module, ...], rows: Rows) -> AbstractContextManager[None]:
        names = [""] if isinstance(network, nn.Module) else [str(i) for i in range(len(network))]
        return changed(network, dict.fromkeys(names, partial(self._scaled, rows)))

    def _scaled(self, rows: Rows, output: Tensor, *call: Any) -> Tensor:
        mine = rows.of_network(output)
        absent, given = output.chunk(2)
        ratio = self._ratios.to(output)[mine.setting.chunk(2)[1]]
        scaled = absent + expand(ratio, given) * (given - absent)
        return torch.cat([absent, torch.where(expand(ratio == 1, given), given, scaled)])

    @cached_property
    def _ratios(self) -> Tensor:
        return torch.tensor([1.0, *(w / self.of for w in self.weights)], device="cpu")


def weight(kernel: Any, weights: tuple[float, ...] | float) -> Intervened:
    """A pipeline under other guidance weights.

    Args:
        kernel: a `DiffusersKernel` under classifier-free guidance.
        weights: w', one or several.

    Raises:
        TypeError: a kernel without such guidance.
        ValueError: a weight that is no number, or guidance that is rescaled by the spread of ε(c).
    """
    family = getattr(bottom(kernel), "family", None)
    if family is None or not family.guided:
        raise TypeError(f"{type(kernel).__name__} has no classifier-free guidance: give it a guidance_scale above 1")
    if family.settings.guidance_rescale:
        raise ValueError("guidance_rescale reads the spread of ε(c), which this changes: leave one of them out")
    each = weights if isinstance(weights, tuple) else (weights,)
    if not each or not all(is_number(w, 0, 1e6) for w in each):
        raise ValueError(f"weights are {weights!r}, expected finite numbers >= 0")
    return Intervened(kernel, Weight(each, family.guidance_scale))


def bottom(kernel: Any) -> Any:
    """The kernel under all wrappers."""
    while (inner := getattr(kernel, "kernel", None)) is not None:
        kernel = inner
    return kernel
