"""A user's picture as pixels, in the one form that kernels make states of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from treesearch.rewards.files import opened


def pixels_of(image: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """A picture as (channels, h, w) float32 in [0, 1], upright.

    Args:
        image: (channels, h, w) in [0, 1], or grey (1, h, w) for three channels; or a PIL image of eight bits, grey or
            colour, which becomes what the channels say.
        channels: 3, or 1 where a network sees grey.
        size: (h, w) that it must have.

    Raises:
        TypeError: neither a tensor nor a PIL image.
        ValueError: another size, values out of range, an alpha channel or more than eight bits.
    """
    if not isinstance(image, Tensor):
        if not hasattr(image, "convert"):
            raise TypeError(f"the image is {type(image).__name__}, expected a tensor (c, h, w) or a PIL image")
        image = opened(image, channels)
    if image.ndim != 3 or image.shape[0] not in (1, channels):
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected ({channels}, h, w)")
    if not (image.is_floating_point() and image.min() >= 0 and image.max() <= 1 + 1e-3):
        ends = f"{image.dtype} in {float(image.min()):g}..{float(image.max()):g}"
        raise ValueError(f"the image is {ends}, expected floats in 0..1: divide bytes by 255")
    (height, width), (h, w) = image.shape[1:], size
    if (height, width) != (h, w):
        raise ValueError(f"the image is {height} x {width} pixels, expected {h} x {w}: resize it")
    return image.float().expand(channels, -1, -1)


def is_same(one: Any, other: Any, channels: int) -> bool:
    """Whether two pictures, PIL images or tensors, are equal to a level of eight bits."""
    if one is other:
        return True
    if not all(isinstance(each, Tensor) or hasattr(each, "convert") for each in (one, other)):
        return False
    these, those = (each.cpu() if isinstance(each, Tensor) else opened(each, channels) for each in (one, other))
    return these.shape == those.shape and bool(((these - those).abs() < 1 / 510).all())
