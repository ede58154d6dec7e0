"""The judge: a second digit classifier, kept out of reach of every search.

A search climbs its reward, so its samples must be graded by something else. The judge differs from
`rewards/images/classifier.py` in architecture (residual network, group norm, average pooling), in
augmentation (rotations, scalings and shifts instead of noise and blur) and in seed. It was also
shown images that are no digits (noise, blobs, shuffled quarters) with the uniform law over classes
as their target, so a high top probability means "one clean digit". It lives in experiments/, which
no package may import, so no search can reach it; use it for figures only, never as a reward.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = Path(__file__).parents[1] / "weights" / "mnist_judge.safetensors"


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))); a 1 x 1 shortcut where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Residual network 14 x 14 -> 7 x 7, average and maximum pooled, 128 features, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            Residual(32, 32),
            Residual(32, 64, stride=2),
            Residual(64, 64),
        )
        self.norm = nn.GroupNorm(8, 64)
        self.project = nn.Linear(2 * 64, 128)
        self.classify = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (n, 128) of images (n, 1, 28, 28) in [0, 1]."""
        h = F.silu(self.norm(self.body(2 * images - 1)))
        pooled = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)
        return F.silu(self.project(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10)."""
        return self.classify(self.features(images))


@functools.cache
def load_judge() -> Judge:
    """The trained judge on the CPU, in eval mode."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def grade(images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Class probabilities (n, 10) and penultimate features (n, 128) of images in [0, 1]."""
    judge = load_judge()
    features = torch.cat([judge.features(chunk) for chunk in images.split(batch_size)])
    return judge.classify(features).softmax(dim=1), features
