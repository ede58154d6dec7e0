"""FLUX.1: a flow transformer on packed latents (h/16 · w/16, 64), guidance embedded (dev) or distilled away (schnell).

A state is what the pipeline calls packed latents: every 2 x 2 patch of (16, h/8, w/8) is a token. One row of x is one
row of the network. Conditioning is 512 tokens of T5, 4 MB a row in bfloat16, and a pooled CLIP vector.

References:
    FLUX.1 (Black Forest Labs, 2024). On Distillation of Guided Diffusion Models (Meng et al., 2023), embedded guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Shared
from treesearch.backends.pipelines.asked import call_default, check_prompts, sides, warn_of_long_prompts
from treesearch.backends.pipelines.family import BEGINS, Family
from treesearch.backends.pipelines.flow import even_grid, steps_from_below
from treesearch.backends.pipelines.parts import refuse_channels
from treesearch.backends.pipelines.settings import Settings


class Flux(Family):
    """`FluxTransformer2DModel`."""

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    takes: ClassVar[tuple[str, ...]] = ("max_sequence_length", "sigmas", *BEGINS)
    fills: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "timestep", "guidance", "encoder_hidden_states", "pooled_projections"),
        *("txt_ids", "img_ids", "return_dict"),
    )
    scaled_by: ClassVar[str] = "joint_attention_kwargs"
    longest: ClassVar[int | None] = 512

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        if settings.guidance_scale not in (None, 0, 1) and not self.network.config.guidance_embeds:
            raise ValueError("this model has its guidance distilled away: leave guidance_scale out")

    def refuse(self) -> None:
        super().refuse()
        refuse_channels(self.name, self.network, 4 * self.pipe.vae.config.latent_channels)

    @property
    def guided(self) -> bool:
        return False

    @property
    def patches(self) -> tuple[int, int]:
        """Tokens along the height and the width."""
        side = 2 * self.pipe.vae_scale_factor
        default = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        height, width = sides(self.pipe, self.settings, (default, default), side)
        return height // side, width // side

    @property
    def state_shape(self) -> tuple[int, ...]:
        height, width = self.patches
        return (height * width, 4 * self.pipe.vae.config.latent_channels)

    def grid(self, num_steps: int) -> dict[str, Any]:
        return even_grid(self.pipe.scheduler, num_steps, self.state_shape[0])

    def image_steps(self, num_steps: int, strength: float) -> int:
        return steps_from_below(num_steps, strength)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        length = self.settings.max_sequence_length or call_default(self.pipe, "max_sequence_length", 512)
        warn_of_long_prompts(texts, self.pipe.tokenizer_2, length)
        text, pooled, text_ids = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=None,
            device=self.device,
            max_sequence_length=length,
            lora_scale=self.lora_scale,
        )
        return {"prompt_embeds": text, "pooled_embeds": pooled, "text_ids": Shared(text_ids)}

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        text, pooled = self.rows(cond, "prompt_embeds"), self.rows(cond, "pooled_embeds")
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance_scale, dtype=torch.float32, device=x.device)
        assert cond is not None
        return self.network(
            hidden_states=self.told(x),
            timestep=timestep.to(x.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=cond["text_ids"],
            img_ids=self._image_ids(x),
            **self.settings.network_inputs,
            return_dict=False,
        )[0]

    def told(self, x: Tensor) -> Tensor:
        """What the network is told of states: themselves."""
        return x

    def _image_ids(self, x: Tensor) -> Tensor:
        """Row and column of every token, (tokens, 3)."""
        height, width = self.patches
        ids = torch.zeros(height, width, 3, device=x.device, dtype=x.dtype)
        ids[..., 1] += torch.arange(height, device=x.device)[:, None]
        ids[..., 2] += torch.arange(width, device=x.device)[None]
        return ids.reshape(-1, 3)

    def unpack(self, x: Tensor) -> Tensor:
        height, width = self.patches
        patches = x.reshape(len(x), height, width, -1, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 2 * height, 2 * width)

    def pack(self, latents: Tensor) -> Tensor:
        n, channels, height, width = latents.shape
        patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * channels)
