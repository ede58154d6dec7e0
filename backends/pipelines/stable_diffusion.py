"""Stable Diffusion 1.x and 2.x, with or without ControlNets, and its few-step students (LCM).

A U-Net on latents (4, h/8, w/8), conditioned on 77 tokens of CLIP. Students take the guidance scale as an embedding of
the time step, so that a row is one row of the network.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022).
    Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023).
    Latent Consistency Models (Luo et al., 2023), sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from backends.base import Cond
from backends.pipelines.family import Family, Settings, check_prompts, separate, sides, warn_of_long_prompts


class TextUNet(Family):
    """A text-conditioned U-Net on VAE latents; `StableDiffusion` and `StableDiffusionXL` differ in their encoders."""

    needs: ClassVar[tuple[str, ...]] = ("vae", "tokenizer", "text_encoder")
    takes: ClassVar[tuple[str, ...]] = ("guidance_rescale", "negative_prompt", "clip_skip", "control_image")

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self.controlnet: Any = getattr(pipe, "controlnet", None)
        if (self.controlnet is None) != (settings.control_image is None):
            what = "needs a control_image" if self.controlnet is not None else "has no ControlNet for a control_image"
            raise ValueError(f"{type(pipe).__name__} {what}")
        self._control: Any = None

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1 and self.network.config.time_cond_proj_dim is None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        side = self.network.config.sample_size
        side = side if isinstance(side, int) else side[0]
        factor = self.pipe.vae_scale_factor
        # The U-Net halves the latents once a block but the last.
        return sides(
            self.pipe, self.settings, side * factor, factor * 2 ** (len(self.network.config.down_block_types) - 1)
        )

    @property
    def state_shape(self) -> tuple[int, ...]:
        height, width = self.size
        factor = self.pipe.vae_scale_factor
        return (self.pipe.vae.config.latent_channels, height // factor, width // factor)

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        text, rows, at = self.rows(cond, "prompt_embeds"), self.twice(x), self.twice(timestep)
        inputs: dict[str, Any] = {"encoder_hidden_states": text, "timestep_cond": self._embedded_scale(rows)}
        if added := self.added(cond, rows):
            inputs["added_cond_kwargs"] = added
        if self.controlnet is not None:
            inputs |= self._controlled(rows, at, text, inputs.get("added_cond_kwargs"))
        return self.guide(self.network(rows, at, **inputs, **self.settings.network_inputs, return_dict=False)[0])

    def added(self, cond: Cond, rows: Tensor) -> dict[str, Tensor]:
        """Conditioning beside the text."""
        return {}

    def _embedded_scale(self, rows: Tensor) -> Tensor | None:
        size = self.network.config.time_cond_proj_dim
        if size is None:
            return None
        scale = torch.full((len(rows),), self.guidance_scale - 1)
        return self.pipe.get_guidance_scale_embedding(scale, embedding_dim=size).to(rows)

    def _controlled(self, rows: Tensor, at: Tensor, text: Tensor, added: Any) -> dict[str, Any]:
        """What the ControlNet adds to the U-Net's skips."""
        if self._control is None:
            height, width = self.size
            image = self.settings.control_image
            images = [_opened(i) for i in (image if isinstance(image, (list, tuple)) else [image])]
            ready = [
                self.pipe.prepare_image(i, width, height, 1, 1, rows.device, self.controlnet.dtype) for i in images
            ]
            self._control = ready if isinstance(image, (list, tuple)) else ready[0]
        control = self._control
        shape = (len(rows), -1, -1, -1)
        control = [c.expand(shape) for c in control] if isinstance(control, list) else control.expand(shape)
        scale = self.settings.control_scale
        down, mid = self.controlnet(
            rows,
            at,
            encoder_hidden_states=text,
            controlnet_cond=control,
            conditioning_scale=[scale] * len(control) if isinstance(control, list) else scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _opened(image: Any) -> Any:
    """An image, from its file if need be."""
    if not isinstance(image, str):
        return image
    from PIL import Image

    return Image.open(image).convert("RGB")


class StableDiffusion(TextUNet):
    """Stable Diffusion 1.x and 2.x."""

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        warn_of_long_prompts([*texts, self.settings.negative_prompt or ""], self.pipe.tokenizer)
        if self.settings.clip_skip is not None and not hasattr(self.pipe.text_encoder, "text_model"):
            raise ValueError(
                "clip_skip needs a text encoder with a `text_model`, which transformers 5 does not give it"
            )
        negative = None if self.settings.negative_prompt is None else [self.settings.negative_prompt] * len(texts)
        embeds = self.pipe.encode_prompt(
            texts, self.device, 1, self.guided, negative, clip_skip=self.settings.clip_skip
        )
        return separate(["prompt_embeds"], embeds[:1], embeds[1:])
