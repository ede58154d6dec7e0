"""Replacement from files: what is known of a picture, held in every state.

    clamp(mnist(), 'mask.png', 'seed.png')                                     known entries noised afresh
    cycle(clamp(mnist(), 'mask.png', 'seed.png', inverted=True), low=8, high=18, times=3)

The second is Cyclic One-Way Diffusion with its seed held to the end. `Steered` by `measurement(masked('mask.png'),
'seed.png', tolerance=0.1)` aims at the law of the kernel given what is known; this one does not, and says so.

Source: Cyclic One-Way Diffusion (Wang et al., 2024), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import describe
from treesearch.backends.chains.inversion import invert
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards import files


def clamp(kernel: Any, mask: files.File, seed: files.File, *, inverted: bool = False, iterations: int = 1) -> Clamp:
    """A kernel whose known entries are those of a picture.

    Args:
        kernel: on a chain, of states (C, H, W) that are images in [-1, 1].
        mask: file of it, (H, W): a picture in black and white, white is known, or an array.
        seed: file of a picture of the states' size and channels, or of an array like a state.
        inverted: known entries follow the path that leads to the whole seed, in place of noise of their own; T ·
            iterations evaluations, which no budget pays for.
        iterations: see `chains.inversion.invert`.

    Raises:
        ValueError: files that are not what they should be, of another size, or out of range.
        TypeError: a kernel without a chain.
    """
    shape = describe(kernel, identify=False).state_shape
    known, values = files.mask(mask), _state(seed)
    if tuple(values.shape) != shape or tuple(known.shape) != shape[-2:]:
        raise ValueError(f"a mask {tuple(known.shape)} and a seed {tuple(values.shape)}, expected {shape[-2:]} and "
                         f"{shape}, that of a state")  # fmt: skip
    if inverted:
        values = invert(kernel, values[None], iterations=iterations)[:, 0].cpu()
    return Clamp(kernel, known.expand(shape), values)


def _state(seed: files.File) -> Tensor:
    return (2 * files.picture(seed) - 1 if files.is_picture(seed) else files.numbers(seed)).to(torch.float32)
