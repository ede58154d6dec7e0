"""The orthonormal cosine transform (DCT-II)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_transform(size: int) -> Tensor:
    """C (size, size) float64, rows are frequencies: y = C x Cᵀ are coordinates of an image x = Cᵀ y C."""
    k = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = (math.pi / size * k[:, None] * (k[None] + 0.5)).cos() * math.sqrt(2 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix
