"""Latents to images and back: micro-batches, with gradients recomputed instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treesearch.backends.base.quiet import Quiet
from treesearch.backends.pipelines.parts import unwrapped


def decode(vae: Any, latents: Tensor, batch: int) -> Tensor:
    """Images in [0, 1], (n, 3, h, w) or videos (n, f, 3, h, w), float32, from latents (n, ...).

    Args:
        vae: of a pipeline, or a tiny decoder.
        latents: as the chain leaves them.
        batch: latents decoded at a time; memory is that of one such batch, also under autograd.
    """
    parts = []
    for part in latents.split(batch):
        if part.requires_grad and torch.is_grad_enabled():
            parts.append(checkpoint(_decode, vae, part, use_reentrant=False))
        else:
            parts.append(_decode(vae, part))
    return torch.cat(parts)


def _decode(vae: Any, latents: Tensor) -> Tensor:
    scaled = unscale(vae, latents).to(vae.dtype)
    # Decoders that are told a time finish the denoising: at x_0 there is none left.
    time = {"temb": scaled.new_zeros(len(scaled))} if vae.config.get("timestep_conditioning") else {}
    with Quiet(vae):  # here, since a checkpoint calls this again when the gradient is taken
        images = vae.decode(scaled, **time, return_dict=False)[0].float()
    return to_unit(images.transpose(1, 2) if images.ndim == 5 else images)


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped."""
    return (images / 2 + 0.5).clamp(0, 1)


def over_white(images: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) of such with an alpha channel (n, 4, h, w), in [0, 1], on white."""
    colours, alpha = images[:, :3], images[:, 3:]
    return colours * alpha + (1 - alpha)


def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents of images (n, 3, h, w) in [0, 1]: the mode of the encoder's law."""
    law = vae.encode((2 * images - 1).to(vae.device, vae.dtype))
    found = law.latent_dist.mode() if hasattr(law, "latent_dist") else law.latents
    return scale(vae, found.float())


def factor(pipe: Any) -> int:
    """Pixels of a side that one latent stands for."""
    return getattr(pipe, "vae_scale_factor", None) or 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def unscale(vae: Any, latents: Tensor) -> Tensor:
    """From the chain's units to the decoder's."""
    factor, shift, spread = _units(vae, latents)
    return latents * spread / factor + shift


def scale(vae: Any, latents: Tensor) -> Tensor:
    """From the encoder's units to the chain's."""
    factor, shift, spread = _units(vae, latents)
    return (latents - shift) * factor / spread


def _units(vae: Any, latents: Tensor) -> tuple[float, Tensor | float, Tensor | float]:
    kept = dict(unwrapped(vae).named_buffers(recurse=False))  # where LTX has what others have in their configuration
    factor = vae.config.get("scaling_factor") or 1.0
    mean, std = (vae.config.get(name, kept.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return factor, vae.config.get("shift_factor") or 0.0, 1.0
    shape = (1, -1, *(1,) * (latents.ndim - 2))
    mean, std = (torch.as_tensor(v, dtype=latents.dtype, device=latents.device).reshape(shape) for v in (mean, std))
    return factor, mean, std
