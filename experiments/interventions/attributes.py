"""Attributes of a digit from moments of its pixels, no classifier: images (n, 1, H, W) in [0, 1] -> (n,).

slant      -cov(x, y)/var(y), weighted by ink, y down: positive leans to the right
thickness  2 × ink / total variation, in pixels: a stroke of width w and length l has ink w l and variation 2 l
size       √(var(x) + var(y)), weighted by ink, in pixels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-6  # of ink and the like, lest a blank image be no number


def slant(images: Tensor) -> Tensor:
    _, var_y, cov = _second_moments(images)
    return -cov / var_y.clamp_min(LEAST)


def thickness(images: Tensor) -> Tensor:
    ink = images.double()[:, 0]
    across, down = F.pad(ink.diff(dim=2), (0, 1)), F.pad(ink.diff(dim=1), (0, 0, 0, 1))
    return 2 * ink.sum((1, 2)) / (across**2 + down**2).sqrt().sum((1, 2)).clamp_min(LEAST)


def size(images: Tensor) -> Tensor:
    var_x, var_y, _ = _second_moments(images)
    return (var_x + var_y).sqrt()


ATTRIBUTES = {"slant": slant, "thickness": thickness, "size": size}


def measured(images: Tensor) -> Tensor:
    """All of them, (n, attributes)."""
    return torch.stack([of(images) for of in ATTRIBUTES.values()], 1)


def _second_moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances of x and y, and their covariance, each (n,), weighted by ink."""
    ink = images.double()[:, 0]
    weight = ink / ink.sum((1, 2), keepdim=True).clamp_min(LEAST)
    y, x = (torch.arange(n, dtype=ink.dtype, device=ink.device) for n in ink.shape[1:])
    x, y = x.expand_as(ink), y[:, None].expand_as(ink)
    x, y = (at - (weight * at).sum((1, 2), keepdim=True) for at in (x, y))
    return (weight * x * x).sum((1, 2)), (weight * y * y).sum((1, 2)), (weight * x * y).sum((1, 2))
