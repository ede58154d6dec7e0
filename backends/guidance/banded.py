"""One network with low-rank changes of its weights, others in each band of noise levels.

    W_n = W + B_n A_n        weights of two axes and more, as matrices (out, rest); B_n (out, r), A_n (r, rest)
    b_n = b + d_n            of one axis: biases, scales and shifts of norms
    band(t) = floor(N φ_t),  φ_t = (2/π) atan(σ_t / α_t)

φ is t/T on the cosine schedule, so that these are the paper's N equal parts of the training steps there; it depends on
nothing but the noise, so that a family serves every grid. A change is added to the weights when a band is called: the
network itself is untouched, and B_n = 0, d_n = 0 is the network, bit for bit.

Source: Towards Practical Plug-and-Play Diffusion Models (Go et al., 2023), section 3.2. LoRA: Low-Rank Adaptation of
Large Language Models (Hu et al., 2022), section 4.1. That the bands are those of φ is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from treesearch.backends.chains.schedules import Schedule

Changes = Mapping[str, Tensor]
"""By the name of a weight: `name.a` (N, r, rest) and `name.b` (N, out, r), or `name.d` (N, size)."""


def shapes(network: nn.Module, bands: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's changes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            out, rest = len(weight), weight[0].numel()
            found |= {f"{name}.a": (bands, rank, rest), f"{name}.b": (bands, out, rank)}
        elif weight.ndim == 1:
            found[f"{name}.d"] = (bands, len(weight))
    return found


def unchanged(network: nn.Module, bands: int, rank: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Changes that change nothing yet: B = 0, d = 0, and A uniform within 1/√rest."""
    made = {}
    for name, shape in shapes(network, bands, rank).items():
        draw = torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float32)
        made[name] = (2 * draw - 1) / math.sqrt(shape[-1]) if name.endswith(".a") else torch.zeros_like(draw)
    return made


def share(network: nn.Module, changes: Changes) -> float:
    """Numbers of one band's changes, over those of the network."""
    return sum(c[0].numel() for c in changes.values()) / sum(w.numel() for w in network.parameters())


def changed(network: nn.Module, changes: Changes, band: int) -> dict[str, Tensor]:
    """The weights of a band."""
    found = {}
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            found[name] = weight + (changes[f"{name}.b"][band] @ changes[f"{name}.a"][band]).view_as(weight)
        elif weight.ndim == 1:
            found[name] = weight + changes[f"{name}.d"][band]
    return found


def call(network: nn.Module, changes: Changes, inputs: Tensor, band: Tensor) -> Tensor:
    """Outputs (n, C) of inputs (n, ...), each row by the weights of its own band (n,)."""
    rows = [(band == n).nonzero().flatten() for n in band.unique().tolist()]
    parts = [functional_call(network, changed(network, changes, int(band[r[0]])), (inputs[r],)) for r in rows]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def angles(schedule: Schedule) -> Tensor:
    """φ_t in [0, 1], t = 0..T, float64."""
    return torch.atan2(schedule.sigma, schedule.alpha) * (2 / math.pi)


def band_of(angle: Tensor, bands: int) -> Tensor:
    """floor(N φ), and N - 1 at φ = 1."""
    return (bands * angle).floor().long().clamp(0, bands - 1)
