"""LTX-Video: a flow transformer on packed latents (f/8 · h/32 · w/32, 128), and one T5 with its mask.

A state is what the pipeline calls packed latents: every latent pixel of every latent frame is a token. Positions are
told in seconds and pixels, at the pipeline's own frame rate. Decoders that are conditioned on a time (0.9.1 on) are
told 0 and get latents without added noise, the defaults of the pipeline; those that draw noise themselves are refused,
since what a reward sees must depend on x_0 alone.

References:
    LTX-Video: Realtime Video Latent Diffusion (HaCohen et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.pipelines.asked import call_default, check_prompts, warn_of_long_prompts
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.flow import shift
from treesearch.backends.pipelines.parts import refuse_channels
from treesearch.backends.pipelines.settings import Settings
from treesearch.backends.pipelines.video import extent


class LTX(Family):
    """`LTXVideoTransformer3DModel`, guided by two rows of the network.

    Raises:
        ValueError: a decoder that draws noise, or a transformer that packs patches of its own.
    """

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    takes: ClassVar[tuple[str, ...]] = (
        "num_frames",
        "guidance_rescale",
        "negative_prompt",
        "max_sequence_length",
        "sigmas",
    )
    fills: ClassVar[tuple[str, ...]] = (
        *("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "num_frames"),
        *("height", "width", "rope_interpolation_scale", "return_dict"),
    )

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        if any(pipe.vae.config.get("decoder_inject_noise") or ()):
            raise ValueError("the decoder of this LTX draws noise (decoder_inject_noise), so that videos would differ "
                             "from call to call: use a checkpoint without it, such as 0.9.0 or 0.9.5")  # fmt: skip
        patch = (self.network.config.patch_size_t, self.network.config.patch_size)
        if patch != (1, 1):
            raise ValueError(f"this LTX packs patches of {patch} latents into a token, expected (1, 1)")

    def refuse(self) -> None:
        super().refuse()
        refuse_channels(self.name, self.network, self.pipe.vae.config.latent_channels)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        stride, factor = self.pipe.vae_temporal_compression_ratio, self.pipe.vae_spatial_compression_ratio
        frames, height, width = extent(self.pipe, self.settings, stride, factor, 32)
        return (frames - 1) // stride + 1, height // factor, width // factor

    @property
    def state_shape(self) -> tuple[int, ...]:
        frames, height, width = self.latent_size
        return (frames * height * width, self.network.config.in_channels)

    def grid(self, num_steps: int) -> dict[str, Any]:
        scheduler = self.pipe.scheduler
        if num_steps < 2 and scheduler.config.get("shift_terminal"):
            raise ValueError(
                f"num_steps is {num_steps}, expected at least 2: shift_terminal stretches a grid's last step"
            )
        even = np.linspace(1.0, 1 / num_steps, num_steps)
        return {"sigmas": even, "mu": shift(scheduler, self.state_shape[0])}

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        length = self.settings.max_sequence_length or call_default(self.pipe, "max_sequence_length", 128)
        warn_of_long_prompts(texts, self.pipe.tokenizer, length)
        text, mask, no_text, no_mask = self.pipe.encode_prompt(
            prompt=texts,
            negative_prompt=self.negatives(texts) or "",
            do_classifier_free_guidance=self.guided,
            max_sequence_length=length,
            device=self.device,
            dtype=self.network.dtype,
        )
        return self.separate(["prompt_embeds", "prompt_mask"], [text, mask], [no_text, no_mask])

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        frames, height, width = self.latent_size
        factor = self.pipe.vae_spatial_compression_ratio
        seconds = self.pipe.vae_temporal_compression_ratio / call_default(self.pipe, "frame_rate", 25)
        output = self.network(
            hidden_states=self.twice(x),
            timestep=self.twice(timestep),
            encoder_hidden_states=self.rows(cond, "prompt_embeds"),
            encoder_attention_mask=self.rows(cond, "prompt_mask"),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds, factor, factor),
            **self.settings.network_inputs,
            return_dict=False,
        )[0]
        return self.guide(output.float())

    def unpack(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, self.latent_size)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)
