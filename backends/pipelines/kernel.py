"""`DiffusersKernel`: a stock diffusers pipeline as a denoising kernel.

    kernel = DiffusersKernel.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", num_steps=50)

The pipeline supplies weights, prompt encoding and the decoder; the reverse step is `Chain`'s, every row at its own t,
on the grid of the checkpoint's scheduler. States are float32 latents, the network runs in the pipeline's dtype. Under
classifier-free guidance the base law of a search is the guided chain itself; nothing is claimed of its marginals.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, final

import torch
from torch import Tensor

from treesearch.backends.base.devices import as_device
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Step
from treesearch.backends.pipelines import memory
from treesearch.backends.pipelines.checkpoint import find
from treesearch.backends.pipelines.families import family_of, refuse_index, searched_as
from treesearch.backends.pipelines.loading import as_dtype, load_pipeline, tiny_decoder
from treesearch.backends.pipelines.loras import find_loras, load_loras
from treesearch.backends.pipelines.parts import refuse_memory, refuse_offloaded
from treesearch.backends.pipelines.roots import Root
from treesearch.backends.pipelines.running import Running
from treesearch.backends.pipelines.settings import Settings, check
from treesearch.backends.pipelines.stepping import chain_of
from treesearch.backends.pipelines.told import Told


@final
class DiffusersKernel(Running):
    """The chain of a diffusers pipeline.

    Args:
        pipe: a pipeline of one of the known families, with whatever LoRA or adapters it has loaded. Its modules are
            moved to `device`, called in evaluation mode and otherwise left as they are.
        num_steps: T.
        eta: η in [0, 1]; 0 is deterministic after the prior (and cannot branch), 1 is ancestral sampling.
        step: "ddim", "ddpm" or "renoise", see `backends.chains.diffusion`; None takes what the scheduler stands for:
            renoising for LCM, DDPM's step for DDPM at η = 1, DDIM(η) for everything else.
        device: None takes the GPU if there is one.
        text_encoders: after `encode`, "keep" them, "offload" them to the host or "free" them.
        decode_batch: latents decoded at a time.
        tiling, slicing: of the VAE, for large images.
        preview: a tiny decoder (a folder, a hub id or a module) that draws endpoint predictions above t = 0 instead
            of the VAE; rewards at x_0 never see it, and results say that it was used.
        compile: `torch.compile` the network.
        channels_last: memory format of a convolutional network.
        height, ..., network_inputs: see `Settings`.

    Raises:
        ValueError: a pipeline, scheduler, size or setting that does not fit; the message says which.
        CheckpointError: a component is missing.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int,
        eta: float | Tensor = 1.0,
        step: Step | None = None,
        device: str | torch.device | None = None,
        text_encoders: Literal["keep", "offload", "free"] = "keep",
        decode_batch: int = 4,
        tiling: bool = False,
        slicing: bool = False,
        preview: Any = None,
        compile: bool = False,
        channels_last: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        guider: Any = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Mapping[str, str] | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_embeds: Mapping[str, Mapping[str, Tensor]] | None = None,
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
        control_image: Any = None,
        control_scale: float | list[float] | None = None,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_start: float = 0.01,
        skip_layer_guidance_stop: float = 0.2,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        image: Any = None,
        ip_adapter_image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        network_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        chosen = dict(locals()) | {"network_inputs": {} if network_inputs is None else network_inputs}
        check(chosen)
        settings = Settings.of(chosen)
        self.pipe = pipe
        kind, name = family_of(type(pipe).__name__), type(pipe).__name__
        kind.check(name, settings, {part for part, value in pipe.components.items() if value is not None})
        self._told = Told(settings)
        self.family = kind(pipe, settings)
        self.family.refuse()
        self._told.refuse(self.family)
        refuse_memory(self._networks())
        refuse_offloaded(self.modules())
        if preview is not None and not self.family.plain:
            raise ValueError(f"{name} draws with code of its own, and takes no preview: leave it out")
        self.text_encoders, self.decode_batch = text_encoders, decode_batch
        self.dtype = torch.float32
        self._root = Root()
        self._encoded: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._network_dtype = _dtype_of(pipe)  # kept: the module walks through all of its parts to find it
        self._tiny = tiny_decoder(preview, self._network_dtype)
        self._freed: dict[str, str | None] = {}  # digests of text encoders that are gone
        self._quiet = Quiet(*self.modules().values())
        _upcast(pipe)
        if getattr(pipe, "vae", None) is not None:
            pipe.vae.enable_tiling() if tiling else None
            pipe.vae.enable_slicing() if slicing else None
        self._move(as_device(device))  # first: some families ask their networks for the shape of a state
        self.state_shape = self.family.state_shape
        schedule = self.family.schedule(num_steps)
        self.chain = chain_of(pipe.scheduler, schedule, eta, step).to(self.device)
        self._whole = schedule  # of which chains from an image take the last steps
        self.family = self.family.on_grid(schedule)
        self.family.verify(schedule)
        network = self.family.network
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if compile:
            network.compile()
        if self.family.begins:
            vars(self).update(vars(self.from_image(settings.image, self.family.strength, settings.mask)))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        *,
        num_steps: int,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        variant: str | None = None,
        revision: str | None = None,
        lora: str | Mapping[str, float] | None = None,
        components: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> DiffusersKernel:
        """Load a pipeline and wrap it.

        Args:
            checkpoint: a hub id or a local folder.
            num_steps: T.
            dtype: of the weights: "float32", "bfloat16" or "float16".
            device: None takes the GPU if there is one.
            variant, revision: which files of the checkpoint.
            lora: LoRA weights to load into the pipeline, a hub id or a local folder, or several with a weight each:
                {"a/style": 0.8, "b/person": 0.5}.
            components: to use instead of the checkpoint's own, such as {"controlnet": ...} or {"text_encoder_3": None}.
            settings: of `DiffusersKernel`.

        Raises:
            CheckpointError: it is absent, gated or incomplete.
            TypeError: a setting that does not exist.
        """
        # What can be said without weights is said before a long download.
        _refuse_unknown(settings, inspect.signature(cls).parameters)
        options = inspect.signature(cls).bind(None, num_steps=num_steps, device=device, **settings).arguments
        named = {"checkpoint": checkpoint, "dtype": dtype, "variant": variant, "revision": revision, "lora": lora}
        check(options | named | {"components": components})
        numbers = as_dtype(dtype, device)
        found = find(checkpoint, revision)
        index = searched_as(found.index())
        refuse_index(index, components or {}, Settings.of(options))
        loras = find_loras(lora)
        pipe = load_pipeline(found, index, numbers, variant, components)
        load_loras(pipe, loras)
        return cls(pipe, num_steps=num_steps, device=device, **settings)

    def memory_plan(
        self, batch_size: int, *, prompts: Sequence[Any] = ("",), backward: bool = False
    ) -> memory.MemoryPlan:
        """What a search takes on this kernel's device, in bytes, by shapes alone.

        Args:
            batch_size: rows of a step.
            prompts: of the search; an unconditional pipeline reads none.
            backward: whether a gradient guide is used.
        """
        if not self.family.plain:
            self.encode(prompts)  # text that blocks cut by its length has no shape of its own
        return memory.plan(self, batch_size, prompts, backward=backward)


def _refuse_unknown(settings: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    known = [name for name in taken if name != "pipe"]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f": did you mean {near[0]}? It takes" if near else ": it takes"
            raise TypeError(f"there is no setting {name!r}{meant} {', '.join(known)}")


def _dtype_of(pipe: Any) -> torch.dtype:
    network = getattr(pipe, "unet", None)
    return (pipe.transformer if network is None else network).dtype


def _upcast(pipe: Any) -> None:
    """Some decoders overflow in float16, and say so."""
    decoder = getattr(pipe, "vae", None)
    if decoder is not None and decoder.dtype == torch.float16 and decoder.config.get("force_upcast"):
        decoder.float()
