"""What a mask leaves of a picture, while the chain draws the rest.

    ê = m x̂_0 + (1 - m) x_0,    ε̂ = (x_t - α_t x_0) / σ_t  where m = 0        the picture at x_s has the noise it had

A network that was taught to fill in (9 channels, FLUX Fill) is told the mask and what it leaves, and no state is
held. At η = 0 this is what the inpainting pipelines of diffusers do: they put the picture back after every step, under
the noise that they began with, which is that of x_t.

References:
    RePaint: Inpainting using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), eq. 8, not resampled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Gaussian, expand
from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.pipelines import vae
from treesearch.backends.pipelines.family import Family


class Held(NamedTuple):
    """What a mask keeps of a picture."""

    picture: Tensor  # x_0 (*state)
    free: Tensor  # (1, *state), 0 where the picture stays

    def to(self, device: str | torch.device) -> Held:
        """The same on a device."""
        return Held(self.picture.to(device), self.free.to(device))


def white(mask: Any, size: tuple[int, int]) -> Tensor:
    """A mask (1, 1, h, w) float32, 1 where it is white.

    Raises:
        ValueError: another size than that of the picture.
    """
    if isinstance(mask, list):
        raise ValueError(f"{len(mask)} masks, expected one")
    try:
        return (pixels_of(mask, 1, size) >= 0.5).float()[None]
    except ValueError as error:
        raise ValueError(f"mask: {error}") from error


def free(family: Family, mask: Any) -> Tensor:
    """Entries of a state (1, *state) that the chain draws: 1, and 0 where the picture stays."""
    if not family.plain:
        return family.free(mask)
    height, width = _latent_size(family)
    side = vae.factor(family.pipe)
    small = torch.nn.functional.interpolate(white(mask, (side * height, side * width)), size=(height, width))
    channels = family.unpack(torch.empty(1, *family.state_shape, device="meta")).shape[1]
    return family.pack(small.expand(1, channels, height, width)).to(family.device)


def held(chain: Chain, law: Gaussian, x: Tensor, t: Tensor, kept: Held) -> Gaussian:
    """The law of a step with a picture held under a mask: at t = 1 it is there itself, though the grid end above 0."""
    known, free, last = kept.picture.expand_as(x), kept.free > 0, expand(t == 1, x)
    eps = (x - chain.at("alpha", t, x) * known) / chain.at("sigma", t, x)
    mean = torch.where(last, known, chain.law(x, t, (known, eps)).mean)
    std = torch.where(last & ~free, 0.0, law.std)
    return Gaussian(torch.where(free, law.mean, mean), std, torch.where(free, law.endpoint, known))


def left(family: Family, image: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """A mask (1, 1, H, W), and the latents (1, c, h, w) of what it leaves of a picture: grey where it is white."""
    height, width = (vae.factor(family.pipe) * side for side in _latent_size(family))
    drawn = white(mask, (height, width))
    pixels = pixels_of(image, 3, (height, width))[None]
    with torch.no_grad():
        latents = vae.encode(family.pipe.vae, torch.where(drawn > 0, 0.5, pixels))
    return drawn.to(family.device), latents.to(family.device)


def _latent_size(family: Family) -> tuple[int, int]:
    height, width = family.unpack(torch.empty(1, *family.state_shape, device="meta")).shape[-2:]
    return height, width
