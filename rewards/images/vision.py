"""What image rewards share: pixels of samples, the resize of their networks, batches and prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from treesearch.rewards.loading import CheckpointError, load_part, once

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Fit = Literal["crop", "stretch", "pad"]
Interpolation = Literal["bicubic", "bilinear"]
_SLACK = 1e-3  # rounding that a decoder may leave outside [0, 1]


def pixels(samples: Any) -> Tensor:
    """Samples as images (n, 3, h, w) in [0, 1], with their graph, where they are.

    Args:
        samples: a tensor (n, 1 or 3, h, w) in [0, 1], or a sequence of PIL images, arrays (h, w[, 3]) in [0, 1] or
            of uint8, or tensors (1 or 3, h, w); those of a sequence have one size.

    Raises:
        ValueError: another shape, values outside [0, 1], NaN, or several sizes.
        TypeError: not images.
    """
    if isinstance(samples, Tensor):
        return _checked(samples)
    images = [_image(s) for s in samples]
    if not images:
        raise ValueError("expected images, got an empty sequence: decode at least one state")
    sizes = sorted({tuple(i.shape[-2:]) for i in images})
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size, got {len(sizes)}, {sizes[0]} and {sizes[1]} among them")
    return torch.cat(images)


def preprocess(
    samples: Any,
    size: int | tuple[int, int],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    fit: Fit = "crop",
    resize: int | tuple[int, int] | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Images as a network reads them, (n, 3, *size), differentiable: antialiased resize, cut, (x - mean) / std.

    The image processors of transformers do the same on 8-bit pixels through PIL, which rounds twice. Before
    normalisation the two differed by at most 1.1 / 255 (0.3 / 255 on average) on noise, edges and ramps. Rows are
    resized before columns, as PIL did before version 13; it now may begin with the columns where the aspect changes.

    Args:
        samples: what `pixels` takes; images of a sequence may differ in size here.
        size: of the result, (height, width) or the side of a square.
        fit: "crop" resizes the shorter side and cuts the centre out (CLIP), "stretch" ignores the aspect (ViT),
            "pad" resizes the longer side and puts black around (HPSv2).
        resize: before a cut, where it is not `size`: the length of the shorter side, or both to stretch to.

    Raises:
        ValueError: images that `pixels` refuses, or a cut larger than the resized image.
    """
    if not isinstance(samples, Tensor) and len(samples):
        parts = [_image(s) for s in samples]
        samples = torch.cat(parts) if len({p.shape for p in parts}) == 1 else parts
    if not isinstance(samples, Tensor):
        one = functools.partial(preprocess, fit=fit, resize=resize, interpolation=interpolation)
        return torch.cat([one(p, size, mean, std) for p in samples])
    height, width = (size, size) if isinstance(size, int) else size
    images = _fitted(pixels(samples), height, width, fit, resize, interpolation)
    shift, scale = (images.new_tensor(tuple(v)).view(1, -1, 1, 1) for v in (mean, std))
    return (images - shift) / scale


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Arguments of `preprocess`, as an image processor of transformers states them; see `preprocessor`."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit = "crop"
    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(self, samples: Any) -> Tensor:
        return preprocess(
            samples,
            self.size,
            self.mean,
            self.std,
            fit=self.fit,
            resize=self.resize,
            interpolation=self.interpolation,
        )


def place(samples: Any, device: str | torch.device | None) -> str:
    """The device to score on: the one asked for, else where the samples are, else the CPU."""
    if device is None:
        first = samples if isinstance(samples, Tensor) else next(iter(samples), None)
        device = first.device if isinstance(first, Tensor) else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return str(device)


def need_prompts(prompts: Sequence[Any] | None, name: str) -> list[str]:
    """The prompts as strings.

    Raises:
        ValueError: there are none, or one is not a string.
    """
    if prompts is None:
        raise ValueError(f"{name} compares images with prompts and got none: pass prompts=[...] to the search")
    for p in prompts:
        if not isinstance(p, str):
            raise ValueError(f"{name} reads prompts that are strings, got {type(p).__name__}: pass prompts=['...']")
    return list(prompts)


def unread(tokenizer: Any, prompts: Sequence[Any], most: int, name: str) -> list[list[str]]:
    """`Reward.remarks` of a network that reads the first `most` tokens of a prompt, the tokenizer's marks included."""
    room = most - tokenizer.num_special_tokens_to_add()

    def remark(prompt: Any) -> list[str]:
        if not isinstance(prompt, str):
            return []  # refused when it is scored
        n = len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        told = f"{name} reads {room} tokens of a prompt, this one has {n}: the last {n - room} do not count"
        return [told] if n > room else []

    return [remark(prompt) for prompt in prompts]


