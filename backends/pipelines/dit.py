"""DiT: a transformer on latents, conditioned on a class; prompts are class names or numbers.

The network returns ε and a variance (2C channels); the variance is not used, as in the pipeline.

References:
    Scalable Diffusion Models with Transformers (Peebles and Xie, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Shared
from treesearch.backends.pipelines.asked import sides
from treesearch.backends.pipelines.family import BEGINS, Family
from treesearch.backends.pipelines.parts import refuse_channels


class DiT(Family):
    """Class-conditional `DiTTransformer2DModel`."""

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae",)
    takes: ClassVar[tuple[str, ...]] = BEGINS
    fills: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "class_labels", "return_dict")

    def refuse(self) -> None:
        super().refuse()
        refuse_channels(self.name, self.network, self.pipe.vae.config.latent_channels)

    @property
    def state_shape(self) -> tuple[int, ...]:
        config, factor = self.network.config, 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        side = config.sample_size * factor
        height, width = sides(self.pipe, self.settings, (side, side), config.patch_size * factor)
        if (height, width) != (side, side):
            raise ValueError(f"this DiT draws {side} x {side} pixels, got {height} x {width}")
        return (config.in_channels, config.sample_size, config.sample_size)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        classes = torch.tensor([self._class(p) for p in prompts], device=self.device)
        # The table of embeddings ends with that of "no class".
        absent = torch.tensor([self.network.config.num_embeds_ada_norm], device=self.device)
        return {"class_labels": classes, "negative_class_labels": Shared(absent)}

    def _class(self, prompt: Any) -> int:
        count, names = self.network.config.num_embeds_ada_norm, getattr(self.pipe, "labels", None) or {}
        number = int(prompt) if isinstance(prompt, str) and prompt.isdecimal() else prompt
        if isinstance(number, int) and 0 <= number < count:
            return number
        if prompt in names:
            return names[prompt]
        near = get_close_matches(str(prompt), list(names), n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{prompt!r} is no class of this model, expected a name or 0..{count - 1}{hint}")

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        labels = self.rows(cond, "class_labels")
        output = self.network(
            self.twice(x),
            timestep=self.twice(timestep),
            class_labels=labels,
            **self.settings.network_inputs,
            return_dict=False,
        )[0]
        return self.guide(output[:, : x.shape[1]])
