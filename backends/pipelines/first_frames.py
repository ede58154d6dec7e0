"""Videos that begin with a picture: Wan 2.1 and 2.2, LTX.

    Wan 2.1, 2.2 A14B   the network is told the picture's latents and a mask of frames; 2.1 sees it by CLIP too
    Wan 2.2 TI2V, LTX   the first frame of the state is the picture's, whose tokens are told a time of 0

A state has a first frame of its own all the same: what the chain makes of it goes nowhere, and the picture's latents
stand in its place before the network and the decoder.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.pipelines import vae
from treesearch.backends.pipelines.ltx import LTX
from treesearch.backends.pipelines.parts import refuse_channels, refuse_inputs
from treesearch.backends.pipelines.settings import Settings
from treesearch.backends.pipelines.wan import Wan


def pictures_of(settings: Settings, most: int) -> list[Any]:
    """The settings' pictures.

    Raises:
        ValueError: more than the model takes.
    """
    image = settings.image
    given = image if isinstance(image, list) else [image]
    if len(given) > most:
        what = "one picture, the first frame" if most == 1 else "the first frame and the last"
        raise ValueError(f"{len(given)} pictures, expected {what}")
    return given


class WanImage(Wan):
    """Wan from a first frame, or a first and a last."""

    takes: ClassVar[tuple[str, ...]] = (*Wan.takes, "image")
    fills: ClassVar[tuple[str, ...]] = (*Wan.fills, "encoder_hidden_states_image")
    begins: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self._told: dict[str, Tensor] | None = None
        self._by_token = bool(pipe.config.get("expand_timesteps"))

    def on(self, pipe: Any) -> WanImage:
        other = type(self)(pipe, self.settings)
        other._told = {name: value.to(pipe.transformer.device) for name, value in self.told.items()}
        return other

    def refuse(self) -> None:
        super(Wan, self).refuse_settings()
        pictures_of(self.settings, 1 if self._by_token else 2)
        channels = self.pipe.vae.config.z_dim
        beside = 0 if self._by_token else channels + self.pipe.vae_scale_factor_temporal
        for expert in self.networks:
            refuse_inputs(expert, self.settings.network_inputs, self.fills)
            refuse_channels(self.name, expert, channels + beside)
        self.refuse_size()

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.pipe.vae.config.z_dim, *super().state_shape[1:])

    @property
    def told(self) -> dict[str, Tensor]:
        """What the network is told of the picture, (1, ...), on the device of the network."""
        if self._told is None:
            with torch.no_grad():
                self._told = self._look()
        return self._told

    def _look(self) -> dict[str, Tensor]:
        images = pictures_of(self.settings, 2)
        frames, height, width = self.extent
        pixels = [self.pipe.video_processor.preprocess(i, height=height, width=width).float() for i in images]
        _, latents, *mask = self.pipe.prepare_latents(
            pixels[0].to(self.device), 1, self.pipe.vae.config.z_dim, height, width, frames, torch.float32, self.device,
            last_image=pixels[1].to(self.device) if len(pixels) > 1 else None,
        )  # fmt: skip
        told = {"latents": latents} | ({"free": mask[0]} if mask else {})
        if self.network.config.image_dim is not None:
            told["seen"] = self.pipe.encode_image(images[0] if len(images) == 1 else images, self.device)
        return {name: value.to(self.device) for name, value in told.items()}

    def inputs(self, x: Tensor, timestep: Tensor) -> dict[str, Any]:
        latents = self.told["latents"].to(x.dtype).expand(len(x), -1, -1, -1, -1)
        if self._by_token:
            free = self.told["free"].to(x.dtype)
            _, *patch = self.network.config.patch_size
            times = free[0, 0, :, :: patch[0], :: patch[1]].flatten()[None] * timestep[:, None]
            return {"hidden_states": self.twice((1 - free) * latents + free * x), "timestep": self.twice(times)}
        given = {"hidden_states": self.twice(torch.cat([x, latents], 1)), "timestep": self.twice(timestep)}
        if "seen" in self.told:
            seen = self.told["seen"].to(x.dtype)
            given["encoder_hidden_states_image"] = seen.repeat(len(given["hidden_states"]), 1, 1)
        return given

    def unpack(self, x: Tensor) -> Tensor:
        if not self._by_token:
            return x
        free = self.told["free"].to(x)
        return (1 - free) * self.told["latents"].to(x) + free * x


class LTXImage(LTX):
    """LTX from a first frame."""

    takes: ClassVar[tuple[str, ...]] = (*LTX.takes, "image")
    begins: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self._frame: Tensor | None = None

    def on(self, pipe: Any) -> LTXImage:
        other = type(self)(pipe, self.settings)
        other._frame = self.frame.to(pipe.transformer.device)
        return other

    def refuse(self) -> None:
        super().refuse()
        pictures_of(self.settings, 1)

    @property
    def frame(self) -> Tensor:
        """Latents of the first frame, packed, (1, tokens, c)."""
        if self._frame is None:
            factor = self.pipe.vae_spatial_compression_ratio
            height, width = (factor * side for side in self.latent_size[1:])
            (image,) = pictures_of(self.settings, 1)
            pixels = self.pipe.video_processor.preprocess(image, height=height, width=width)
            with torch.no_grad():
                latents = vae.encode(self.pipe.vae, (pixels[:, :, None] + 1) / 2)
            self._frame = self.pack(latents.to(self.device))
        return self._frame

    def with_frame(self, x: Tensor) -> Tensor:
        """States with the picture in place of their first frame."""
        tokens = self.frame.shape[1]
        return torch.cat([self.frame.to(x).expand(len(x), -1, -1), x[:, tokens:]], 1)

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        times = timestep[:, None].repeat(1, x.shape[1])
        times[:, : self.frame.shape[1]] = 0
        return super().predict(self.with_frame(x), times, cond)

    def unpack(self, x: Tensor) -> Tensor:
        return super().unpack(self.with_frame(x))
