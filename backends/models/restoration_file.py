"""A restoration model as a file: networks by process, what they were taught, and a few degraded images to restore.

A network sees y = x_t - μ and μ, folded so that each 4 × 4 block of pixels is one position: on a CPU more than twice
the speed of blocks of 2 × 2 at more weights.

One safetensors file holds every process that was trained on a degradation. Its metadata is the card: widths, settings
of the processes, and the degradation in words. Images are stored in eight bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual

Process = MeanReverting | Residual
PROCESSES: Mapping[str, type[Process]] = {"mean_reverting": MeanReverting, "residual": Residual}
WIDTHS = (32, 64)
_FOLD, _PAD = 4, 2  # 28 -> 32, eight positions a side


class Model(NamedTuple):
    """What a file holds for one process."""

    network: nn.Module
    process: Process
    degraded: Tensor  # (N, 1, 28, 28) in [0, 1], test images that the network never saw
    clean: Tensor  # (N, 1, 28, 28) in [0, 1]
    degradation: str


class RestorationNetwork(nn.Module):
    """A diffusers `UNet2DModel` on the folded pair (y, μ).

    Args:
        widths: channels at 8 × 8, 4 × 4, ...
        outputs: images that it returns.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, outputs: int = 1) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ImportError("restoration models need diffusers: pip install diffusers") from error
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=2 * _FOLD**2,
            out_channels=outputs * _FOLD**2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """What the process predicts, (n, outputs, 28, 28), for y and μ (n, 2, 28, 28) and timesteps (n,)."""
        folded = F.pixel_unshuffle(F.pad(x, (_PAD,) * 4), _FOLD)
        out = F.pixel_shuffle(self.unet(folded, timestep).sample, _FOLD)
        return out[..., _PAD:-_PAD, _PAD:-_PAD]


def save_model(
    path: Path,
    network: nn.Module,
    process: Process,
    *,
    degraded: Tensor,
    clean: Tensor,
    degradation: str,
    widths: tuple[int, ...] = WIDTHS,
) -> None:
    """Put a network into a file, in float16, beside the other processes that are there; replaced atomically."""
    from safetensors.torch import save_file

    name = name_of(process)
    tensors, card = _read(path) if path.exists() else ({}, {})
    kept = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    weights = {f"{name}.{key}": w.half().contiguous() for key, w in network.state_dict().items()}
    images = {"degraded": _bytes(degraded), "clean": _bytes(clean)}
    processes = card.get("processes", {}) | {name: asdict(process)}
    card = {"processes": processes, "widths": widths, "degradation": degradation}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file(kept | weights | images, part, {"card": json.dumps(card)})
    part.chmod(0o644)
    part.replace(path)


def load_model(path: Path, name: str) -> Model:
    """A saved network, in float32.

    Raises:
        ValueError: a file of another kind, or one without that process.
    """
    tensors, card = _read(path)
    if name not in card["processes"]:
        raise ValueError(f"{path.name} has no process {name!r}: choose {', '.join(card['processes'])}")
    process = PROCESSES[name](**card["processes"][name])
    with torch.device("cpu"):  # whatever torch's default device and dtype
        network = RestorationNetwork(tuple(card["widths"]), process.outputs).float()
    start = f"{name}."
    network.load_state_dict({k.removeprefix(start): w.float() for k, w in tensors.items() if k.startswith(start)})
    degraded, clean = (tensors[key].float() / 255 for key in ("degraded", "clean"))
    return Model(network.eval().requires_grad_(False), process, degraded, clean, card["degradation"])


def name_of(process: Process) -> str:
    """The name of a process in files."""
    return next(name for name, kind in PROCESSES.items() if isinstance(process, kind))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        card = json.loads(metadata.get("card", "{}"))
        if "processes" not in card:
            raise ValueError(f"{path.name} is no restoration model: it has no card of processes")
        return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118  # not a mapping


def _bytes(images: Tensor) -> Tensor:
    return (255 * images).round().to(torch.uint8).cpu().contiguous()