@once
def preprocessor(checkpoint: str) -> Preprocessor:
    """What the image processor of a checkpoint does, for `preprocess`.

    Raises:
        CheckpointError: absent, gated, or a processor that does something else too.
    """
    processor = load_part("AutoImageProcessor", checkpoint)
    get = functools.partial(getattr, processor)
    side, sizes = _sides(get("size", None)), _sides(get("crop_size", None))
    odd = [name for name in ("include_top", "rescale_offset", "do_pad") if get(name, None)]
    if isinstance(side, int) and not get("do_center_crop", False) and get("crop_pct", None) is None:
        odd.append("no crop")
    resample = {2: "bilinear", 3: "bicubic"}.get(int(get("resample", 3)))
    if odd or side is None or resample is None or not get("do_rescale", True) or not get("do_resize", True):
        name = type(processor).__name__
        raise CheckpointError(f"{checkpoint} prepares images with {name} in a way that is not supported: {odd or name}")
    plain = not get("do_normalize", True)
    fixed: dict[str, Any] = {
        "mean": (0.0,) * 3 if plain else tuple(processor.image_mean),
        "std": (1.0,) * 3 if plain else tuple(processor.image_std),
        "interpolation": resample,
    }
    if get("do_center_crop", False) and sizes is not None:
        return Preprocessor(size=(sizes, sizes) if isinstance(sizes, int) else sizes, resize=side, **fixed)
    if isinstance(side, tuple):
        return Preprocessor(size=side, fit="stretch", **fixed)
    if side >= 384:  # with crop_pct: ConvNeXt stretches large images
        return Preprocessor(size=(side, side), fit="stretch", **fixed)
    return Preprocessor(size=(side, side), resize=int(side / processor.crop_pct), **fixed)


def _sides(size: Any) -> int | tuple[int, int] | None:
    """The shorter side, or (height, width), of a size as image processors write it."""
    if size is None or isinstance(size, int):
        return size
    found = dict(size)
    if found.get("shortest_edge") and not found.get("longest_edge"):
        return int(found["shortest_edge"])
    return (int(found["height"]), int(found["width"])) if found.get("height") and found.get("width") else None


def _image(sample: Any) -> Tensor:
    """One image as (1, 3, h, w)."""
    if isinstance(sample, Tensor):
        return _checked(sample[None])
    if hasattr(sample, "convert"):
        sample = sample.convert("RGB")
    if isinstance(sample, str):
        raise TypeError("expected images, got texts: this is a reward of images, see `treesearch list rewards`")
    if not hasattr(sample, "__array__") and not hasattr(sample, "__array_interface__"):
        raise TypeError(f"expected images, got {type(sample).__name__}: decode to a tensor (n, 3, h, w) or PIL images")
    import numpy as np

    array = torch.from_numpy(np.array(sample))
    array = array[..., None] if array.ndim == 2 else array
    return _checked(array.movedim(-1, 0)[None])


def _checked(images: Tensor) -> Tensor:
    if images.ndim == 5:
        raise ValueError(f"expected images (n, 3, h, w), got videos {tuple(images.shape)}: use frames(reward)")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images (n, 1 or 3, h, w), got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        images = images / 255
    images = images if images.dtype == torch.float64 else images.float()
    if images.numel() and not (images.min() >= -_SLACK and images.max() <= 1 + _SLACK):
        low, high = float(images.min()), float(images.max())
        hint = "map them in kernel.decode" if low == low else "the decoder overflowed, use another dtype"
        raise ValueError(f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}: {hint}")
    return images.expand(-1, 3, -1, -1)


def _fitted(
    images: Tensor, height: int, width: int, fit: Fit, resize: int | tuple[int, int] | None, mode: Interpolation
) -> Tensor:
    if fit == "stretch":
        return _resize(images, height, width, mode)
    if fit == "pad":
        return _padded(images, height, width, mode)
    if fit != "crop":
        raise ValueError(f"fit is {fit!r}, expected 'crop', 'stretch' or 'pad'")
    if isinstance(resize, tuple):
        return _centre(_resize(images, *resize, mode), height, width)
    side, (h, w) = resize or min(height, width), images.shape[-2:]
    target = (int(side * h / w), side) if w < h else (side, int(side * w / h))
    return _centre(_resize(images, *target, mode), height, width)


def _resize(images: Tensor, height: int, width: int, mode: Interpolation) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    for size in ((images.shape[-2], width), (height, width)):  # PIL clamps after either pass, and so do we
        images = nn.functional.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    return images


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    if top < 0 or left < 0:
        got = tuple(images.shape[-2:])
        raise ValueError(f"cannot cut {(height, width)} out of images resized to {got}: resize to at least that")
    return images[..., top : top + height, left : left + width]


def _padded(images: Tensor, height: int, width: int, mode: Interpolation) -> Tensor:
    scale = min(height / images.shape[-2], width / images.shape[-1])
    images = _resize(images, round(images.shape[-2] * scale), round(images.shape[-1] * scale), mode)
    rows, columns = height - images.shape[-2], width - images.shape[-1]
    return nn.functional.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
