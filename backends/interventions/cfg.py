"""The scale of classifier-free guidance, another for each row: an action of a search.

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

from treesearch.backends.base import Wrapper, expand
from treesearch.backends.base.capture import changed
from treesearch.backends.interventions.base import Intervened, Intervention, Rows
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class CFG(Intervention):
    """Scales of classifier-free guidance.

    Args:
        scales: w', each a setting.
        of: w of the pipeline.
    """

    scales: tuple[float, ...]
    of: float

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"w = {w:g}" for w in self.scales)

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
        return torch.tensor([1.0, *(w / self.of for w in self.scales)], device="cpu")


def cfg(kernel: Any, scales: tuple[float, ...] | float, levels: tuple[int, int] | None = None) -> Intervened:
    """A pipeline under other guidance scales.

    Args:
        kernel: a `DiffusersKernel` under classifier-free guidance.
        scales: w', one or several.
        levels: (low, high), t at which it acts, both included; None are all.

    Raises:
        TypeError: a kernel without such guidance.
        ValueError: a scale that is no number, or guidance that is rescaled by the spread of ε(c).
    """
    pipeline = bottom(kernel)
    family = getattr(pipeline, "family", None)
    if family is None or not family.guided:
        raise TypeError(f"{type(kernel).__name__} has no classifier-free guidance: give it a guidance_scale above 1")
    if family.settings.guidance_rescale:
        raise ValueError("guidance_rescale reads the spread of ε(c), which this changes: leave one of them out")
    each = scales if isinstance(scales, tuple) else (scales,)
    if not each or not all(is_number(w, 0, 1e6) for w in each):
        raise ValueError(f"scales are {scales!r}, expected finite numbers >= 0")
    return Intervened(kernel, CFG(each, family.guidance_scale), levels=levels)


def bottom(kernel: Any) -> Any:
    """The kernel under all wrappers."""
    return bottom(kernel.kernel) if isinstance(kernel, Wrapper) else kernel
