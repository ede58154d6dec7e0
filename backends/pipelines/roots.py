"""Where a chain begins instead of its prior: pixels of an image, or noise of the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def pixels_of(image: Any, channels: int) -> Tensor:
    """An image as (channels, h, w) in [0, 1].

    Args:
        image: (channels, h, w) in [0, 1], or a PIL image of any mode.
        channels: 3, or 1 where a network sees grey.

    Raises:
        TypeError: neither a tensor nor a PIL image.
        ValueError: another shape, or values out of range.
    """
    if not isinstance(image, Tensor):
        if not hasattr(image, "convert"):
            raise TypeError(f"the image is {type(image).__name__}, expected a tensor (c, h, w) or a PIL image")
        rows = np.atleast_3d(np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)) / 255
        image = torch.from_numpy(rows).permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected ({channels}, h, w)")
    if not (image.is_floating_point() and image.min() >= 0 and image.max() <= 1 + 1e-3):
        ends = f"{image.dtype} in {float(image.min()):g}..{float(image.max()):g}"
        raise ValueError(f"the image is {ends}, expected floats in 0..1: divide bytes by 255")
    return image.float()


def noise_of(noise: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise of a state's shape.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or values that are not finite.
    """
    if not isinstance(noise, Tensor):
        raise TypeError(f"x_T is {type(noise).__name__}, expected a tensor {shape}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"x_T has shape {tuple(noise.shape)}, expected {shape}")
    if not (noise.is_floating_point() and noise.isfinite().all()):
        raise ValueError(f"x_T is {noise.dtype} or has values that are not finite, expected finite floats")
    return noise
