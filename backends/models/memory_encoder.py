"""Encoders of memory: clips of reference as a few tokens for the attention of a video transformer.

    high, low      two streams, each of stages  Conv3d -> filter -> ReLU -> max pooling,  then the mean over parts of
                   the time, one a token, and a linear map of all that a part holds to the width of the transformer
    filter         y = norm(irfftn(rfftn(x) W) + x),    W of a channel c and a frequency f, fixed, not trained
    high           W = clip(a_c (0.2 + 0.8 √f) + b_c, 0.1, 1.2),   low  W = clip(a_c (1.2 - 0.8 √f) + b_c, 0.1, 1.2)
                   a_c in 0.7..1.3 and b_c in -0.05..0.05 over the channels, and normal noise of 0.05 on W
    attention      the same for both streams: all tokens of all clips of one stream see each other, no residual
    memory         [high; low], 2 m tokens a clip

f = ‖(f_F, f_H, f_W)‖ / √3, each axis in 0..1 from the mean to the fastest ("radial"). The published code has the index
of the transform in its place ("index"), which over the two full axes runs through the negative frequencies: its last
entry is the slowest but the mean, so that "high" is not high there. Norms are batch norms, and the filter drops out
half of its output in training.

With the sizes of the published encoder (21 frames, a stride of 4, two poolings) one frame is left at the end, and its
100 tokens are 100 times the same; `tokens` beyond the frames that are left do nothing but weigh more in the attention.

Source: Learning Plug-and-Play Memory for Guiding Video Diffusion Models (Song et al., 2025), section 4, and its code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treesearch.rewards.numeric import is_whole

Frequencies = Literal["radial", "index"]
NOISE = 0.05  # of the filters
SEED = 0  # of that noise


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an encoder is, kept in its file; the defaults are those of the paper.

    Args:
        clip: shape of a clip's latents (C, F, H, W).
        width: of the transformer's tokens.
        filters, kernels, strides: of the stages.
        pool: of each stage, (F, H, W).
        tokens: m, of a clip and stream.
        heads: of the attention.
        dropout: of what a filter gives.
        frequencies: "radial" or "index".

    Raises:
        ValueError: a size out of range, or stages that leave nothing of a clip.
    """

    clip: tuple[int, int, int, int]
    width: int
    filters: tuple[int, ...] = (512, 768)
    kernels: tuple[int, ...] = (7, 3)
    strides: tuple[int, ...] = (4, 1)
    pool: tuple[int, int, int] = (2, 2, 2)
    tokens: int = 100
    heads: int = 8
    dropout: float = 0.5
    frequencies: Frequencies = "radial"

    def __post_init__(self) -> None:
        for name in ("clip", "filters", "kernels", "strides", "pool"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = (*self.clip, *self.filters, *self.kernels, *self.strides, *self.pool)
        if len(self.clip) != 4 or len(self.pool) != 3 or not all(is_whole(n) for n in sizes):
            raise ValueError(f"expected whole sizes, a clip (C, F, H, W) and a pool (F, H, W), got {self}")
        if len({len(self.filters), len(self.kernels), len(self.strides)}) != 1 or not self.filters:
            raise ValueError("filters, kernels and strides are of one length, a number for each stage")
        if not all(is_whole(n) for n in (self.width, self.tokens, self.heads)) or self.width % self.heads:
            raise ValueError(f"expected tokens of 1 or more and a width that heads divide, got {self}")
        if self.frequencies not in ("radial", "index"):
            raise ValueError(f"frequencies are {self.frequencies!r}, expected radial or index")
        if 0 in (left := self.stages[-1][1]):
            raise ValueError(f"of a clip {self.clip} the stages leave {left}: take smaller strides or pools")

    @property
    def stages(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(F, H, W) before and after the pooling of each stage."""
        found, size = [], self.clip[1:]
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            inner = tuple((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in size)
            size = tuple(n // p for n, p in zip(inner, self.pool, strict=True))
            found.append((inner, size))
        return found


def curve(size: tuple[int, ...], channels: int, *, high: bool, frequencies: Frequencies = "radial") -> Tensor:
    """W (channels, F, H, W // 2 + 1) without noise, for maps of size (F, H, W)."""
    axes = [_axis(n, frequencies) for n in size[:-1]] + [_half_axis(size[-1], frequencies)]
    grid = torch.meshgrid(*axes, indexing="ij")
    root = (torch.stack(grid).square().sum(0).sqrt() / math.sqrt(3)).sqrt()
    base = 0.2 + 0.8 * root if high else 1.2 - 0.8 * root
    slope, offset = (torch.linspace(*ends, channels, device="cpu")[:, None, None, None] for ends in _ENDS)
    return (slope * base + offset).clamp(0.1, 1.2)


_ENDS = ((0.7, 1.3), (-0.05, 0.05))


def _axis(n: int, frequencies: Frequencies) -> Tensor:
    """Frequencies of a full axis, 0..1 of the fastest."""
    if frequencies == "index":
        return torch.linspace(0, 1, n, device="cpu")
    return 2 * torch.fft.fftfreq(n, device="cpu").abs()


def _half_axis(n: int, frequencies: Frequencies) -> Tensor:
    """Frequencies of the halved axis."""
    if frequencies == "index":
        return torch.linspace(0, 1, n // 2 + 1, device="cpu")
    return 2 * torch.fft.rfftfreq(n, device="cpu")


@final
class Filter(nn.Module):
    """norm(irfftn(rfftn(x) W) + x) for maps (n, channels, F, H, W) of one size."""

    weight: Tensor  # real and imaginary parts

    def __init__(self, size: tuple[int, ...], channels: int, plan: Plan, *, high: bool) -> None:
        super().__init__()
        real = curve(size, channels, high=high, frequencies=plan.frequencies)
        rng = torch.Generator("cpu").manual_seed(SEED)
        noise = NOISE * torch.randn(2, *real.shape, generator=rng, device="cpu")
        self.register_buffer("weight", torch.stack([(real + noise[0]).clamp(0.05, 1.5), noise[1]], -1))
        self.dropout, self.norm = nn.Dropout(plan.dropout), nn.BatchNorm3d(channels)

    def filtered(self, x: Tensor) -> Tensor:
        """irfftn(rfftn(x) W), in float32 at least."""
        wide, axes = x.to(torch.promote_types(x.dtype, torch.float32)), (2, 3, 4)
        seen = torch.fft.rfftn(wide, dim=axes, norm="ortho") * torch.view_as_complex(self.weight.to(wide.dtype))
        return torch.fft.irfftn(seen, s=x.shape[2:], dim=axes, norm="ortho").to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.filtered(x)) + x)


@final
class Stream(nn.Module):
    """Clips (n, C, F, H, W) to tokens (n, m, width), by high or by low frequencies."""

    def __init__(self, plan: Plan, *, high: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (plan.clip[0], *plan.filters)
        for i, (kernel, stride, (inner, _)) in enumerate(zip(plan.kernels, plan.strides, plan.stages, strict=True)):
            conv = nn.Conv3d(channels[i], channels[i + 1], kernel, stride, kernel // 2)
            layers += [conv, Filter(inner, channels[i + 1], plan, high=high), nn.ReLU(), nn.MaxPool3d(plan.pool)]
        self.layers, self.tokens = nn.Sequential(*layers), plan.tokens
        self.outward = nn.Linear(channels[-1] * math.prod(plan.stages[-1][1][1:]), plan.width)

    def forward(self, clips: Tensor) -> Tensor:
        by_time = self.layers(clips).transpose(1, 2).flatten(2)  # (n, frames, all that one holds)
        return self.outward(F.adaptive_avg_pool1d(by_time.transpose(1, 2), self.tokens).transpose(1, 2))


@final
class Attention(nn.Module):
    """Self-attention of tokens (n, m, width), queries and keys of mean square 1."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@final
class MemoryEncoder(nn.Module):
    """See the head of the file.

    Args:
        plan: what it is.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.high, self.low = Stream(plan, high=True), Stream(plan, high=False)
        self.attention = Attention(plan.width, plan.heads)

    def forward(self, clips: Tensor) -> Tensor:
        """Memory (n, 2 k m, width) of sets of clips (n, k, C, F, H, W).

        Raises:
            ValueError: clips of another shape.
        """
        if tuple(clips.shape[2:]) != self.plan.clip:
            raise ValueError(f"clips are {tuple(clips.shape)}, expected (sets, k, {self.plan.clip}) as the encoder has")
        flat = clips.flatten(0, 1)
        streams = (stream(flat).unflatten(0, clips.shape[:2]).flatten(1, 2) for stream in (self.high, self.low))
        return torch.cat([self.attention(tokens) for tokens in streams], 1)
