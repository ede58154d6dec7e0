"""What tells pipelines apart: settings by content, and a sample of every weight, since whole models are gigabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewards.base import content

SAMPLE = 64  # entries of a tensor that are read


def of_settings(settings: Mapping[str, Any]) -> bytes:
    """Digest of named values; tensors, arrays and images by content, anything unknown by its repr."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(settings.items()):
        try:
            parts = content(dict(value) if isinstance(value, Mapping) else value)
        except TypeError:
            parts = [repr(value).encode()]
        digest.update(name.encode() + b"".join(parts))
    return digest.digest()


def of_module(module: nn.Module) -> bytes:
    """Digest of up to `SAMPLE` evenly spread entries of every tensor, and of the scales of adapters."""
    digest = hashlib.blake2b(digest_size=12)
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode() + _sample(value))
    for key, part in module.named_modules():
        if isinstance(scales := getattr(part, "scaling", None), dict):  # of a LoRA layer
            active = getattr(part, "active_adapters", None)
            digest.update(f"{key}{sorted(scales.items())}{active}".encode())
    return digest.digest()


def of_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Digest of whole tensors."""
    return of_settings(tensors)


def _sample(value: Tensor) -> bytes:
    flat = value.detach().reshape(-1)
    picked = flat[:: max(1, len(flat) // SAMPLE)] if len(flat) else flat
    return picked.float().cpu().contiguous().view(torch.uint8).numpy().tobytes()
