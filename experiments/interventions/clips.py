"""A world of clips: a dot that flies through 8 frames of 8 x 8, evenly or as if thrown.

    x(t) = x_0 + (x_1 - x_0) t/T,     y(t) = y_0 + (y_1 - y_0) t/T + a/2 t (t - T),     T = 7

a = 0 is the even flight, a = GRAVITY the thrown one; ends are drawn alike for both, y downwards, so that neither the
first frame nor the last tells them apart. What flies is measured: a parabola is fitted to the dot's centre, and its
acceleration says which of the two it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FRAMES, SIDE = 8, 8
SHAPE = (1, FRAMES, SIDE, SIDE)
DYNAMICS = ("even", "thrown")
GRAVITY = 0.32  # pixels per frame²: 2 pixels of height in the middle
RADIUS = 0.9
PEAK, FLOOR = 3.0, -0.25  # of a clip's entries, whose mean is then near 0


def clips_of(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Clips (n, *SHAPE) of dynamics (n,), 0 for even and 1 for thrown."""
    n, time = len(labels), torch.arange(FRAMES, dtype=torch.float32)
    low, high = torch.tensor([1.5, 2.8]), torch.tensor([5.5, 6.0])
    first, last = (low + (high - low) * torch.rand(n, 2, generator=rng) for _ in range(2))
    path = first[:, None] + (last - first)[:, None] * (time / (FRAMES - 1))[:, None]
    path[..., 1] += 0.5 * GRAVITY * labels[:, None] * time * (time - (FRAMES - 1))
    grid = torch.arange(SIDE, dtype=torch.float32)
    across, down = ((grid - path[..., i, None]).square() for i in (0, 1))  # (n, F, SIDE)
    return (PEAK * torch.exp(-0.5 * (down[..., :, None] + across[..., None, :]) / RADIUS**2) + FLOOR)[:, None]


class Flight(NamedTuple):
    """What is measured of clips."""

    acceleration: Tensor  # (n,), downwards
    misfit: Tensor  # (n,), root mean square of the centre's distance to the parabola

    @property
    def labels(self) -> Tensor:
        """Dynamics (n,): 0 or 1, the nearer one, and -1 where it is neither."""
        near = (self.acceleration > GRAVITY / 2).long()
        gap = (self.acceleration - GRAVITY * near).abs()
        return torch.where((gap < GRAVITY / 2) & (self.misfit < 0.5), near, -1)


def flight(clips: Tensor) -> Flight:
    """Measure clips (n, *SHAPE)."""
    mass = (clips[:, 0] - FLOOR).clamp_min(0.3).double() - 0.3  # (n, F, H, W), less what noise leaves beside the dot
    total = mass.sum((2, 3)).clamp_min(1e-6)
    grid = torch.arange(SIDE, dtype=torch.float64)
    centre = torch.stack([(mass.sum(2) * grid).sum(-1), (mass.sum(3) * grid).sum(-1)], -1) / total[..., None]
    time = torch.arange(FRAMES, dtype=torch.float64)
    basis = torch.stack([time**0, time, time**2], -1)
    fit = torch.linalg.pinv(basis) @ centre  # (n, 3, 2)
    gap = (centre - basis @ fit).square().sum(-1).mean(1).sqrt()
    return Flight((2 * fit[:, 2, 1]).float(), gap.float())
