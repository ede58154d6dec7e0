"""Pictures as prompts: what the IP-Adapters of a U-Net are told, encoded once by the pipeline's own method.

Reference: IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models (Ye et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import Shared

_NAME = "ip_adapter_{}"


def refuse(name: str, pipe: Any, pictures: Any) -> None:
    """Refuse pictures for which there is no adapter, or no encoder.

    Args:
        name: of the pipeline, for the message.
        pipe: with its adapters loaded.
        pictures: one, or one an adapter.

    Raises:
        ValueError: there is none.
    """
    adapters = len(getattr(getattr(pipe.unet, "encoder_hid_proj", None), "image_projection_layers", ()))
    given = len(pictures) if isinstance(pictures, list) else 1
    if adapters == 0:
        raise ValueError(f"{name} has no IP-Adapter for an ip_adapter_image: pipe.load_ip_adapter(...) first")
    if given != adapters:
        raise ValueError(f"{given} pictures for {adapters} IP-Adapters: give ip_adapter_image one each, in a list")
    if getattr(pipe, "image_encoder", None) is None:
        raise ValueError(f"{name} has no image_encoder to see pictures with: pipe.load_ip_adapter(..., "
                         "image_encoder_folder=...) brings one")  # fmt: skip


def encoded(pipe: Any, pictures: Any, device: torch.device, *, guided: bool) -> dict[str, Any]:
    """Conditioning that all rows share: of each adapter, what it is told without a picture if guided, and with it."""
    found = pipe.prepare_ip_adapter_image_embeds(pictures, None, device, 1, guided)
    return {_NAME.format(i): Shared(value) for i, value in enumerate(found)}


def told(cond: Mapping[str, Any], rows: Tensor) -> dict[str, list[Tensor]]:
    """What the U-Net is told for its rows (n, ...), those of ∅ first."""
    out: list[Tensor] = []
    while (value := cond.get(_NAME.format(len(out)))) is not None:
        out.append(value.to(rows.dtype).repeat_interleave(len(rows) // len(value), 0))
    return {"image_embeds": out}
