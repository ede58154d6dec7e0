"""A small U-Net on 28 x 28 images, two resolutions on their space-to-depth view, which also tells its features.

    28 x 28 x C -> 14 x 14 x 4C -> 7 x 7 -> 14 x 14 x 4C' -> 28 x 28 x C'

Sources: U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al., 2015); time embeddings as
in Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B.
"""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64)
EMBEDDING = 128
GROUPS = 8


class Block(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + e))), with an embedding e; a 1 x 1 shortcut where widths change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(EMBEDDING, outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.embed(embedding)[..., None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


@final
class SmallUNet(nn.Module):
    """Images, and features of the images that came in, which know nothing of the vector.

    Args:
        inputs, outputs: channels C and C' of images 28 x 28.
        classes: entries of a vector that the way up is told beside the time, 0 for none.
        widths: channels at 14 x 14 and at 7 x 7.
    """

    def __init__(self, inputs: int, outputs: int, classes: int = 0, widths: tuple[int, int] = WIDTHS) -> None:
        super().__init__()
        wide, deep = widths
        self.time = nn.Sequential(nn.Linear(EMBEDDING // 2, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.classes = nn.Linear(classes, EMBEDDING) if classes else None
        self.first = nn.Conv2d(4 * inputs, wide, 3, padding=1)
        self.down1, self.down2 = Block(wide, wide), Block(deep, deep)
        self.shrink = nn.Conv2d(wide, deep, 3, stride=2, padding=1)
        self.middle = Block(deep, deep)
        self.up2, self.up1 = Block(2 * deep, deep), Block(2 * wide, wide)
        self.grow = nn.Conv2d(deep, wide, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, wide)
        self.last = nn.Conv2d(wide, 4 * outputs, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, C', 28, 28) and features (n, 2 deep) of images x (n, C, 28, 28).

        Args:
            x: as said.
            timestep: (n,), 0..1000.
            vector: (n, classes), where the network takes one.
        """
        time = self.time(positions(timestep, EMBEDDING // 2).to(x.dtype))
        down = F.silu(time)
        up = down if self.classes is None or vector is None else F.silu(time + self.classes(vector))
        wide = self.down1(self.first(F.pixel_unshuffle(x, 2)), down)
        deep = self.down2(self.shrink(wide), down)
        h = self.middle(deep, down)
        features = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], 1)
        h = self.grow(F.interpolate(self.up2(torch.cat([h, deep], 1), up), scale_factor=2.0))
        h = self.up1(torch.cat([h, wide], 1), up)
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2), features


def positions(timestep: Tensor, size: int) -> Tensor:
    """Sines and cosines (n, size) of timesteps (n,), at wavelengths from 2π to 2π · 10,000."""
    half = size // 2
    rates = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
