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

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Shared
from treesearch.backends.base.cfg import extrapolated
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import vae
from treesearch.backends.pipelines.asked import call_default, check_clip_skip, check_pictures
from treesearch.backends.pipelines.checkpoint import CheckpointError
from treesearch.backends.pipelines.parts import refuse_adapters, refuse_inputs
from treesearch.backends.pipelines.proof import FEW, LONG, MORE
from treesearch.backends.pipelines.settings import Settings

OPTIONAL = (
    *("guidance_rescale", "negative_prompt", "max_sequence_length", "clip_skip", "control_image", "num_frames"),
    *("image", "mask", "strength", "guidance_scale_2", "guider"),
    "sigmas",
    *("sizes", "ip_adapter_image"),
    *("control_guidance_start", "control_guidance_end"),
    *("skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
)
BEGINS = ("image", "mask", "strength")  # settings of a chain that begins at a picture


class Family(ABC):
    """One family of pipelines.

    Args:
        pipe: the diffusers pipeline.
        settings: the user's choices.
    """

    network_name: ClassVar[str] = "unet"
    needs: ClassVar[tuple[str, ...]] = ()  # components without which it cannot run, beside the network
    takes: ClassVar[tuple[str, ...]] = ()  # settings that it reads beside sizes
    fills: ClassVar[tuple[str, ...]] = ("timestep", "return_dict")  # arguments of the network that are not the user's
    scaled_by: ClassVar[str] = ""  # input of the network whose "scale" the pipeline hands to its text encoders too
    longest: ClassVar[int | None] = None  # tokens that the pipeline lets through
    unread: tuple[str, ...] = ("safety_checker", "feature_extractor", "image_encoder")
    plain: ClassVar[bool] = True  # whether a VAE alone, after `unpack`, draws states and reads pictures

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.name = type(pipe).__name__
        scale = settings.guidance_scale
        self.guidance_scale = float(call_default(pipe, "guidance_scale", 1.0) if scale is None else scale)
        self._kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def check(cls, name: str, settings: Settings, parts: Collection[str]) -> None:
        """What the class and the parts of a pipeline say about settings, before any weight is there.

        Args:
            name: of the pipeline's class.
            settings: the user's choices.
            parts: names of the components that are not None.

        Raises:
            CheckpointError: a component that is missing.
            ValueError: a setting that this family does not take.
        """
        for part in (cls.network_name, *cls.needs):
            if part not in parts:
                raise CheckpointError(f"{name} has no {part}: load it with all of {(cls.network_name, *cls.needs)}")
        check_pictures(name, settings)
        for option in OPTIONAL:
            if option not in cls.takes and getattr(settings, option) != getattr(Settings(), option):
                raise ValueError(f"{name} takes no {option}")
        if settings.control_scale is not None and "controlnet" not in parts:
            raise ValueError(f"{name} has no ControlNet for a control_scale")
        length = settings.max_sequence_length
        if cls.longest is not None and length is not None and length > cls.longest:
            raise ValueError(f"max_sequence_length is {length}, expected 1..{cls.longest}")

    @property
    def network(self) -> Any:
        """The denoiser, a module of diffusers."""
        return getattr(self.pipe, self.network_name)

    @property
    def networks(self) -> tuple[Any, ...]:
        """Those whose output is a step's: the denoiser, or several experts."""
        return (self.network,)

    @property
    def device(self) -> torch.device:
        """Where the network is; other parts of the pipeline may be elsewhere."""
        return self.network.device

    @property
    def text_encoders(self) -> list[str]:
        """Names of the components without which prompts cannot be encoded."""
        return [name for name in self.needs if "encoder" in name]

    @property
    def tells(self) -> bool:
        """Whether prompts are encoded by the pipeline's `encode_prompt`, which takes encodings in their place."""
        return self.plain and hasattr(self.pipe, "encode_prompt")

    @property
    def guided(self) -> bool:
        """Whether a row takes two rows of the network."""
        return self.guidance_scale > 1

    @property
    def rows_per_nfe(self) -> int:
        """Rows of the network that a row takes, at most."""
        return 2 if self.guided else 1

    @property
    def sample_range(self) -> tuple[float, float] | None:
        """Of the entries of samples, where it is known."""
        return 0.0, 1.0

    @property
    def begins(self) -> bool:
        """Whether the chain begins at the settings' picture, and not at noise."""
        image = self.settings.image is not None
        return image and not (self.sees and self.strength == 1)

    @property
    def sees(self) -> bool:
        """Whether the network is told the settings' mask, and what it leaves of their picture."""
        return False

    @property
    def is_told(self) -> bool:
        """Whether the network is told the settings' picture, with a mask or without."""
        return self.sees

    @property
    def strength(self) -> float:
        """Share of the steps that a chain from the settings' picture takes."""
        chosen = self.settings.strength
        return float(call_default(self.pipe, "strength", 0.8) if chosen is None else chosen)

    @property
    def control_scale(self) -> float | list[float]:
        """Weight of what ControlNets add."""
        chosen = self.settings.control_scale
        return call_default(self.pipe, "controlnet_conditioning_scale", 1.0) if chosen is None else chosen

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one state.

        Raises:
            ValueError: a size that the model cannot take; the message names the nearest one that it can.
        """

    def refuse(self) -> None:
        """Refuse networks and settings that do not go together.

        Raises:
            ValueError: a network that needs more than this family hands it, or a setting that has no effect or range.
        """
        settings = self.settings
        refuse_inputs(self.network, settings.network_inputs, self.fills)
        pictures = settings.ip_adapter_image is not None
        refuse_adapters(self.name, self.network, settings.network_inputs, pictures=pictures)
        self.refuse_settings()

    def refuse_settings(self) -> None:
        """The part of `refuse` that is about settings alone."""
        settings = self.settings
        if settings.negative_prompt is not None and not self.guided:
            raise ValueError(f"negative_prompt has no effect at guidance_scale={self.guidance_scale:g}: leave it out")
        if settings.clip_skip is not None:
            check_clip_skip(self.pipe, settings.clip_skip)

    @abstractmethod
    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning: rows (n, ...) and `Shared` values."""

    @abstractmethod
    def predict(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The network's output (n, *state), guided, for x (n, *state) in the network's dtype and timestep (n,)."""

    @property
    def lora_scale(self) -> float | None:
        """What the pipeline hands to `encode_prompt`, beside the network's own scale of a LoRA."""
        return (self.settings.network_inputs.get(self.scaled_by) or {}).get("scale")

    def grid(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline hands to its scheduler's `set_timesteps`, beside the number of steps."""
        return {}

    def schedule(self, num_steps: int) -> Schedule:
        """The grid of T steps, by the settings' noise levels if they have some.

        Raises:
            ValueError: another number of them, or a scheduler that has no such grid.
        """
        given = self.settings.sigmas
        if given is None:
            return Schedule.of(self.pipe.scheduler, num_steps, **self.grid(num_steps))
        if len(given) != num_steps:
            raise ValueError(f"{len(given)} sigmas for num_steps={num_steps}: give one for each step")
        return Schedule.of(self.pipe.scheduler, num_steps, **self.grid(num_steps) | {"sigmas": list(given)})

    def image_steps(self, num_steps: int, strength: float) -> int:
        """Steps of T that the family's image-to-image pipeline takes."""
        return int(num_steps * strength)

    def image_schedule(self, schedule: Schedule, strength: float) -> Schedule:
        """The grid of a chain that begins at an image.

        Raises:
            ValueError: a strength that leaves no step.
        """
        steps = self.image_steps(schedule.num_steps, strength)
        if steps < 1:
            raise ValueError(f"strength is {strength}, expected {1 / schedule.num_steps:.3g}..1")
        return schedule.last(steps)

    def on(self, pipe: Any) -> Family:
        """The same family of another copy of the pipeline."""
        return type(self)(pipe, self.settings)

    def on_grid(self, schedule: Schedule) -> Family:
        """The same, its windows of steps on another grid."""
        return self

    def verify(self, schedule: Schedule) -> None:
        """Try what cannot be read beforehand, once the networks are where they compute; most have nothing to try.

        Raises:
            ValueError: it is not as the chain needs it.
        """
        return

    def draw(self, x0: Tensor, batch: int, decoder: Any = None) -> Tensor:
        """Images (n, c, h, w) or videos (n, f, c, h, w) in [0, 1], `batch` states at a time; None takes the VAE."""
        latents = self.unpack(x0)
        decoder = getattr(self.pipe, "vae", None) if decoder is None else decoder
        return vae.to_unit(latents) if decoder is None else vae.decode(decoder, latents, batch)

    def unpack(self, x: Tensor) -> Tensor:
        """Latents that the decoder takes, from states."""
        return x

    def pack(self, latents: Tensor) -> Tensor:
        """States, from latents of the encoder."""
        return latents

    def state_of(self, image: Any) -> Tensor:
        """x_0 (*state) of a picture, where a VAE alone does not make it.

        Raises:
            ValueError: nothing does.
        """
        raise ValueError(f"{self.name} begins from noise, with code of its own: begin from latents with from_noise")

    def free(self, mask: Any) -> Tensor:
        """Entries of a state (1, *state) that the chain draws under a mask, where `pack` does not place them."""
        raise NotImplementedError

    def negatives(self, prompts: Sequence[str]) -> list[str] | None:
        """What ∅ says for each prompt; None is the pipeline's own.

        Raises:
            ValueError: nothing is said for one.
        """
        said = self.settings.negative_prompt
        if not isinstance(said, Mapping):
            return None if said is None else [said] * len(prompts)
        tried = dict.fromkeys((FEW, MORE, LONG), "")  # on which a pipeline is held against itself
        for prompt in prompts:
            if prompt not in said and prompt not in tried:
                raise ValueError(f"negative_prompt has nothing for {prompt!r}: give a text for each prompt")
        return [{**tried, **said}[prompt] for prompt in prompts]

    def separate(
        self, names: Sequence[str], embeds: Sequence[Tensor | None], negative: Sequence[Tensor | None]
    ) -> dict[str, Any]:
        """Rows of the prompts, and of ∅: one that they share, where it says the same for all."""
        out: dict[str, Any] = dict(zip(names, embeds, strict=True))
        each = isinstance(self.settings.negative_prompt, Mapping)
        for name, value in zip(names, negative, strict=True):
            if value is not None:
                out[f"negative_{name}"] = value if each else Shared(value[:1].clone())
        return out

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

    def guide(self, output: Tensor, scale: float | None = None) -> Tensor:
        """ε̃ (n, ...) from the network's output on its rows, under the settings' scale or another."""
        if not self.guided:
            return output
        absent, given = output.chunk(2)
        guided = extrapolated(absent, given, self.guidance_scale if scale is None else scale)
        if self.settings.guidance_rescale:
            axes = tuple(range(1, guided.ndim))
            scale = given.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
            guided = guided * (1 + self.settings.guidance_rescale * (scale - 1))
        return guided

    def twice(self, x: Tensor) -> Tensor:
        """The network's rows of x."""
        return torch.cat([x, x]) if self.guided else x
