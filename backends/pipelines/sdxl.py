"""Stable Diffusion XL: a second text encoder, and conditioning on size and crop; also its students Turbo and Lightning.

References:
    SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023), sec. 2.2.
    Adversarial Diffusion Distillation (Sauer et al., 2023). SDXL-Lightning (Lin et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.pipelines.asked import call_default, check_prompts, warn_of_long_prompts
from treesearch.backends.pipelines.settings import SIZES
from treesearch.backends.pipelines.stable_diffusion import TextUNet


class StableDiffusionXL(TextUNet):
    """SDXL; images are conditioned on being uncropped and of the size asked for, unless `sizes` says otherwise."""

    needs: ClassVar[tuple[str, ...]] = ("vae", "tokenizer_2", "text_encoder_2")
    takes: ClassVar[tuple[str, ...]] = (*TextUNet.takes, "sizes")
    fills: ClassVar[tuple[str, ...]] = (*TextUNet.fills, "added_cond_kwargs")

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        negative = self.negatives(texts)
        warn_of_long_prompts([*texts, *dict.fromkeys(negative or [])], self.pipe.tokenizer_2)
        text, no_text, pooled, no_pooled = self.pipe.encode_prompt(
            texts,
            device=self.device,
            do_classifier_free_guidance=self.guided,
            negative_prompt=negative,
            lora_scale=self.lora_scale,
            clip_skip=self.settings.clip_skip,
        )
        absent = (no_text, no_pooled) if self.guided else (None, None)
        return self.separate(["prompt_embeds", "pooled_embeds"], [text, pooled], absent) | self.pictured()

    def added(self, cond: Cond, rows: Tensor) -> dict[str, Any]:
        pooled = self.rows(cond, "pooled_embeds")
        told = self._sizes()
        if self.pipe.config.get("requires_aesthetics_score"):  # a refiner
            scores = [call_default(self.pipe, name, 0.0) for name in _SCORES[not self.guided :]]
            told = [[*sizes[:4], score] for sizes, score in zip(told, scores, strict=True)]
        times = torch.tensor(told, dtype=rows.dtype, device=rows.device)
        return {"text_embeds": pooled, "time_ids": times.repeat_interleave(len(rows) // len(times), 0)}

    def _sizes(self) -> list[list[float]]:
        """Original size, crop and target size of the rows of ∅ and of the prompts."""
        chosen, size = self.settings.sizes or {}, self.size
        default = dict(zip(SIZES, (size, (0, 0), size), strict=True))
        given = [float(side) for name in SIZES for side in chosen.get(name, default[name])]
        if not self.guided:
            return [given]
        if not {"negative_original_size", "negative_target_size"} <= set(chosen):  # as in the pipeline
            return [given, given]
        default = {"crops_coords_top_left": (0, 0)}
        absent = [float(side) for name in SIZES for side in chosen.get(f"negative_{name}", default.get(name, ()))]
        return [absent, given]


_SCORES = ("negative_aesthetic_score", "aesthetic_score")  # of the rows of ∅ and of the prompts
