"""Unconditional pipelines: a U-Net on pixels in [-1, 1] (DDPM, DDIM).

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.pipelines.asked import both_sides, sides
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.settings import Settings


class Unconditional(Family):
    """`UNet2DModel` on pixels; prompts reach the reward only."""

    fills: ClassVar[tuple[str, ...]] = ("sample", "timestep", "return_dict")

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self.guidance_scale = 1.0

    @classmethod
    def check(cls, name: str, settings: Settings, parts: Collection[str]) -> None:
        super().check(name, settings, parts)
        if settings.guidance_scale not in (None, 1):
            raise ValueError(f"{name} has nothing to guide by: leave guidance_scale out")

    @property
    def state_shape(self) -> tuple[int, ...]:
        config = self.network.config
        # The U-Net halves its pixels once a block but the last.
        halvings = 2 ** (len(config.down_block_types) - 1)
        height, width = sides(self.pipe, self.settings, both_sides(config.sample_size), halvings)
        return (config.in_channels, height, width)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        return {}

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        output = self.network(x, timestep, **self.settings.network_inputs, return_dict=False)[0]
        return output[:, : x.shape[1]]  # a learned variance is not used
