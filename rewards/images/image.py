"""Black-box rewards of images (n, c, h, w) in [0, 1]: JPEG size, brightness, contrast, ink.

    compressibility(x) = -kilobytes of x as a JPEG          incompressibility(x) = its negative

They need no network and have no gradient, which is what a search is for.

Source of the JPEG rewards: Training Diffusion Models with Reinforcement Learning (Black et al., 2023), quality 95.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_number

_BLACK = "Black et al. 2023, Training Diffusion Models with Reinforcement Learning"
_IMAGES = "images (n, c, h, w) in [0, 1]"
_EIGHT_BITS = "images (n, 1 or 3, h, w) in [0, 1], rounded to 8 bits"
_SLACK = 1e-3  # rounding that a decoder may leave outside [0, 1]


@facts(range="kilobytes: -200 to 0 at 512 × 512", differentiable=False, limits=_EIGHT_BITS, source=_BLACK)
def compressibility(quality: int = 95) -> Reward:
    """r = -(size of the image as a JPEG, in units of 1000 bytes); images of one or three channels.

    Raises:
        ValueError: quality outside 1..100.
    """
    return _jpeg(quality, -1.0, "compressibility")


@facts(range="kilobytes: 0 to 200 at 512 × 512", differentiable=False, limits=_EIGHT_BITS, source=_BLACK)
def incompressibility(quality: int = 95) -> Reward:
    """r = size of the image as a JPEG, in units of 1000 bytes; images of one or three channels.

    Raises:
        ValueError: quality outside 1..100.
    """
    return _jpeg(quality, 1.0, "incompressibility")


@facts(range="0 to 1, or -1 to 0 with a target", differentiable=True, limits=_IMAGES)
def brightness(target: float | None = None) -> Reward:
    """r = mean pixel, or minus its distance to `target`.

    Raises:
        ValueError: target outside [0, 1].
    """
    if target is None:
        return Reward(lambda images, _: _mean(images), "brightness")
    if not is_number(target, 0, 1):
        raise ValueError(f"target is {target}, expected a brightness in [0, 1]")
    return Reward(lambda images, _: -(_mean(images) - target).abs(), f"brightness({target:g})")


@facts(range="0 to 0.5", differentiable=True, limits=_IMAGES)
def contrast() -> Reward:
    """r = standard deviation of the pixels."""
    return Reward(lambda images, _: _checked(images).double().flatten(1).std(1, correction=0), "contrast")


@facts(range="0 to 1", differentiable=False, limits=_IMAGES)
def ink(threshold: float = 0.5) -> Reward:
    """r = fraction of pixels brighter than `threshold`: the strokes of light digits on black.

    Raises:
        ValueError: threshold outside [0, 1].
    """
    if not is_number(threshold, 0, 1):
        raise ValueError(f"threshold is {threshold}, expected a brightness in [0, 1]")
    return Reward(lambda images, _: _mean(_checked(images) > threshold), f"ink({threshold:g})")


def _mean(images: Any) -> Tensor:
    return _checked(images).double().flatten(1).mean(1)


def _jpeg(quality: int, sign: float, name: str) -> Reward:
    if quality not in range(1, 101):
        raise ValueError(f"quality is {quality!r}, expected a whole number in 1..100")

    def fn(images: Any, _: object) -> Tensor:
        images = _checked(images)
        if images.shape[1] not in (1, 3):
            raise ValueError(f"a JPEG has one or three channels, got images of {images.shape[1]}")
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        return sign * torch.tensor([_jpeg_bytes(p, quality) for p in pixels], dtype=torch.float64, device="cpu") / 1000

    return Reward(fn, name if quality == 95 else f"{name}({quality})")


def _jpeg_bytes(pixels: Tensor, quality: int) -> int:
    """Size of one image, uint8 (c, h, w)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("JPEG rewards need Pillow: pip install pillow") from error
    channels, height, width = pixels.shape
    data = pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    file = io.BytesIO()
    Image.frombytes("L" if channels == 1 else "RGB", (width, height), data).save(file, "JPEG", quality=quality)
    return file.tell()


def _checked(images: Any) -> Tensor:
    """The images, if they are images.

    Raises:
        ValueError: not (n, c, h, w), or values outside [0, 1].
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected images (n, c, h, w), got {got}")
    if images.dtype != torch.bool and images.numel() and not (images.min() >= -_SLACK and images.max() <= 1 + _SLACK):
        low, high = float(images.min()), float(images.max())
        raise ValueError(
            f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}: map them in kernel.decode"
        )
    return images
