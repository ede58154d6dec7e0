"""What of a picture a measurement may see beside linear views: where its edges are, and what it covers.

    edges(k)          means over k × k squares of |∇x|, ∇ by Sobel's filters over 4       about 1 at a step from 0 to 1
    silhouette(k)     means over k × k squares of 1/(1 + exp(-(x - threshold)/softness))  about 1 where there is ink

Functions of images (n, C, H, W) in [0, 1] to maps (n, C, H/k, W/k), smooth enough for gradients; neither is linear, so
that guides, `Steered` too, go by their gradient. A palette, the mean colour of squares, is linear: it is `pooled`.

Source: LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis (Liu et al., 2023), section 4, for the
conditions; the maps themselves stand where the paper has latents of an autoencoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from treesearch.rewards.numeric import is_number, is_positive, is_whole

FLAT = 1e-4  # a square is added to |∇x|², whose root has no gradient at 0


@final
@dataclass(frozen=True)
class Edges:
    """See `edges`."""

    size: int

    def __post_init__(self) -> None:
        _refuse_size(self.size)

    @property
    def name(self) -> str:
        return f"edges({self.size})"

    def __call__(self, x: Tensor) -> Tensor:
        _refuse_sides(x, self.size, self.name)
        filters = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
        pairs = torch.stack([filters, filters.T])[:, None].repeat(x.shape[1], 1, 1, 1)
        slopes = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), pairs, groups=x.shape[1])
        squares = slopes.square().unflatten(1, (-1, 2)).sum(2)
        return F.avg_pool2d((squares + FLAT**2).sqrt() - FLAT, self.size)


@final
@dataclass(frozen=True)
class Silhouette:
    """See `silhouette`."""

    size: int
    _: KW_ONLY
    threshold: float = 0.5
    softness: float = 0.1

    def __post_init__(self) -> None:
        _refuse_size(self.size)
        if not is_number(self.threshold, 0, 1):
            raise ValueError(f"threshold is {self.threshold!r}, expected a brightness in 0..1")
        if not is_positive(self.softness):
            raise ValueError(f"softness is {self.softness!r}, expected a positive number")

    @property
    def name(self) -> str:
        return f"silhouette({self.size}, threshold={self.threshold}, softness={self.softness})"

    def __call__(self, x: Tensor) -> Tensor:
        _refuse_sides(x, self.size, self.name)
        return F.avg_pool2d(torch.sigmoid((x - self.threshold) / self.softness), self.size)


def edges(size: int = 2) -> Edges:
    """Where the edges of images are, a map of |∇x|.

    Args:
        size: k, pixels of a square's side; 1 for a map as fine as the image.

    Raises:
        ValueError: size is no whole number from 1; later, images whose sides are no multiples of it.
    """
    return Edges(size)


def silhouette(size: int = 2, *, threshold: float = 0.5, softness: float = 0.1) -> Silhouette:
    """What images cover: the share of each square that is brighter than a threshold.

    Args:
        size: k, as for `edges`.
        threshold: a brightness in 0..1.
        softness: how far from it the share goes from .27 to .73.

    Raises:
        ValueError: a setting out of range; later, images whose sides are no multiples of the size.
    """
    return Silhouette(size, threshold=threshold, softness=softness)


OUTLINES: dict[str, Callable[[int], Edges | Silhouette]] = {"edges": edges, "silhouette": silhouette}


def outline(name: str) -> Edges | Silhouette:
    """The map of a name, with the settings that are usual: edges(2).

    Raises:
        ValueError: no such name.
    """
    found = re.fullmatch(r"(\w+)\((\d+).*\)", name)
    made = OUTLINES[found[1]](int(found[2])) if found and found[1] in OUTLINES else None
    if made is None or made.name != name:
        raise ValueError(f"no map of images is called {name!r}: expected one such as {edges().name!r}")
    return made


def _refuse_size(size: int) -> None:
    if not is_whole(size):
        raise ValueError(f"size is {size!r}, expected a whole number of pixels, 1 or more")


def _refuse_sides(x: Tensor, size: int, name: str) -> None:
    if x.ndim != 4 or x.shape[2] % size or x.shape[3] % size:
        raise ValueError(f"{name} got {tuple(x.shape)}, expected images whose sides are multiples of {size}")
