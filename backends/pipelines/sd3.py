"""Stable Diffusion 3 and 3.5: a flow transformer on latents (16, h/8, w/8), two CLIPs and an optional T5.

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines.asked import call_default, check_prompts, sides, warn_of_long_prompts
from treesearch.backends.pipelines.family import BEGINS, Family
from treesearch.backends.pipelines.flow import shift, steps_from_below
from treesearch.backends.pipelines.parts import refuse_channels
from treesearch.backends.pipelines.settings import Settings
from treesearch.backends.pipelines.windows import Steps, skips


class StableDiffusion3(Family):
    """`SD3Transformer2DModel`, guided by two rows of the network."""

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")
    takes: ClassVar[tuple[str, ...]] = (
        *("guidance_rescale", "negative_prompt", "max_sequence_length", "sigmas", "clip_skip"),
        *("skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
        *BEGINS,
    )
    fills: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "return_dict", "skip_layers"),
    )
    scaled_by: ClassVar[str] = "joint_attention_kwargs"
    longest: ClassVar[int | None] = 512

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self._steps: Steps | None = None

    @property
    def state_shape(self) -> tuple[int, ...]:
        config, factor = self.network.config, self.pipe.vae_scale_factor
        default = self.pipe.default_sample_size * factor
        height, width = sides(self.pipe, self.settings, (default, default), config.patch_size * factor)
        return (config.in_channels, height // factor, width // factor)

    def refuse(self) -> None:
        super().refuse()
        refuse_channels(self.name, self.network, self.pipe.vae.config.latent_channels)
        self._refuse_skipping()
        config, (_, *sizes) = self.network.config, self.state_shape
        largest = config.pos_embed_max_size * config.patch_size
        if max(sizes) > largest:
            factor = self.pipe.vae_scale_factor
            height, width = (factor * size for size in sizes)
            raise ValueError(f"{height} x {width} pixels are more than {self.name} has positions for, expected sides "
                             f"of at most {factor * largest}")  # fmt: skip

    def _refuse_skipping(self) -> None:
        """Layers that there are, in a guided pass that begins at noise, and nothing said of them without any."""
        settings, default, layers = self.settings, Settings(), self.settings.skip_guidance_layers
        names = ("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop")
        if layers is None:
            for name in names:
                if getattr(settings, name) != getattr(default, name):
                    raise ValueError(f"{name} is of layers that are skipped: give them, skip_guidance_layers=[7, 8, 9]")
            return
        last = len(self.network.transformer_blocks) - 1
        if max(layers) > last:
            raise ValueError(f"skip_guidance_layers is {list(layers)}, expected some of 0..{last}")
        if not self.guided:
            raise ValueError(
                f"skip_guidance_layers has no effect at guidance_scale={self.guidance_scale:g}: leave it out"
            )
        if settings.image is not None:
            raise ValueError(
                f"{self.name} skips no layers where it begins at a picture: leave skip_guidance_layers out"
            )

    @property
    def rows_per_nfe(self) -> int:
        return super().rows_per_nfe + (self.settings.skip_guidance_layers is not None)

    def on_grid(self, schedule: Schedule) -> StableDiffusion3:
        other = copy.copy(self)
        other._steps = Steps(schedule)
        return other

    def on(self, pipe: Any) -> StableDiffusion3:
        other = type(self)(pipe, self.settings)
        other._steps = self._steps
        return other

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
        guided = self.guide(output)
        if (rows := self._skipping(timestep)) is None:
            return guided
        return guided + self._away(x, timestep, cond, output.chunk(2)[1], rows)

    def _skipping(self, timestep: Tensor) -> Tensor | None:
        """Rows (n,) at steps that are guided away from the network without some layers; None where there are none."""
        settings = self.settings
        if settings.skip_guidance_layers is None:
            return None
        if timestep.is_meta or self._steps is None:  # as much as a step may take
            return torch.ones_like(timestep, dtype=torch.bool)
        window, count = (settings.skip_layer_guidance_start, settings.skip_layer_guidance_stop), self._steps.count
        found = [skips(step, count, *window) for step in self._steps.of(timestep)]
        return torch.tensor(found, device=timestep.device) if any(found) else None

    def _away(self, x: Tensor, timestep: Tensor, cond: Cond, given: Tensor, rows: Tensor) -> Tensor:
        """What is added to a guided output (n, ...): nothing in the other rows."""
        assert cond is not None
        at = slice(None) if x.is_meta else rows
        weaker = self.network(
            hidden_states=x[at],
            timestep=timestep[at],
            encoder_hidden_states=cond["prompt_embeds"][at],
            pooled_projections=cond["pooled_embeds"][at],
            skip_layers=list(self.settings.skip_guidance_layers or ()),
            **self.settings.network_inputs,
            return_dict=False,
        )[0]
        away = (given[at] - weaker) * self.settings.skip_layer_guidance_scale
        return away if x.is_meta else torch.zeros_like(given).index_put((rows,), away)
