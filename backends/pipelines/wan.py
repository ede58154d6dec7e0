"""Wan 2.1 and 2.2, text to video: a flow transformer on latents (16, f/4, h/8, w/8), and one T5 (UMT5).

Wan 2.2 A14B has two experts: `transformer` where the timestep is at least boundary_ratio · N, `transformer_2` below.
Rows of both kinds share a batch, and each meets its own expert once, under one scale or its own (`guidance_scale_2`).
Wan 2.2 TI2V tells the time of every token, which is one and the same without an input image, and so is told once. The
pipeline's UniPC gives its grid of flow sigmas; the solver itself, which has memory, is not used.

References:
    Wan: Open and Advanced Large-Scale Video Generative Models (Wan Team, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.base.taps import on_rows
from treesearch.backends.pipelines.asked import call_default, check_prompts, warn_of_long_prompts
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.parts import refuse_adapters, refuse_channels
from treesearch.backends.pipelines.settings import Settings
from treesearch.backends.pipelines.video import extent


class Wan(Family):
    """`WanTransformer3DModel`, guided by two rows of the network.

    Raises:
        ValueError: a boundary without a second expert.
    """

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    takes: ClassVar[tuple[str, ...]] = (
        *("num_frames", "negative_prompt", "max_sequence_length"),
        "guidance_scale_2",
        "sigmas",
    )
    fills: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "encoder_hidden_states", "return_dict")

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        ratio = pipe.config.get("boundary_ratio")
        if ratio is not None and pipe.transformer_2 is None:
            raise ValueError(f"boundary_ratio is {ratio}, but there is no transformer_2 below it: load it, or set None")
        self.boundary = None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.network,) if self.boundary is None else (self.network, self.pipe.transformer_2)

    @property
    def state_shape(self) -> tuple[int, ...]:
        config = self.network.config
        stride, factor = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        frames, height, width = self.extent
        return (config.in_channels, (frames - 1) // stride + 1, height // factor, width // factor)

    @property
    def extent(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels."""
        stride, factor = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        _, *patch = self.network.config.patch_size
        return extent(self.pipe, self.settings, stride, *(factor * side for side in patch), 16)

    def refuse(self) -> None:
        super().refuse()
        for expert in (self.pipe.transformer, self.pipe.transformer_2):
            if expert is not None:
                refuse_channels(self.name, expert, self.pipe.vae.config.z_dim)
                refuse_adapters(self.name, expert, self.settings.network_inputs)
        self.refuse_size()

    def refuse_size(self) -> None:
        """Refuse videos that are longer or larger than the network has positions for.

        Raises:
            ValueError: they are.
        """
        config = self.network.config
        tokens = [size // part for size, part in zip(self.state_shape[1:], config.patch_size, strict=True)]
        if max(tokens) > config.rope_max_seq_len:
            raise ValueError(f"the video has {tokens} tokens along frames, height and width, and {self.name} positions "
                             f"for {config.rope_max_seq_len}: make it smaller")  # fmt: skip

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        length = self.settings.max_sequence_length or call_default(self.pipe, "max_sequence_length", 512)
        warn_of_long_prompts(texts, self.pipe.tokenizer, length)
        text, absent = self.pipe.encode_prompt(
            prompt=texts,
            negative_prompt=self.negatives(texts) or "",
            do_classifier_free_guidance=self.guided,
            max_sequence_length=length,
            device=self.device,
            dtype=self.network.dtype,
        )
        return self.separate(["prompt_embeds"], [text], [absent])

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        text = self.rows(cond, "prompt_embeds")
        early = None if self.boundary is None else timestep >= self.boundary
        if early is None or early.all():
            return self._evaluate(self.network, x, timestep, text)
        output = torch.empty_like(x)
        for expert, rows in ((self.network, early), (self.pipe.transformer_2, ~early)):
            if rows.any():
                with on_rows(rows):
                    output[rows] = self._evaluate(expert, x[rows], timestep[rows], text[self.twice(rows)])
        return output

    def _evaluate(self, expert: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        output = expert(
            encoder_hidden_states=text,
            **self.inputs(x, timestep),
            **self.settings.network_inputs,
            return_dict=False,
        )[0]
        second = self.settings.guidance_scale_2 if expert is not self.network else None
        return self.guide(output, second)

    def inputs(self, x: Tensor, timestep: Tensor) -> dict[str, Any]:
        """What the network is told beside the text."""
        return {"hidden_states": self.twice(x), "timestep": self.twice(timestep)}
