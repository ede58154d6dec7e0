"""`DiffusersKernel`: a stock diffusers pipeline as a denoising kernel.

    kernel = DiffusersKernel.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", num_steps=50)

The pipeline supplies weights, prompt encoding and the decoder; the reverse step is `Chain`'s, every row at its own t,
on the grid of the checkpoint's scheduler. States are float32 latents, the network runs in the pipeline's dtype. Under
classifier-free guidance the base law of a search is the guided chain itself; nothing is claimed of its marginals.
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, fingerprint
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain, Step
from treesearch.backends.chains.schedules import Schedule, clip_of, settings_of
from treesearch.backends.pipelines import masks, memory, meta
from treesearch.backends.pipelines.checkpoint import find
from treesearch.backends.pipelines.families import family_of, refuse_index
from treesearch.backends.pipelines.loading import as_device, as_dtype, load_lora, load_pipeline, log, tiny_decoder
from treesearch.backends.pipelines.parts import kept_scales, refuse_memory
from treesearch.backends.pipelines.roots import noise_of, refuse_another, state_of
from treesearch.backends.pipelines.settings import Settings, check
from treesearch.backends.pipelines.told import Told
from treesearch.rewards.numeric import is_number

_STEPPING = ("unet", "transformer", "transformer_2", "controlnet")
_UNREAD = ("safety_checker", "feature_extractor", "image_encoder")


@final
class DiffusersKernel:
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

    sample_range = (0.0, 1.0)

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
        control_scale: float | list[float] = 1.0,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        image: Any = None,
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
        if preview is not None and not self.family.plain:
            raise ValueError(f"{name} draws with code of its own, and takes no preview: leave it out")
        self.text_encoders, self.decode_batch = text_encoders, decode_batch
        self.dtype = torch.float32
        self._root: Tensor | None = None
        self._root_is_prior = False
        self._held: masks.Held | None = None
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
        self.chain = _chain(pipe.scheduler, schedule, eta, step).to(self.device)
        self._whole = schedule  # of which chains from an image take the last steps
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
        lora: str | None = None,
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
            lora: LoRA weights to load into the pipeline, a hub id or a local folder.
            components: to use instead of the checkpoint's own, such as {"controlnet": ...} or {"text_encoder_3": None}.
            settings: of `DiffusersKernel`.

        Raises:
            CheckpointError: it is absent, gated or incomplete.
            TypeError: a setting that does not exist.
        """
        # What can be said without weights is said before a long download.
        options = inspect.signature(cls).bind(None, num_steps=num_steps, device=device, **settings).arguments
        named = {"checkpoint": checkpoint, "dtype": dtype, "variant": variant, "revision": revision, "lora": lora}
        check(options | named | {"components": components})
        numbers = as_dtype(dtype, device)
        found = find(checkpoint, revision)
        index = found.index()
        refuse_index(index, components or {}, Settings.of(options))
        pipe = load_pipeline(found, index, numbers, variant, components)
        if lora is not None:
            load_lora(pipe, os.fspath(lora))
        return cls(pipe, num_steps=num_steps, device=device, **settings)

    @property
    def num_steps(self) -> int:
        return self.chain.schedule.num_steps

    @property
    def network(self) -> nn.Module | tuple[nn.Module, ...]:
        """The denoiser that a step calls, or several experts; a ControlNet beside it is not among them."""
        found = self.family.networks
        return found[0] if len(found) == 1 else found

    @property
    def stochastic(self) -> Tensor:
        """Which steps draw noise; [0] is the prior, which a given x_T fixes."""
        fixed = self.chain.stochastic.clone()
        fixed[0] &= not self._root_is_prior
        return fixed

    @property
    def rows_per_nfe(self) -> int:
        return self.family.rows_per_nfe

    @property
    def preview(self) -> Callable[[Tensor], Tensor] | None:
        """What `decode` would return, nearly: drawn by the tiny decoder, if there is one."""
        return None if self._tiny is None else self._preview

    def to(self, device: str | torch.device) -> DiffusersKernel:
        """The same kernel, moved to a device."""
        self._move(torch.device(device))
        self.chain.to(self.device)
        if self._root is not None:
            self._root = self._root.to(self.device)
        if self._held is not None:
            self._held = self._held.to(self.device)
        return self

    def _move(self, device: torch.device) -> None:
        self.device = device
        for name, module in self.modules().items():
            if self.text_encoders == "keep" or not name.startswith("text_encoder") or self._encoded is None:
                module.to(device)
        if self._tiny is not None:
            self._tiny.to(device)

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

    def shadow(self) -> DiffusersKernel:
        """The same kernel on the meta device: it computes shapes, and takes no memory."""
        other = copy.copy(self)
        other.pipe, other.device = copy.copy(self.pipe), torch.device("meta")
        vars(other.pipe).update({name: meta.shadow(module) for name, module in self.modules().items()})
        other._quiet = Quiet(*other.modules().values())
        other.family = self.family.on(other.pipe)
        other.chain = copy.copy(self.chain).to("meta")
        other.text_encoders = "free" if self.text_encoders == "free" else "keep"
        if self._encoded is not None:
            other._encoded = (self._encoded[0], meta.to_meta(self._encoded[1]))
        if self._root is not None:
            other._root = self._root.to("meta")
        if self._held is not None:
            other._held = self._held.to("meta")
        if self._tiny is not None:
            other._tiny = meta.shadow(self._tiny)
        return other

    def from_noise(self, x_T: Tensor) -> DiffusersKernel:
        """The same chain from given noise instead of the prior's, as pipelines take it for `latents`.

        Args:
            x_T: (*state), of unit variance: schedulers that begin at another variance scale it, as for their own noise;
                what a mask holds of a picture stays held.

        Raises:
            ValueError: another shape.
        """
        root = self._whole.prior_std * noise_of(x_T, self.state_shape)
        return self._rooted(root, self._whole, is_prior=True)

    def from_image(self, image: Any, strength: float = 0.8, mask: Any = None) -> DiffusersKernel:
        """The last steps of the chain, from an image that is noised as far as they begin (img2img).

        The number of steps and their grid are those of the family's own image-to-image pipeline; pixel models and DiT,
        which have none, noise as their scheduler does. The image is the mode of the encoder's law, where pipelines
        draw from it.

        Args:
            image: (3, h, w) in [0, 1] or a PIL image, of the kernel's size.
            strength: share of the T steps that are taken, in (0, 1].
            mask: (1, h, w) in [0, 1] or a PIL image, white where the image is drawn anew; None draws all of it.

        Raises:
            TypeError: neither a tensor nor a PIL image.
            ValueError: another size, a strength that leaves no step, or a network that is told another picture or mask.
        """
        check({"strength": strength})
        refuse_another(self.family, image, mask)
        schedule = self.family.image_schedule(self._whole, strength)
        other = self._rooted(self.state_of(image), schedule, is_prior=False)
        drawn = None if self.family.sees else mask
        other._held = None if drawn is None else masks.Held(other._root, masks.free(self.family, drawn))
        return other

    def state_of(self, image: Any) -> Tensor:
        """x_0 (*state) of a picture: the mode of the encoder's law.

        Args:
            image: (3, h, w) in [0, 1] or a PIL image, of the kernel's size.

        Raises:
            TypeError: neither a tensor nor a PIL image.
            ValueError: another size, range or mode, a pipeline of videos, or one that edits another picture.
        """
        with self._quiet, torch.no_grad():
            return state_of(self.family, image)

    def _rooted(self, root: Tensor, schedule: Schedule, *, is_prior: bool) -> DiffusersKernel:
        other = copy.copy(self)
        other.chain = self.chain.on(schedule)
        other._root, other._root_is_prior = root.detach().to(self.device, self.dtype), is_prior
        return other

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        refuse_memory(self._networks())
        self._quiet.look()
        noise = noise.to(self.device, self.dtype)
        if self._root is None:
            return self.chain.schedule.prior_std * noise
        if self._root_is_prior:
            return self._root.expand(len(noise), *self.state_shape).clone()
        schedule = self.chain.schedule
        return float(schedule.alpha[-1]) * self._root + float(schedule.sigma[-1]) * noise

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            output = self.family.predict(x.to(self._network_dtype), self.chain.timestep[t], cond).float()
            law = self.chain.law(x, t, output)
            return law if self._held is None else masks.held(self.chain, law, x, t, self._held)

    def diagnose(self, t: Tensor) -> str:
        """What may be wrong when the steps from levels t (k,) end in NaN."""
        dtype = str(self._network_dtype).removeprefix("torch.")
        cure = "are the weights, the prompts' embeddings and x_T whole, and is the guidance scale sane?"
        if dtype == "float16":
            cure = "float16 overflows where bfloat16 and float32 do not, load with dtype='bfloat16'"
        timesteps = sorted(set(self.chain.timestep[t.to(self.device)].tolist()))
        return f"timesteps {timesteps} in {dtype}; {cure}"

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning, through the pipeline's own text encoders, which run once for each list of prompts.

        Raises:
            ValueError: other prompts after the encoders were freed.
        """
        asked = tuple(prompts)
        refuse_memory(self._networks())  # also where a cache was enabled since
        if self._encoded is None or self._encoded[0] != asked:
            if not asked:
                raise ValueError("no prompts to encode: give at least one")
            if gone := [n for n in self.family.text_encoders if getattr(self.pipe, n) is None]:
                raise ValueError(f"{gone[0]} was freed after the first prompts: use text_encoders='offload'")
            self._place_encoders(self.device)
            self._quiet.look()
            with self._quiet, torch.no_grad(), kept_scales(self.modules().values()):
                self._encoded = (asked, self._told.encode(self.family, asked))
            if self.text_encoders != "keep":
                self._place_encoders("cpu" if self.text_encoders == "offload" else None)
        return dict(self._encoded[1])

    def _place_encoders(self, device: str | torch.device | None) -> None:
        """Move the text encoders, or (None) let go of them."""
        names = [name for name in self.modules() if name.startswith("text_encoder")]
        for name in names:
            if device is None:
                if self.device.type != "meta":
                    self._freed[name] = fingerprint.of(getattr(self.pipe, name))
                setattr(self.pipe, name, None)
                self._quiet = Quiet(*self.modules().values())
            else:
                getattr(self.pipe, name).to(device)
        if device is None and names:
            gc.collect()
            torch.cuda.empty_cache() if torch.cuda.is_available() else None

    def decode(self, x0: Tensor) -> Tensor:
        """Images (n, c, h, w) or videos (n, f, c, h, w) in [0, 1], float32.

        Raises:
            ValueError: the decoder overflowed.
        """
        images = self._draw(None, x0)
        if not torch.isfinite(images).all():
            dtype = str(getattr(self.pipe, "vae", self.family.network).dtype).removeprefix("torch.")
            cure = (
                "load with dtype='bfloat16'" if dtype == "float16" else "are the weights whole, and the latents finite?"
            )
            raise ValueError(f"the decoder returned NaN or infinity in {dtype}: {cure}")
        return images

    def _preview(self, endpoint: Tensor) -> Tensor:
        images, side = self._draw(self._tiny, endpoint), self.family.unpack(endpoint[:1]).shape[-1]
        if images.shape[-1] != side * self.pipe.vae_scale_factor:
            raise ValueError(f"the preview decoder draws {images.shape[-1]} pixels for {side} latents, expected "
                             f"{side * self.pipe.vae_scale_factor}: is it for another model?")  # fmt: skip
        return images

    def _draw(self, decoder: Any, x0: Tensor) -> Tensor:
        with self._quiet, torch.set_grad_enabled(x0.requires_grad and torch.is_grad_enabled()):
            return self.family.draw(x0.to(self.device), self.decode_batch, decoder)

    def _networks(self) -> dict[str, nn.Module]:
        """What takes part in a step."""
        return {name: part for name, part in self.modules().items() if name in _STEPPING}

    def modules(self) -> dict[str, nn.Module]:
        """What the pipeline computes with, by name."""
        return {name: m for name, m in self.pipe.components.items() if isinstance(m, nn.Module) and name not in _UNREAD}

    @property
    def fingerprint(self) -> str | None:
        """Hash of settings, grid, root and networks as they are now; None where one of them cannot be read."""
        config = {k: v for k, v in self.pipe.config.items() if isinstance(v, (bool, int, float)) and k[0] != "_"}
        chain = (self.chain.settings(), self.chain.tables(), self.state_shape, str(self._network_dtype))
        parts = self._freed | {name: fingerprint.of(module) for name, module in self.modules().items()}
        if self._tiny is not None:
            parts["preview"] = fingerprint.of(self._tiny)
        digest = fingerprint.of(
            [vars(self.family.settings), vars(self._told), config, chain, self._root, self._held, parts]
        )
        return None if digest is None or None in parts.values() else f"{type(self.pipe).__name__}:{digest}"


def _chain(scheduler: Any, schedule: Schedule, eta: float | Tensor, step: Step | None) -> Chain:
    name, config = type(scheduler).__name__, settings_of(scheduler)
    renoises = name in ("LCMScheduler", "FlowMatchLCMScheduler") or config.get("stochastic_sampling")
    if config.get("variance_type") not in (None, "fixed_small"):
        log.warning("%s: %s is not used, steps have DDIM's variance", name, config["variance_type"])
    if step is None:
        step = "renoise" if renoises else "ddpm" if name == "DDPMScheduler" and is_number(eta, 1, 1) else "ddim"
    return Chain(schedule, eta=eta, step=step, clip_sample=clip_of(scheduler))


def _dtype_of(pipe: Any) -> torch.dtype:
    network = getattr(pipe, "unet", None)
    return (pipe.transformer if network is None else network).dtype


def _upcast(pipe: Any) -> None:
    """Some decoders overflow in float16, and say so."""
    decoder = getattr(pipe, "vae", None)
    if decoder is not None and decoder.dtype == torch.float16 and decoder.config.get("force_upcast"):
        decoder.float()
