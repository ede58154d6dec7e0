"""The metrics of PIE-Bench: how much of a picture's structure and background an edit keeps, how it fits its prompt.

    structure distance    mean over pairs of tokens of (S(source) - S(edited))²,  S the cosines of descriptors of tokens
    PSNR, MSE, SSIM       over what is not edited, see `treesearch.rewards.images.fidelity`
    LPIPS                 of the two pictures with the edited region black; where the package `lpips` is installed
    CLIP, whole, edited   100 max(cos, 0) of picture and target prompt; the second with all but the edited region black

Each is a function of (source, edited, mask, prompts): pictures (n, 3, h, w) in [0, 1], bool (n, h, w) that is True
where the edit may happen, target prompts; each returns (n,). The descriptors of the benchmark are keys of the last
layer of a DINO ViT: give them as `tokens`. Without, they are ours: histograms of the orientations of gradients in 2 x 2
cells, which see shapes and no colours, and whose figures compare with each other alone.

Source: Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code (Ju et al., 2024), section 5.1.
Structure distance: Splicing ViT Features for Semantic Appearance Transfer (Tumanyan et al., 2022), eq. 2.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from treesearch.rewards import CLIPScore
from treesearch.rewards.images import fidelity

Tokens = Callable[[Tensor], Tensor]
"""Descriptors (n, tokens, features) of pictures (n, 3, h, w)."""
Metric = Callable[[Tensor, Tensor, Tensor, Sequence[str]], Tensor]
BINS, CELL = 8, 2


def metrics(tokens: Tokens | None = None, clip: str | None = None) -> dict[str, Metric]:
    """What can be measured here, by name.

    Args:
        tokens: descriptors of a network for the structure distance.
        clip: checkpoint of a CLIP, a folder or a hub id; None leaves its two metrics out.
    """
    found: dict[str, Metric] = {
        "structure": partial(structure_distance, tokens=tokens or orientations),
        "psnr": psnr,
        "mse": mse,
        "ssim": ssim,
    }
    if importlib.util.find_spec("lpips") is not None:
        found["lpips"] = lpips
    if clip is not None:
        found |= {
            name: partial(clip_similarity, checkpoint=clip, region=name == "clip_edited")
            for name in ("clip", "clip_edited")
        }
    return found


def structure_distance(
    source: Tensor, edited: Tensor, mask: Tensor, prompts: Sequence[str], *, tokens: Tokens | None = None
) -> Tensor:
    """Of whole pictures."""
    mine, theirs = (_cosines((tokens or orientations)(each)) for each in (source, edited))
    return ((mine - theirs) ** 2).mean((1, 2))


def _cosines(tokens: Tensor) -> Tensor:
    unit = F.normalize(tokens.double(), dim=-1, eps=1e-12)
    return unit @ unit.mT


def orientations(pictures: Tensor) -> Tensor:
    """Histograms (n, cells, 8 + 1) of the directions of gradients by Sobel's filters, weighed by their size.

    The last entry is a small constant: cells without gradients are alike, and unlike those with.
    """
    grey = F.pad(pictures.double().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    dx, dy = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
    turn = (torch.atan2(dy, dx) / (2 * math.pi) * BINS) % BINS
    low, share = turn.floor(), turn - turn.floor()
    size = torch.hypot(dx, dy)
    bins = torch.arange(BINS, device=size.device)[:, None, None]
    near, next_ = (size * w for w in (1 - share, share))
    maps = near[:, None] * (low[:, None] % BINS == bins) + next_[:, None] * ((low[:, None] + 1) % BINS == bins)
    cells = F.avg_pool2d(maps, CELL).flatten(2).mT
    return torch.cat([cells, torch.full_like(cells[..., :1], 0.05)], -1)


def psnr(source: Tensor, edited: Tensor, mask: Tensor, prompts: Sequence[str]) -> Tensor:
    """Decibels over what is not edited."""
    return fidelity.psnr(edited, source, ~mask)


def mse(source: Tensor, edited: Tensor, mask: Tensor, prompts: Sequence[str]) -> Tensor:
    """Over what is not edited."""
    return fidelity.mse(edited, source, ~mask)


def ssim(source: Tensor, edited: Tensor, mask: Tensor, prompts: Sequence[str]) -> Tensor:
    """Over what is not edited."""
    return fidelity.ssim(edited, source, ~mask)


def lpips(source: Tensor, edited: Tensor, mask: Tensor, prompts: Sequence[str]) -> Tensor:
    """SqueezeNet's, as in the benchmark.

    Raises:
        ImportError: the package is not installed.
    """
    network = importlib.import_module("lpips").LPIPS(net="squeeze")
    kept = ~mask[:, None]
    with torch.no_grad():
        return network(2 * source * kept - 1, 2 * edited * kept - 1).flatten().double()


def clip_similarity(
    source: Tensor, edited: Tensor, mask: Tensor, prompts: Sequence[str], *, checkpoint: str, region: bool = False
) -> Tensor:
    """Of edited pictures and target prompts, or of the edited region alone."""
    seen = edited * mask[:, None] if region else edited
    return CLIPScore(checkpoint, weight=100.0)(seen, list(prompts))
