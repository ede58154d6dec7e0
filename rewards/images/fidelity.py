"""How much of a picture an edit left as it was: MSE, PSNR and SSIM over what was to be kept, and a reward of it.

    MSE  = mean over kept pixels of (x - y)²
    PSNR = -10 log₁₀ MSE                                                                decibels, pictures in [0, 1]
    SSIM = mean over kept p of  (2 μ_x μ_y + C₁)(2 σ_xy + C₂) / ((μ_x² + μ_y² + C₁)(σ_x² + σ_y² + C₂))

with C₁ = 0.01², C₂ = 0.03², and means and (co)variances under a Gaussian window around p, 11 × 11, σ = 1.5. Windows are
normalised over the kept pixels that they hold: nothing of the edited region, nor of a border, enters. Scripts that
black out the region and average over the whole picture have an MSE that is smaller by the share of pixels kept, and
add the logarithm of that to the PSNR: these do not.

    background("photo.png", "mask.png")     r = -MSE over the white pixels of the mask

Source: Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004), eqs. 13-15.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treesearch.rewards import files
from treesearch.rewards.base import Reward, built_from

C1, C2 = 0.01**2, 0.03**2
WINDOW, SPREAD = 11, 1.5
LUMA = (0.299, 0.587, 0.114)  # of a colour, as files are read for kernels of grey pictures


def mse(one: Tensor, other: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean squared difference (n,), float64.

    Args:
        one: pictures (n, c, h, w) in [0, 1].
        other: pictures of that shape, or (c, h, w), one for all.
        kept: bool (h, w), or (n, h, w), one a picture: the pixels that count; None for all.

    Raises:
        ValueError: other shapes, a mask that keeps nothing or is no mask, values that are not finite.
    """
    one, other, kept = _checked(one, other, kept)
    return ((one - other) ** 2).mean(1).mul(kept).sum((1, 2)) / kept.sum((1, 2))


def psnr(one: Tensor, other: Tensor, kept: Tensor | None = None) -> Tensor:
    """Decibels (n,), infinite where nothing differs; arguments of `mse`."""
    return -10 * mse(one, other, kept).log10()


def ssim(one: Tensor, other: Tensor, kept: Tensor | None = None) -> Tensor:
    """Structural similarity (n,) in [-1, 1], 1 where nothing differs, averaged over channels; arguments of `mse`."""
    one, other, kept = _checked(one, other, kept)
    local = partial(_local, kept[:, None])
    mean, mean_other = local(one), local(other)
    var, var_other = local(one**2) - mean**2, local(other**2) - mean_other**2
    both = local(one * other) - mean * mean_other
    alike = (2 * mean * mean_other + C1) * (2 * both + C2)
    alike = alike / ((mean**2 + mean_other**2 + C1) * (var + var_other + C2))
    return alike.mean(1).mul(kept).sum((1, 2)) / kept.sum((1, 2))


def _local(kept: Tensor, maps: Tensor) -> Tensor:
    """Means of maps (n, c, h, w) over the kept pixels (n, 1, h, w) of each window."""
    return _blurred(maps * kept) / _blurred(kept).clamp_min(torch.finfo(kept.dtype).tiny)


def _blurred(maps: Tensor) -> Tensor:
    at = torch.arange(WINDOW, device=maps.device, dtype=maps.dtype) - WINDOW // 2
    line = torch.exp(-(at**2) / (2 * SPREAD**2))
    n, c, h, w = maps.shape
    rows = F.conv2d(maps.reshape(n * c, 1, h, w), line[None, None, :, None], padding=(WINDOW // 2, 0))
    return F.conv2d(rows, line[None, None, None, :], padding=(0, WINDOW // 2)).reshape(n, c, h, w)


def background(source: Tensor | files.File, kept: Tensor | files.File) -> Reward:
    """r = -(mean squared difference from a picture over what is kept of it): what to add to the reward of an edit.

    Args:
        source: the picture, (c, h, w) in [0, 1], or a file of it.
        kept: (h, w) bool, or a file of it, a picture in black and white: white is kept, as in `clamp`.

    Raises:
        ValueError: a picture out of range, a mask of another size or that keeps nothing; later, samples of another
            shape.
    """
    picture = files.picture(source) if isinstance(source, (str, os.PathLike)) else source.detach().cpu().double()
    mask = files.mask(kept) if isinstance(kept, (str, os.PathLike)) else kept.detach().cpu()
    if picture.ndim != 3 or not ((picture >= 0) & (picture <= 1)).all():
        raise ValueError(f"the source has shape {tuple(picture.shape)}, or values outside [0, 1]: expected (c, h, w)")
    mse(picture[None], picture, mask)
    told = hashlib.sha256(repr((picture.tolist(), mask.tolist())).encode()).hexdigest()[:16]
    source_of = built_from("background", told)
    return Reward(partial(_changed, picture, mask), "background", settings=(told,), source=source_of, prompted=False)


def _changed(picture: Tensor, kept: Tensor, images: Any, _: object) -> Tensor:
    if isinstance(images, Tensor) and images.ndim == 4 and len(picture) == 1:
        picture = picture.expand(images.shape[1], -1, -1)
    if isinstance(images, Tensor) and images.ndim == 4 and (len(picture), images.shape[1]) == (3, 1):
        picture = torch.einsum("c,chw->hw", picture.new_tensor(LUMA), picture)[None]
    return -mse(images, picture.to(images.device), kept)


def _checked(one: Any, other: Any, kept: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Both as (n, c, h, w), the mask as weights (n, h, w), float64."""
    if not isinstance(one, Tensor) or one.ndim != 4 or not one.is_floating_point():
        got = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        raise ValueError(f"pictures are {got}, expected floats (n, c, h, w) in [0, 1]")
    if not isinstance(other, Tensor) or tuple(other.shape) not in (tuple(one.shape), tuple(one.shape[1:])):
        got = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
        raise ValueError(f"pictures to compare with are {got}, expected {tuple(one.shape)} or {tuple(one.shape[1:])}")
    n, _, h, w = one.shape
    kept = (
        torch.ones(h, w, dtype=torch.bool, device=one.device) if kept is None else torch.as_tensor(kept).to(one.device)
    )
    if kept.dtype != torch.bool or tuple(kept.shape) not in ((h, w), (n, h, w)):
        raise ValueError(f"the mask is {kept.dtype} {tuple(kept.shape)}, expected bools {(h, w)} or {(n, h, w)}")
    if not kept.flatten(-2).any(-1).all():
        raise ValueError("the mask keeps nothing: there is no pixel to measure")
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError("pictures have entries that are not finite")
    one = one.double()
    return one, other.to(one).expand_as(one), kept.expand(n, h, w).to(one)
