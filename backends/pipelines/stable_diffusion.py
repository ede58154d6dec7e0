"""Stable Diffusion 1.x and 2.x, with or without ControlNets, and its few-step students (LCM).

A U-Net on latents (4, h/8, w/8), conditioned on 77 tokens of CLIP. Students take the guidance scale as an embedding of
the time step, so that a row is one row of the network.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022).
    Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023).
    Latent Consistency Models (Luo et al., 2023), sec. 4.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import image_prompts, masks
from treesearch.backends.pipelines.asked import both_sides, check_prompts, sides, warn_of_long_prompts
from treesearch.backends.pipelines.family import BEGINS, Family
from treesearch.backends.pipelines.parts import refuse_channels, unwrapped
from treesearch.backends.pipelines.settings import Settings
from treesearch.backends.pipelines.windows import Controls


class TextUNet(Family):
    """A text-conditioned U-Net on VAE latents; `StableDiffusion` and `StableDiffusionXL` differ in their encoders."""

    needs: ClassVar[tuple[str, ...]] = ("vae", "tokenizer", "text_encoder")
    takes: ClassVar[tuple[str, ...]] = (
        *("guidance_rescale", "negative_prompt", "clip_skip", "control_image"),
        *("control_guidance_start", "control_guidance_end", "ip_adapter_image"),
        *BEGINS,
    )
    fills: ClassVar[tuple[str, ...]] = (
        *("sample", "timestep", "encoder_hidden_states", "timestep_cond", "return_dict"),
        *("down_block_additional_residuals", "mid_block_additional_residual"),
    )
    scaled_by: ClassVar[str] = "cross_attention_kwargs"

    def __init__(self, pipe: Any, settings: Settings) -> None:
        super().__init__(pipe, settings)
        self.controlnet: Any = getattr(pipe, "controlnet", None)
        self._control: Any = None
        self._windows: Controls | None = None
        self._seen: Tensor | None = None
        if settings.ip_adapter_image is not None:
            self.unread = ("safety_checker",)

    def refuse(self) -> None:
        super().refuse()
        if not self.sees:
            refuse_channels(self.name, self.network, self.pipe.vae.config.latent_channels)
        if self.settings.ip_adapter_image is not None:
            image_prompts.refuse(self.name, self.pipe, self.settings.ip_adapter_image)
        if self.controlnet is not None:
            settings, nets = self.settings, getattr(self.controlnet, "nets", [self.controlnet])
            _check_controlnets(self.controlnet, settings.control_image, self.control_scale)
            self._windows = Controls(settings.control_guidance_start, settings.control_guidance_end, len(nets))

    def on_grid(self, schedule: Schedule) -> TextUNet:
        other = copy.copy(self)
        other._windows = None if self._windows is None else self._windows.on(schedule)
        return other

    @classmethod
    def check(cls, name: str, settings: Settings, parts: Collection[str]) -> None:
        super().check(name, settings, parts)
        controlled = "controlnet" in parts
        if controlled != (settings.control_image is not None):
            what = "needs a control_image" if controlled else "has no ControlNet for a control_image"
            raise ValueError(f"{name} {what}")
        if not controlled and (settings.control_guidance_start, settings.control_guidance_end) != (0, 1):
            raise ValueError(f"{name} has no ControlNet for a control_guidance_start or a control_guidance_end")

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1 and self.network.config.time_cond_proj_dim is None

    @property
    def sees(self) -> bool:
        """Whether the U-Net is one that fills in: of 2c + 1 channels, for latents, a mask and what it leaves."""
        filling = self.network.config.in_channels == 2 * self.pipe.vae.config.latent_channels + 1
        return filling and self.settings.mask is not None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = both_sides(self.network.config.sample_size)
        factor = self.pipe.vae_scale_factor
        # The U-Net takes latents of any size: it enlarges each to that of its skip. 8 is what the pipelines check.
        return sides(self.pipe, self.settings, (height * factor, width * factor), factor, 8)

    @property
    def state_shape(self) -> tuple[int, ...]:
        height, width = self.size
        factor = self.pipe.vae_scale_factor
        return (self.pipe.vae.config.latent_channels, height // factor, width // factor)

    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        text, rows, at = self.rows(cond, "prompt_embeds"), self.twice(x), self.twice(timestep)
        told = torch.cat([rows, self._beside().expand(len(rows), -1, -1, -1)], 1) if self.sees else rows
        inputs: dict[str, Any] = {"encoder_hidden_states": text, "timestep_cond": self._embedded_scale(rows)}
        added = self.added(cond, rows)
        if self.settings.ip_adapter_image is not None:
            added = added | image_prompts.told(cond or {}, rows)
        if added:
            inputs["added_cond_kwargs"] = added
        if self.controlnet is not None:
            inputs |= self._controlled(rows, at, text, inputs.get("added_cond_kwargs"), self._scales(at))
        return self.guide(self.network(told, at, **inputs, **self.settings.network_inputs, return_dict=False)[0])

    def on(self, pipe: Any) -> TextUNet:
        other = type(self)(pipe, self.settings)
        other._windows = self._windows
        other._seen = self._beside() if self.sees else None
        return other

    def _beside(self) -> Tensor:
        """A mask and the latents of what it leaves, (1, 1 + c, h, w)."""
        if self._seen is None:
            drawn, latents = masks.left(self, self.settings.image, self.settings.mask)
            small = torch.nn.functional.interpolate(drawn, size=latents.shape[-2:])
            self._seen = torch.cat([small, latents], 1).to(self.network.dtype)
        return self._seen.to(self.device)

    def added(self, cond: Cond, rows: Tensor) -> dict[str, Any]:
        """Conditioning beside the text."""
        return {}

    def pictured(self) -> dict[str, Any]:
        """What IP-Adapters are told, for all prompts."""
        pictures = self.settings.ip_adapter_image
        if pictures is None:
            return {}
        return image_prompts.encoded(self.pipe, pictures, self.device, guided=self.guided)

    def _embedded_scale(self, rows: Tensor) -> Tensor | None:
        size = self.network.config.time_cond_proj_dim
        if size is None:
            return None
        with torch.device("cpu"):  # the pipeline's own function names none
            scale = torch.full((len(rows),), self.guidance_scale - 1, dtype=torch.float32)
            return self.pipe.get_guidance_scale_embedding(scale, embedding_dim=size).to(rows)

    def _scales(self, timestep: Tensor) -> list[Any]:
        """Of each ControlNet, its weight in rows at timesteps (n,): a number, or (n, 1, 1, 1) where rows differ."""
        assert self._windows is not None
        open_, scale = self._windows.of(timestep), self.control_scale
        scales = scale if isinstance(scale, list) else [scale] * len(open_[0])
        if len(set(open_)) == 1:
            return [scale * taken for scale, taken in zip(scales, open_[0], strict=True)]
        taken = torch.tensor(open_, dtype=self.controlnet.dtype, device=timestep.device)
        return [scale * column.reshape(-1, 1, 1, 1) for scale, column in zip(scales, taken.unbind(1), strict=True)]

    def _controlled(self, rows: Tensor, at: Tensor, text: Tensor, added: Any, scales: list[Any]) -> dict[str, Any]:
        """What the ControlNet adds to the U-Net's skips."""
        if self._control is None:
            height, width = self.size
            image = self.settings.control_image
            images = [_opened(i) for i in (image if isinstance(image, (list, tuple)) else [image])]
            prepare = self.pipe.control_image_processor.preprocess
            ready = [prepare(i, height=height, width=width).to(rows.device, self.controlnet.dtype) for i in images]
            self._control = ready if isinstance(image, (list, tuple)) else ready[0]
        control = self._control
        shape = (len(rows), -1, -1, -1)
        control = [c.expand(shape) for c in control] if isinstance(control, list) else control.expand(shape)
        scale = scales if isinstance(control, list) else scales[0]
        down, mid = self.controlnet(
            rows,
            at,
            encoder_hidden_states=text,
            controlnet_cond=control,
            conditioning_scale=scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _check_controlnets(controlnet: Any, image: Any, scale: float | list[float]) -> None:
    """One image a ControlNet, one scale or one each, and none that wants more than images."""
    nets = list(getattr(controlnet, "nets", [controlnet]))
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(nets) != len(images):
        raise ValueError(f"{len(images)} control images for {len(nets)} ControlNets: give one each")
    if isinstance(scale, list) and (not isinstance(image, (list, tuple)) or len(scale) != len(nets)):
        raise ValueError(
            f"{len(scale)} values of control_scale for {len(nets)} ControlNets: give one each, or a number"
        )
    for net in map(unwrapped, nets):
        if type(net).__name__ != "ControlNetModel":
            raise ValueError(f"{type(net).__name__} needs more than an image: use a ControlNetModel")
        if net.config.get("global_pool_conditions"):
            raise ValueError("a ControlNet with global_pool_conditions reaches one half of the guidance only, which "
                             "is not supported: use one without it")  # fmt: skip


def _opened(image: Any) -> Any:
    """An image, from its file if need be."""
    if not isinstance(image, str):
        return image
    from PIL import Image

    return Image.open(image).convert("RGB")


class StableDiffusion(TextUNet):
    """Stable Diffusion 1.x and 2.x."""

    def refuse(self) -> None:
        super().refuse()
        if self.settings.clip_skip is not None and not hasattr(self.pipe.text_encoder, "text_model"):
            raise ValueError(
                "clip_skip needs a text encoder with a `text_model`, which transformers 5 does not give it"
            )

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        texts = check_prompts(prompts)
        negative = self.negatives(texts)
        warn_of_long_prompts([*texts, *dict.fromkeys(negative or [])], self.pipe.tokenizer)
        embeds = self.pipe.encode_prompt(
            texts,
            self.device,
            1,
            self.guided,
            negative,
            lora_scale=self.lora_scale,
            clip_skip=self.settings.clip_skip,
        )
        return self.separate(["prompt_embeds"], embeds[:1], embeds[1:]) | self.pictured()


class LatentConsistency(StableDiffusion):
    """Students of few steps; from an image they take all T steps, of the part of the grid below its noise."""

    def image_schedule(self, schedule: Schedule, strength: float) -> Schedule:
        if not type(self.pipe.scheduler).__name__.startswith("LCM") or strength == 0:
            return super().image_schedule(schedule, strength)
        return Schedule.of(self.pipe.scheduler, schedule.num_steps, strength=strength)
