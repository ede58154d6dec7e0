"""Aligners: small networks that read a condition of x_0 off the features of a denoising network at x_t.

    A(F(x_t), t) ≈ E[c(x_0) | x_t],      c(x_0) - A(F(x_t), t) ~ N(0, C_t),   C_t = B diag(s_t²) Bᵀ

F are outputs of named parts of the network in the very call that makes a step, resized to the map of the condition,
each channel in units of its standard deviation. The time enters as u = (2/π) atan2(σ_t, α_t), 0 at a clean state and 1
at noise, so that an aligner is of no particular grid. B is one orthonormal basis (M, M), s_t² the variances of the
error along it, measured on rollouts of the kernel at a few u and interpolated between them; without `spread` fitted
they are 1.

Source: LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis (Liu et al., 2023), section 3.2. There c
is the latent of an autoencoder and the features are those of Stable Diffusion; here c is the map itself, at the
resolution of the features. C_t is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treesearch.backends.models.shipped import load_weights, shipped_file

WAVES = 8  # of the time, sines and cosines


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an aligner is, kept in its file.

    Args:
        condition: name of the map c, as `rewards.outlines` has it.
        shape: of c (C, H, W).
        parts: of the network, by name.
        channels: of their outputs.
        margin: how far the feature maps reach beyond the sample on every side, in entries of c.
        width: channels inside.
        knots: values of u at which the error is known.
    """

    condition: str
    shape: tuple[int, int, int]
    parts: tuple[str, ...]
    channels: tuple[int, ...]
    margin: int = 0
    width: int = 48
    knots: int = 26


@final
class Aligner(nn.Module):
    """See the head of the file.

    Args:
        plan: what it is.
    """

    scale: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, width, entries = plan, plan.width, math.prod(plan.shape)
        self.inward = nn.Conv2d(sum(plan.channels), width, 1)
        self.time = nn.Sequential(nn.Linear(2 * WAVES, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )
        self.outward = nn.Conv2d(width, plan.shape[0], 1)
        self.register_buffer("scale", torch.ones(sum(plan.channels)))
        self.register_buffer("basis", torch.eye(entries))
        self.register_buffer("variances", torch.ones(plan.knots, entries))

    def forward(self, features: Sequence[Tensor], u: Tensor) -> Tensor:
        """A (n, C, H, W) of features (n, c, h, w) in the order of the plan, at times u (n,)."""
        inside = self.inward(self.gathered(features) / self.scale[:, None, None])
        shift, gain = self.time(_waves(u.to(inside)))[..., None, None].chunk(2, 1)
        inside = inside * (1 + gain) + shift
        return self._trimmed(self.outward(inside + self.body(inside)))

    def gathered(self, features: Sequence[Tensor]) -> Tensor:
        """Features on one grid, (n, Σ c, H + 2 margin, W + 2 margin)."""
        size = [side + 2 * self.plan.margin for side in self.plan.shape[1:]]
        dtype = self.scale.dtype
        return torch.cat([F.interpolate(f.to(dtype), size, mode="bilinear", align_corners=False) for f in features], 1)

    def spread(self, u: Tensor) -> Tensor:
        """s² (n, M) at times u (n,), float64."""
        at = u.double().clamp(0, 1) * (self.plan.knots - 1)
        low = at.floor().long().clamp(max=self.plan.knots - 2)
        table, share = self.variances.double(), (at - low)[:, None]
        return table[low] * (1 - share) + table[low + 1] * share

    def _trimmed(self, maps: Tensor) -> Tensor:
        m = self.plan.margin
        return maps[..., m:-m, m:-m] if m else maps


def time_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    """u = (2/π) atan2(σ, α)."""
    return torch.atan2(sigma, alpha) * (2 / math.pi)


def _waves(u: Tensor) -> Tensor:
    """Sines and cosines (n, 2 WAVES) of times (n,)."""
    angles = math.pi * u[:, None] * torch.arange(1, WAVES + 1, device=u.device, dtype=u.dtype)
    return torch.cat([angles.sin(), angles.cos()], 1)


def save_aligner(path: Path, aligner: Aligner) -> None:
    """Weights as float16 safetensors with the plan as metadata, replaced atomically."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    exact = {"variances"}  # some are too small for float16
    weights = {k: (w if k in exact else w.half()).contiguous() for k, w in aligner.state_dict().items()}
    save_file(weights, part, {"aligner": json.dumps(asdict(aligner.plan))})
    part.chmod(0o644)
    part.replace(path)


def load_aligner(name: str | Path) -> Aligner:
    """An aligner of a shipped file by name, or of a path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with shipped_file(name) as path, safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get("aligner")
    except SafetensorError as error:
        raise ValueError(f"{str(name)!r} is no file of safetensors") from error
    if card is None:
        raise ValueError(f"{str(name)!r} is no aligner: it has no plan of one; save one with save_aligner")
    told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(card).items()}
    plan = Plan(**told)
    return load_weights(lambda: Aligner(plan), name)
