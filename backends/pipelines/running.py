"""A pipeline's chain at work: x_T, steps, prompts and pictures, with everything that decides them settled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, fingerprint
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import encoders, masks, meta
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.parts import kept_scales, place, refuse_memory
from treesearch.backends.pipelines.roots import Root, noise_of, refuse_another, state_of
from treesearch.backends.pipelines.settings import check
from treesearch.backends.pipelines.told import Told

_STEPPING = ("unet", "transformer", "transformer_2", "controlnet")


class Running:
    """What `DiffusersKernel` does once it is made."""

    pipe: Any
    family: Family
    chain: Chain
    state_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    text_encoders: str
    decode_batch: int
    _told: Told
    _root: Root
    _whole: Schedule
    _quiet: Quiet
    _network_dtype: torch.dtype
    _tiny: Any
    _encoded: tuple[tuple[Any, ...], dict[str, Any]] | None
    _freed: dict[str, str | None]

    @property
    def num_steps(self) -> int:
        return self.chain.schedule.num_steps

    @property
    def sample_range(self) -> tuple[float, float] | None:
        """Of the entries of samples; None for sound alone."""
        return self.family.sample_range

    @property
    def network(self) -> nn.Module | tuple[nn.Module, ...]:
        """The denoiser that a step calls, or several experts; a ControlNet beside it is not among them."""
        found = self.family.networks
        return found[0] if len(found) == 1 else found

    @property
    def stochastic(self) -> Tensor:
        """Which steps draw noise; [0] is the prior, which a given x_T fixes."""
        fixed = self.chain.stochastic.clone()
        fixed[0] &= not self._root.is_prior
        return fixed

    @property
    def rows_per_nfe(self) -> int:
        return self.family.rows_per_nfe

    @property
    def preview(self) -> Callable[[Tensor], Tensor] | None:
        """What `decode` would return, nearly: drawn by the tiny decoder, if there is one."""
        return None if self._tiny is None else self._preview

    def to(self, device: str | torch.device) -> Self:
        """The same kernel, moved to a device."""
        self._move(torch.device(device))
        self.chain.to(self.device)
        self._root = self._root.to(self.device)
        return self

    def _move(self, device: torch.device) -> None:
        self.device = device
        for name, module in self.modules().items():
            if self.text_encoders == "keep" or not name.startswith("text_encoder") or self._encoded is None:
                place(name, module, device)
        if self._tiny is not None:
            self._tiny.to(device)

    def shadow(self) -> Self:
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
        other._root = self._root.to("meta")
        if self._tiny is not None:
            other._tiny = meta.shadow(self._tiny)
        return other

    def from_noise(self, x_T: Tensor) -> Self:
        """The same chain from given noise instead of the prior's, as pipelines take it for `latents`.

        Args:
            x_T: (*state), of unit variance: schedulers that begin at another variance scale it, as for their own noise;
                what a mask holds of a picture stays held.

        Raises:
            ValueError: another shape.
        """
        root = self._whole.prior_std * noise_of(x_T, self.state_shape)
        return self._rooted(Root(root.detach(), True, self._root.held), self._whole)

    def from_image(self, image: Any, strength: float = 0.8, mask: Any = None) -> Self:
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
        picture = self.state_of(image).detach()
        drawn = None if self.family.sees else mask
        held = None if drawn is None else masks.Held(picture, masks.free(self.family, drawn))
        return self._rooted(Root(picture, False, held), schedule)

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

    def _rooted(self, root: Root, schedule: Schedule) -> Self:
        other = copy.copy(self)
        other.chain, other._root = self.chain.on(schedule), root.to(self.device)
        other.family = self.family.on_grid(schedule)
        return other

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        refuse_memory(self._networks())
        self._quiet.look()
        return self._root.first(self.chain.schedule, noise.to(self.device, self.dtype))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            output = self.family.predict(x.to(self._network_dtype), self.chain.timestep[t], cond).float()
            law = self.chain.law(x, t, output)
            return law if self._root.held is None else masks.held(self.chain, law, x, t, self._root.held)

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
            encoders.place(self.pipe, self.device)
            self._quiet.look()
            with self._quiet, torch.no_grad(), kept_scales(self.modules().values()):
                self._encoded = (asked, self._told.encode(self.family, asked))
            if self.text_encoders == "offload":
                encoders.place(self.pipe, "cpu")
            elif self.text_encoders == "free":
                self._freed |= encoders.free(self.pipe)
                self._quiet = Quiet(*self.modules().values())
        return dict(self._encoded[1])

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

    @property
    def sound_rate(self) -> int | None:
        """Samples a second of `sound`; None for models that make none beside their pictures."""
        return getattr(self.family, "sound_rate", None)

    def sound(self, x0: Tensor) -> Tensor:
        """Sound (n, channels, samples) in [-1, 1], float32, that goes with the videos which `decode` draws, or is them.

        Raises:
            ValueError: the model makes none.
        """
        if self.sound_rate is None:
            raise ValueError(f"{type(self.pipe).__name__} makes no sound: its samples are what decode draws")
        with self._quiet, torch.no_grad():
            return self.family.sound(x0.to(self.device), self.decode_batch)

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
        return {name: part for name, part in self._read().items() if isinstance(part, nn.Module)}

    def _read(self) -> dict[str, Any]:
        """Components that decide what is drawn, by name; the scheduler is the chain's."""
        left = {*self.family.unread, "scheduler"}
        return {name: part for name, part in self.pipe.components.items() if name not in left and part is not None}

    @property
    def fingerprint(self) -> str | None:
        """Hash of settings, grid, root and components as they are now: networks, text encoders and their tokenizers,
        the autoencoder, adapters, processors of pictures, a pipeline's own guider; None where one cannot be read."""
        config = {k: v for k, v in self.pipe.config.items() if isinstance(v, (bool, int, float)) and k[0] != "_"}
        chain = (self.chain.settings(), self.chain.tables(), self.state_shape, str(self._network_dtype))
        parts = self._freed | {name: fingerprint.of(part) for name, part in self._read().items()}
        if self._tiny is not None:
            parts["preview"] = fingerprint.of(self._tiny)
        digest = fingerprint.of(
            [vars(self.family.settings), vars(self._told), config, chain, self._root.state, self._root.held, parts]
        )
        return None if digest is None or None in parts.values() else f"{type(self.pipe).__name__}:{digest}"
