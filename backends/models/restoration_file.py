"""A restoration model as a file: a network of a mean-reverting process, and a few degraded images to restore.

The network sees y = x_t - μ and μ, folded so that each 4 × 4 block of pixels is one position: on a CPU more than twice
the speed of blocks of 2 × 2 at more weights. All that it knows of a level is α_t/σ_t, so that one network serves
residual diffusion too (`Matched`). Images are stored in eight bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual

WIDTHS = (32, 64)
_FOLD, _PAD = 4, 2  # 28 -> 32, eight positions a side


class Model(NamedTuple):
    """What a file holds."""

    network: nn.Module
    process: MeanReverting
    degraded: Tensor  # (N, 1, 28, 28) in [0, 1], test images that the network never saw
    clean: Tensor  # (N, 1, 28, 28) in [0, 1]
    degradation: str


@final
class RestorationNetwork(nn.Module):
    """A diffusers `UNet2DModel` on the folded pair (y, μ).

    Args:
        widths: channels at 8 × 8, 4 × 4, ...
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ImportError("restoration models need diffusers: pip install diffusers") from error
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=2 * _FOLD**2,
            out_channels=_FOLD**2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """What the process predicts, (n, 1, 28, 28), for y and μ (n, 2, 28, 28) and timesteps (n,)."""
        folded = F.pixel_unshuffle(F.pad(x, (_PAD,) * 4), _FOLD)
        out = F.pixel_shuffle(self.unet(folded, timestep).sample, _FOLD)
        return out[..., _PAD:-_PAD, _PAD:-_PAD]


@final
class Matched(nn.Module):
    """A network of a mean-reverting process as one of residual diffusion: it returns Î_res.

    y_i = α_i (x_0 - μ) + σ_i ε is, times σ'/σ_i, the y of the time at which α'/σ' = α_i/σ_i: the same question. Levels
    noisier than the network was taught are asked at its last one, where α' is its floor instead of less.

    Args:
        network: called as network(cat(y, μ), time).
        process: what it was trained on.
        residual: the process that it is to serve.
    """

    def __init__(self, network: nn.Module, process: MeanReverting, residual: Residual) -> None:
        super().__init__()
        self.network, self.process = network, process
        steps = torch.arange(1, residual.train_steps + 1, dtype=torch.float64, device="cpu") / residual.train_steps
        _, alpha, sigma = residual.at(steps)
        times = process.time_of((alpha / sigma).log())
        _, own_alpha, own_sigma = process.at(times / process.train_steps)
        tables = {"times": times, "alpha": own_alpha, "sigma": own_sigma, "scale": own_sigma / sigma}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Î_res (n, C, h, w) for y and μ (n, 2 C, h, w) and timesteps i - 1 (n,)."""
        y, mu = x.chunk(2, 1)
        y = self._at("scale", timestep, y) * y
        output = self.network(torch.cat([y, mu], 1), self._at("times", timestep, x).flatten())
        alpha, sigma = self._at("alpha", timestep, y), self._at("sigma", timestep, y)
        return -self.process.read(output, y, mu, alpha, sigma)

    def _at(self, name: str, timestep: Tensor, x: Tensor) -> Tensor:
        return getattr(self, name)[timestep.long()].to(x.dtype)[:, None, None, None]


def save_model(
    path: Path,
    network: nn.Module,
    process: MeanReverting,
    *,
    degraded: Tensor,
    clean: Tensor,
    degradation: str,
    widths: tuple[int, ...] = WIDTHS,
) -> None:
    """Weights as float16 safetensors with images in [0, 1] and the card as metadata, replaced atomically."""
    from safetensors.torch import save_file

    weights = {f"network.{key}": w.half().contiguous() for key, w in network.state_dict().items()}
    images = {"degraded": _bytes(degraded), "clean": _bytes(clean)}
    card = {"process": asdict(process), "widths": widths, "degradation": degradation}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file(weights | images, part, {"restoration": json.dumps(card)})
    part.chmod(0o644)
    part.replace(path)


def load_model(path: Path) -> Model:
    """A saved network, in float32, with what goes with it.

    Raises:
        ValueError: a file of another kind.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "restoration" not in metadata:
            raise ValueError(f"{path.name} is no restoration model: it has no card of one; save one with save_model")
        card = json.loads(metadata["restoration"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    degraded, clean = (tensors.pop(key).float() / 255 for key in ("degraded", "clean"))
    with torch.device("cpu"):  # whatever torch's default device and dtype
        network = RestorationNetwork(tuple(card["widths"])).float()
    network.load_state_dict({name.removeprefix("network."): w.float() for name, w in tensors.items()})
    network.eval().requires_grad_(False)
    return Model(network, MeanReverting(**card["process"]), degraded, clean, card["degradation"])


def _bytes(images: Tensor) -> Tensor:
    return (255 * images).round().to(torch.uint8).cpu().contiguous()
