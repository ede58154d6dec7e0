"""Where an edit happens: masks of pictures, on the states of a kernel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from treesearch.backends.base import describe
from treesearch.rewards import files


def mask_of(kernel: Any, file: files.File) -> Tensor:
    """Entries (*state) bool of a kernel's states that a picture in black and white marks; white is inside.

    Args:
        kernel: of states (C, H, W).
        file: see `rewards.files.mask`; H × W pixels, or a whole multiple of both, as latents of a picture are smaller
            than it is. An entry is inside where one of its pixels is.

    Raises:
        ValueError: a file that is no mask, one of another size, or without a white pixel.
    """
    return on_state(describe(kernel, identify=False).state_shape, files.mask(file), str(file))


def on_state(shape: tuple[int, ...], mask: Tensor, name: str = "mask") -> Tensor:
    """A mask (h, w) of a picture on states (C, H, W).

    Raises:
        ValueError: another size, no entry, or states that are no pictures.
    """
    if len(shape) != 3:
        raise ValueError(f"states have shape {shape}, expected (C, H, W): a mask of a picture says nothing of others")
    height, width = shape[-2:]
    if mask.ndim != 2 or mask.shape[0] % height or mask.shape[1] % width or not mask.numel():
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {(height, width)} or a multiple of both")
    if not mask.any():
        raise ValueError(f"{name} has no white pixel: nothing would be edited")
    return F.adaptive_max_pool2d(mask[None].float(), (height, width))[0].bool().expand(shape).clone()
