"""Stable Diffusion 3 and 3.5: a flow transformer on latents (16, h/8, w/8), two CLIPs and an optional T5.

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.pipelines.family import (
    BEGINS,
    Family,
    call_default,
    check_prompts,
    sides,
    warn_of_long_prompts,
)
from treesearch.backends.pipelines.flow import shift, steps_from_below
from treesearch.backends.pipelines.parts import refuse_channels


class StableDiffusion3(Family):
    """`SD3Transformer2DModel`, guided by two rows of the network."""

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    takes: ClassVar[tuple[str, ...]] = (
        *("guidance_rescale", "negative_prompt", "max_sequence_length", "sigmas", "clip_skip"),
        *BEGINS,
    )
    fills: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "return_dict"),
    )
    scaled_by: ClassVar[str] = "joint_attention_kwargs"
    longest: ClassVar[int | None] = 512

    @property
    def state_shape(self) -> tuple[int, ...]:
        config, factor = self.network.config, self.pipe.vae_scale_factor
        default = self.pipe.default_sample_size * factor
        height, width = sides(self.pipe, self.settings, (default, default), config.patch_size * factor)
        return (config.in_channels, height // factor, width // factor)

    def refuse(self) -> None:
        super().refuse()
        refuse_channels(self.name, self.network, self.pipe.vae.config.latent_channels)
        config, (_, *sizes) = self.network.config, self.state_shape
        largest = config.pos_embed_max_size * config.patch_size
        if max(sizes) > largest:
            factor = self.pipe.vae_scale_factor
            height, width = (factor * size for size in sizes)
            raise ValueError(f"{height} x {width} pixels are more than {self.name} has positions for, expected sides "
                             f"of at most {factor * largest}")  # fmt: skip

    def grid(self, num_steps: int) -> dict[str, Any]:
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = self.network.config.patch_size
        _, height, width = self.state_shape
        return {"mu": shift(self.pipe.scheduler, (height // patch) * (width // patch), max_shift=1.16)}

    def image_steps(self, num_steps: int, strength: float) -> int:
        return steps_from_below(num_steps, strength)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        length = self.settings.max_sequence_length or call_default(self.pipe, "max_sequence_length", 256)
        if self.pipe.tokenizer_3 is None:
            warn_of_long_prompts(texts, self.pipe.tokenizer)
        else:
            warn_of_long_prompts(texts, self.pipe.tokenizer_3, length)
        text, no_text, pooled, no_pooled = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=self.guided,
            negative_prompt=self.negatives(texts) or "",
            lora_scale=self.lora_scale,
            clip_skip=self.settings.clip_skip,
            max_sequence_length=length,
        )
        absent = (no_text, no_pooled) if self.guided else (None, None)
        return self.separate(["prompt_embeds", "pooled_embeds"], [text, pooled], absent)

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        output = self.network(
            hidden_states=self.twice(x),
            timestep=self.twice(timestep),
            encoder_hidden_states=self.rows(cond, "prompt_embeds"),
            pooled_projections=self.rows(cond, "pooled_embeds"),
            **self.settings.network_inputs,
            return_dict=False,
        )[0]
        return self.guide(output)
