"""What a family of pipelines adds to the chain: states, conditioning, one network call, images.

The pipeline's own methods encode prompts and hold the weights; its `__call__`, its scheduler's `step` and its safety
checker are not used. A family is read beside the loop of its pipeline in diffusers, which it must equal.

    ε̃ = ε(∅) + w (ε(c) - ε(∅))                    one batched call of 2n rows, 1 NFE a row of x
    ε̃ ← φ ε̃ std(ε(c)) / std(ε̃) + (1 - φ) ε̃        guidance rescale φ

References:
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), eq. 6.
    Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), eqs. 15-16.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from backends.base import Cond, Shared


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses for a pipeline; None takes the pipeline's own default.

    Args:
        height, width: of the images, in pixels.
        num_frames: of videos.
        guidance_scale: w; 1 or less is unguided. Distilled models read it as an input.
        guidance_rescale: φ in [0, 1].
        negative_prompt: what ∅ says.
        max_sequence_length: tokens of a T5 encoder.
        clip_skip: layers to leave out at the end of CLIP's text encoder.
        control_image: input of a ControlNet: an image, or one a ControlNet.
        control_scale: weight of what the ControlNet adds.
        network_inputs: handed to every network call as they are, such as {"cross_attention_kwargs": {"scale": 0.5}}.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    clip_skip: int | None = None
    control_image: Any = None
    control_scale: float = 1.0
    network_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.guidance_rescale}, expected 0..1")
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= 512:
            raise ValueError(f"max_sequence_length is {self.max_sequence_length}, expected 1..512")


class Family(ABC):
    """One family of pipelines.

    Args:
        pipe: the diffusers pipeline.
        settings: the user's choices.
    """

    network_name: ClassVar[str] = "unet"
    needs: ClassVar[tuple[str, ...]] = ()  # components without which it cannot run, beside the network
    takes: ClassVar[tuple[str, ...]] = ()  # settings that it reads beside sizes

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        default = Settings()
        optional = (
            "guidance_rescale",
            "negative_prompt",
            "max_sequence_length",
            "clip_skip",
            "control_image",
            "num_frames",
        )
        for name in optional:
            if name not in self.takes and getattr(settings, name) != getattr(default, name):
                raise ValueError(f"{type(pipe).__name__} takes no {name}")
        if settings.control_scale != 1 and getattr(pipe, "controlnet", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no ControlNet for a control_scale")
        scale = settings.guidance_scale
        if scale is not None and not (isinstance(scale, (int, float)) and scale >= 0):
            raise ValueError(f"guidance_scale is {scale!r}, expected a number >= 0; 1 or less is unguided")
        self.guidance_scale = float(call_default(pipe, "guidance_scale", 1.0) if scale is None else scale)
        if settings.negative_prompt is not None and not self.guided:
            raise ValueError(f"negative_prompt has no effect at guidance_scale={self.guidance_scale:g}: leave it out")
        self._kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def network(self) -> Any:
        """The denoiser, a module of diffusers."""
        return getattr(self.pipe, self.network_name)

    @property
    def device(self) -> torch.device:
        """Where the network is; other parts of the pipeline may be elsewhere."""
        return self.network.device

    @property
    def guided(self) -> bool:
        """Whether a row takes two rows of the network."""
        return self.guidance_scale > 1

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one state.

        Raises:
            ValueError: a size that the model cannot take; the message names the nearest one that it can.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning: rows (n, ...) and `Shared` values."""

    @abstractmethod
    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The network's output (n, *state), guided, for x (n, *state) in the network's dtype and timestep (n,)."""

    def grid(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline hands to its scheduler's `set_timesteps`, beside the number of steps."""
        return {}

    def unpack(self, x: Tensor) -> Tensor:
        """Latents that the decoder takes, from states."""
        return x

    def pack(self, latents: Tensor) -> Tensor:
        """States, from latents of the encoder."""
        return latents

    def rows(self, cond: Cond, name: str) -> Tensor:
        """Conditioning of the network's rows: those of ∅ before those of the prompts, where a batch is guided.

        Rows are joined once for as long as the engine hands in the same tensors.
        """
        if cond is None or name not in cond:
            raise ValueError(f"{type(self.pipe).__name__} needs prompts: prompts=[...], or prompts=[''] for no text")
        given = cond[name]
        if not self.guided:
            return given
        absent = cond[f"negative_{name}"]
        kept = self._kept.get(name)
        if kept is None or kept[0] is not given or kept[1] is not absent:
            kept = (given, absent, torch.cat([absent.expand(len(given), *absent.shape[1:]), given]))
            self._kept[name] = kept
        return kept[2]

    def guide(self, output: Tensor) -> Tensor:
        """ε̃ (n, ...) from the network's output on its rows."""
        if not self.guided:
            return output
        absent, given = output.chunk(2)
        guided = absent + self.guidance_scale * (given - absent)
        if self.settings.guidance_rescale:
            axes = tuple(range(1, guided.ndim))
            scale = given.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
            guided = guided * (1 + self.settings.guidance_rescale * (scale - 1))
        return guided

    def twice(self, x: Tensor) -> Tensor:
        """The network's rows of x."""
        return torch.cat([x, x]) if self.guided else x


def separate(
    names: Sequence[str], embeds: Sequence[Tensor | None], negative: Sequence[Tensor | None]
) -> dict[str, Any]:
    """Rows of the prompts, and one shared row of ∅ for each."""
    out: dict[str, Any] = dict(zip(names, embeds, strict=True))
    for name, value in zip(names, negative, strict=True):
        if value is not None:
            out[f"negative_{name}"] = Shared(value[:1].clone())
    return out


def call_default(pipe: Any, name: str, otherwise: Any) -> Any:
    """The default of an argument of the pipeline's own `__call__`."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return otherwise if parameter is None or parameter.default in (None, inspect.Parameter.empty) else parameter.default


def sides(pipe: Any, settings: Settings, default: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        ValueError: not a multiple of what the model works in.
    """
    found = []
    for name in ("height", "width"):
        size = default if getattr(settings, name) is None else getattr(settings, name)
        if size < multiple or size % multiple:
            near = sorted({max(multiple, size // multiple * multiple), (size // multiple + 1) * multiple})
            raise ValueError(
                f"{name} is {size}, expected a multiple of {multiple} for {type(pipe).__name__}: "
                f"{' or '.join(map(str, near))}"
            )
        found.append(size)
    return found[0], found[1]


def check_prompts(prompts: Sequence[Any]) -> list[str]:
    """Prompts as text.

    Raises:
        TypeError: a prompt that is none.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt {prompt!r} is {type(prompt).__name__}, expected text")
    return list(prompts)


def warn_of_long_prompts(prompts: Sequence[str], tokenizer: Any, limit: int = 0) -> None:
    """Say which end of a prompt the text encoder does not read."""
    limit = limit or int(tokenizer.model_max_length)
    for prompt in prompts:
        tokens = tokenizer(prompt, truncation=False, add_special_tokens=True, verbose=False).input_ids
        if len(tokens) > limit:
            lost = tokenizer.decode(tokens[limit - 1 :], skip_special_tokens=True)
            warnings.warn(
                f"prompt {prompt[:40]!r}... has {len(tokens)} tokens, the text encoder reads {limit}: "
                f"{lost[:80]!r} is lost",
                stacklevel=2,
            )
