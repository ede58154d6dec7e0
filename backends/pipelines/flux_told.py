"""FLUX.1 whose network is told a picture beside each token: Fill (what a mask leaves, and the mask) and Control (depth,
edges).

References:
    FLUX.1 Tools (Black Forest Labs, 2024).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.pipelines import masks, vae
from treesearch.backends.pipelines.family import BEGINS
from treesearch.backends.pipelines.flux import Flux
from treesearch.backends.pipelines.parts import refuse_channels
from treesearch.backends.pipelines.settings import Settings, opened


class Told(Flux):
    """A transformer of more channels than its states have."""

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self._beside: Tensor | None = None

    def on(self, pipe: Any) -> Told:
        other = type(self)(pipe, self.settings)
        other._beside = self.beside()
        return other

    def told(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.beside().to(x).expand(len(x), -1, -1)], 2)

    def beside(self) -> Tensor:
        """What stands beside the tokens, (1, tokens, channels)."""
        if self._beside is None:
            self._beside = self.pictured()
        return self._beside

    def pictured(self) -> Tensor:
        """The same, from the settings' pictures."""
        raise NotImplementedError


class FluxFill(Told):
    """Told what a mask leaves of a picture, and the mask, pixel by pixel."""

    @property
    def sees(self) -> bool:
        return True

    def refuse(self) -> None:
        super(Flux, self).refuse()
        channels, side = self.pipe.vae.config.latent_channels, self.pipe.vae_scale_factor
        refuse_channels(self.name, self.network, 4 * (2 * channels + side**2))

    def pictured(self) -> Tensor:
        drawn, latents = masks.left(self, self.settings.image, self.settings.mask)
        pixels = torch.nn.functional.pixel_unshuffle(drawn, self.pipe.vae_scale_factor)
        return torch.cat([self.pack(latents), self.pack(pixels)], 2)


class FluxControl(Told):
    """Told a control image: depth or edges."""

    takes: ClassVar[tuple[str, ...]] = ("max_sequence_length", "sigmas", "control_image", *BEGINS)

    def refuse(self) -> None:
        super(Flux, self).refuse()
        refuse_channels(self.name, self.network, 8 * self.pipe.vae.config.latent_channels)
        if self.settings.control_image is None:
            raise ValueError(f"{self.name} needs a control_image")

    def pictured(self) -> Tensor:
        side = 2 * self.pipe.vae_scale_factor
        height, width = (side * tokens for tokens in self.patches)
        pixels = pixels_of(opened(self.settings.control_image), 3, (height, width))
        with torch.no_grad():
            return self.pack(vae.encode(self.pipe.vae, pixels[None])).to(self.device)
