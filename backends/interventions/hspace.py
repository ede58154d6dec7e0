"""Directions added in h-space: what a network's bottleneck puts out is moved, and what it denoises changes in kind.

    h_t <- h_t + α v_{i,t}         in the output of one part, "mid_block" by default, before all that follows it

ε̂ is of the moved h wherever the step uses it, in x̂_0 and in the direction to x_t alike (Asyrp moves the first alone);
under classifier-free guidance both blocks of rows move. A setting is a direction and a strength, so that `actions`
makes semantic branching of it: children of a node differ by ±α v_1 ... ±α v_k, with noise or without.

    hspace(mnist(num_steps=25), 'hspace.safetensors', alphas=(-3.0, 3.0))

Sources: Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models (Haas et al., 2024),
eq. 5. Diffusion Models Already Have a Semantic Latent Space (Kwon et al., 2023), h-space. As actions of a search: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import expand
from treesearch.backends.base.capture import changed
from treesearch.backends.interventions.base import Intervened, Intervention, Rows
from treesearch.backends.interventions.directions import Directions
from treesearch.rewards.numeric import is_number

MOST = 1e6


@final
@dataclass(frozen=True)
class HSpace(Intervention):
    """Directions at some strengths.

    Args:
        directions: v.
        alphas: α, for each direction the same.

    Raises:
        ValueError: strengths that are none, not finite, or twice.
    """

    directions: Directions
    alphas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.alphas or not all(is_number(a, -MOST, MOST) for a in self.alphas):
            raise ValueError(f"alphas are {self.alphas!r}, expected finite numbers")
        if len(set(self.alphas)) < len(self.alphas):
            raise ValueError(f"alphas are {self.alphas!r}, one of them twice")

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"{name} {a:g}" for name in self.directions.card.names for a in self.alphas)

    @property
    def identity(self) -> list[Any]:
        return [repr(self.directions.card), self.directions.vectors, self.alphas]

    def check(self, kernel: Any) -> None:
        """Refuse a kernel whose network this does not fit.

        Raises:
            TypeError: a kernel that names no network.
            ValueError: a network that the directions are not of, or another T; a compiled network.
        """
        self.directions.check(kernel)

    def on(self, network: nn.Module | tuple[nn.Module, ...], rows: Rows) -> AbstractContextManager[None]:
        return changed(network, {self.directions.card.part: partial(self._moved, rows)})

    def _moved(self, rows: Rows, h: Tensor, *call: Any) -> Tensor:
        mine = rows.of_network(h)
        number = (mine.setting - 1).clamp(min=0)
        which = torch.div(number, len(self.alphas), rounding_mode="floor")
        alpha = self._strengths.to(h)[number % len(self.alphas)]
        moved = h + expand(alpha, h) * self.directions.at(which, mine.t, h)
        return torch.where(expand((mine.setting > 0) & (alpha != 0), h), moved, h)

    @cached_property
    def _strengths(self) -> Tensor:
        return torch.tensor(self.alphas, device="cpu")


def hspace(
    kernel: Any,
    directions: str | Path | Directions,
    alphas: Sequence[float] | float = (-3.0, 3.0),
    only: Sequence[str] | str | None = None,
    levels: tuple[int, int] | None = None,
) -> Intervened:
    """A kernel whose network's bottleneck is moved along directions, each of them at some strengths a setting.

    Args:
        kernel: of the network that the directions were found on.
        directions: the name of a shipped file, the path of one, or what one holds.
        alphas: α, in the unit of the directions: standard deviations of h along them where they are of rollouts.
        only: names of directions to take; None are all.
        levels: (low, high), t at which they are added; None are all.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a kernel that names no network.
        ValueError: directions of another network, of another T, or names that the file does not have.
    """
    found = directions if isinstance(directions, Directions) else Directions.load(directions)
    if only is not None:
        found = found.named(*((only,) if isinstance(only, str) else only))
    strengths = tuple(alphas) if isinstance(alphas, Sequence) else (alphas,)
    return Intervened(kernel, HSpace(found, strengths), levels=levels)
