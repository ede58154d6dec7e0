"""Where the text encoders of a pipeline are: with the network, on the host, or gone once the prompts are encoded."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from treesearch.backends.base import fingerprint
from treesearch.backends.pipelines import parts
from treesearch.backends.pipelines.blocks import is_text


def encoders(pipe: Any) -> dict[str, nn.Module]:
    """Text encoders of a pipeline, by name, those that are there."""
    return {name: part for name, part in pipe.components.items() if is_text(name) and isinstance(part, nn.Module)}


def place(pipe: Any, device: str | torch.device) -> None:
    """Move the text encoders of a pipeline."""
    for name, module in encoders(pipe).items():
        parts.place(name, module, torch.device(device))


def free(pipe: Any) -> dict[str, str | None]:
    """Let go of the text encoders of a pipeline; their digests, None where one cannot be read."""
    found = encoders(pipe)
    digests = {name: None if _is_meta(module) else fingerprint.of(module) for name, module in found.items()}
    for name in found:
        setattr(pipe, name, None)
    if found:
        gc.collect()
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
    return digests


def _is_meta(module: nn.Module) -> bool:
    return any(weight.is_meta for weight in module.parameters())
