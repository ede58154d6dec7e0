"""What is drawn of the states of a pipeline that runs by its own call, and the states of pictures."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.pipelines import masks, vae
from treesearch.backends.pipelines.calls import Stage
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.listed import Row
from treesearch.backends.pipelines.said import Said

ANY = 2  # steps of a grid that is not used: some have none of a single one


class Shown(Family):
    """The part of `called.Called` behind its chain."""

    row: Row
    _said: Said
    _shapes: list[tuple[int, ...]]

    @abstractmethod
    def _stage(self, *args: Any, **kwargs: Any) -> Stage: ...

    @abstractmethod
    def _example(self) -> dict[str, Any]: ...

    @abstractmethod
    def _call(self, x: Tensor, inputs: Mapping[str, Any], stage: Stage) -> Any: ...

    def draw(self, x0: Tensor, batch: int, decoder: Any = None) -> Tensor:
        if decoder is not None:
            raise ValueError(f"{self.name} has no previews: leave preview out")
        parts = []
        for part in x0.split(1 if self.row.alone else batch):
            keeps = part.requires_grad and torch.is_grad_enabled()
            parts.append(checkpoint(self._draw, part, use_reentrant=False) if keeps else self._draw(part))
        return torch.cat(parts)

    def _draw(self, x0: Tensor) -> Tensor:
        found = self._decoded(x0)[0].float()
        found = vae.to_unit(found) if self.row.raw else found
        return vae.over_white(found) if found.ndim == 4 and found.shape[1] == 4 else found

    def _decoded(self, x0: Tensor) -> list[Any]:
        """What the call returns for states: pictures, and sound where there is some."""
        n, cond = len(x0), self._example()
        stage = self._stage(x0.new_empty(0), self._said.told(cond, [0] * n, n))
        with Quiet(self._decoder):  # here: a checkpoint calls this again for the gradient
            done = self._call(x0.to(self._decoder.dtype), {"num_inference_steps": ANY, "output_type": "pt"}, stage)
        return tree_flatten(tuple(done.values()))[0]

    @property
    def _decoder(self) -> Any:
        found = getattr(self.pipe, "vae", None)
        return self.pipe.movq if found is None else found

    @property
    def sound_rate(self) -> int | None:
        if self.row.sound:
            config = self.pipe.vae.config
            return config["sampling_rate" if "sampling_rate" in config else "sample_rate"]
        return self.pipe.vocoder.config.output_sampling_rate if len(self._shapes) > 1 else None

    @property
    def sample_range(self) -> tuple[float, float] | None:
        return None if self.row.sound else super().sample_range

    def sound(self, x0: Tensor, batch: int) -> Tensor:
        if self.row.sound:
            return self.draw(x0, batch)
        return torch.cat([self._decoded(part)[1].float() for part in x0.split(batch)])

    def state_of(self, image: Any) -> Tensor:
        if not self.row.runs:
            return super().state_of(image)
        return self.pack(vae.encode(self.pipe.vae, pixels_of(image, 3, self._pixels)[None]))[0].to(self.device)

    def free(self, mask: Any) -> Tensor:
        height, width = (side // vae.factor(self.pipe) for side in self._pixels)
        small = torch.nn.functional.interpolate(masks.white(mask, self._pixels), size=(height, width))
        channels = math.prod(self.state_shape) // (height * width)
        return self.pack(small.expand(1, channels, height, width)).to(self.device)

    def pack(self, latents: Tensor) -> Tensor:
        return latents if len(self.state_shape) == 3 else self.pipe._pack_latents(latents, *latents.shape)

    @property
    def _pixels(self) -> tuple[int, int]:
        """Height and width of a picture."""
        image, settings = self.settings.image, self.settings
        return settings.height or image.height, settings.width or image.width
