"""Unconditional pipelines: a U-Net on pixels in [-1, 1] (DDPM, DDIM).

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from backends.base import Cond
from backends.pipelines.family import Family, Settings, sides


class Unconditional(Family):
    """`UNet2DModel` on pixels; prompts reach the reward only."""

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        if settings.guidance_scale not in (None, 1):
            raise ValueError(f"{type(pipe).__name__} has nothing to guide by: leave guidance_scale out")
        self.guidance_scale = 1.0

    @property
    def state_shape(self) -> tuple[int, ...]:
        config = self.network.config
        side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        height, width = sides(self.pipe, self.settings, side, 2 ** (len(config.down_block_types) - 1))
        return (config.in_channels, height, width)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        return {}

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        output = self.network(x, timestep, **self.settings.network_inputs, return_dict=False)[0]
        return output[:, : x.shape[1]]  # a learned variance is not used
