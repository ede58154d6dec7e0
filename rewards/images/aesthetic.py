"""LAION's aesthetic predictors: how much people like an image, from CLIP's embedding of it alone.

    r(x) = h(e(x) / |e(x)|)        v1: h linear;  v2: h = five linear layers, 768-1024-128-64-16-1, with nothing between

Between the layers of v2 there is dropout in training and no activation; the "relu" variant of it has ReLU there.

Source: LAION-5B (Schuhmann et al., 2022), and the repositories LAION-AI/aesthetic-predictor (v1) and
christophschuhmann/improved-aesthetic-predictor (v2).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images import vision
from treesearch.rewards.images.clip import DEFAULT, SQUARE, Clip, check_clip

CHECKPOINT = "ttj/sac-logos-ava1-l14-linearMSE"


@facts(
    range="1 to 10, mostly 4 to 7",
    differentiable=True,
    checkpoint=f"{CHECKPOINT} on {DEFAULT}",
    licence="Apache-2.0, on MIT",
    memory="1.7 GB",
    limits=f"prompts are not read; {SQUARE}",
    source="Schuhmann et al. 2022, LAION-5B",
)
def Aesthetic(
    checkpoint: str = CHECKPOINT,
    *,
    clip: str = DEFAULT,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 16,
    allow_pickle: bool = False,
) -> Reward:
    """r = aesthetic score of images (n, 1 or 3, h, w) in [0, 1]; prompts are not read.

    Args:
        checkpoint: the head, a file or a hub id or folder with model.safetensors. Keys as published: `weight` and
            `bias` (v1, sa_0_4_vit_l_14_linear.pth), `predictor.*`, or `layers.0.weight` and so on (v2).
        clip: the CLIP that the head was trained on; the network is shared with `CLIPScore`.
        device: to score on; None is where the samples are, or the CPU.
        dtype: of CLIP; None is float32. The head is float32 at least.
        batch_size: images in one forward pass.
        allow_pickle: also read .pth files and other weights that are not safetensors, as tensors only.

    Raises:
        CheckpointError: a checkpoint is absent, gated, or a pickle.
        ImportError: transformers is not installed.
    """
    loading.check_file(checkpoint, allow_pickle=allow_pickle)
    check_clip(clip)
    encoder = Clip(checkpoint=clip, processor=clip, dtype=loading.as_dtype(dtype), allow_pickle=allow_pickle)

    def part(samples: Any, _: Any) -> Tensor:
        where = vision.place(samples, device)
        embeddings = encoder.images(samples, where)
        head = load_head(checkpoint, where, embeddings.dtype, allow_pickle)
        if head[0].in_features != embeddings.shape[1]:
            got = f"{checkpoint} reads {head[0].in_features} features, {clip} gives {embeddings.shape[1]}"
            raise ValueError(f"{got}: name the CLIP that the head was trained on")
        return head(embeddings).squeeze(1)

    def fn(samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        return loading.micro_batches(part, samples, None, batch_size)

    return Reward(fn, "Aesthetic" if checkpoint == CHECKPOINT else f"Aesthetic({checkpoint})")


@loading.once
def load_head(checkpoint: str, device: str, dtype: torch.dtype, allow_pickle: bool) -> nn.Sequential:
    """The head in a checkpoint, v1 or v2."""
    head = aesthetic_head(loading.weights(checkpoint, allow_pickle=allow_pickle), checkpoint)
    return loading.ready(head, device, dtype)


def aesthetic_head(state: dict[str, Tensor], checkpoint: str = "the file") -> nn.Sequential:
    """h from a state dict with the original key names; keys of a CLIP beside them are passed over.

    Raises:
        CheckpointError: no head of a known layout.
    """
    found = {int(m[1]): m[0] for key in state if (m := re.fullmatch(r"layers\.(\d+)\.weight", key))}
    names = [key.removesuffix(".weight") for _, key in sorted(found.items())]
    linear = next((p for p in ("predictor.", "") if f"{p}weight" in state), None)
    if not names and linear is None:
        first = ", ".join(list(state)[:3])
        raise loading.CheckpointError(
            f"{checkpoint} holds no aesthetic head: expected weight or layers.0.weight, got {first}"
        )
    layers = [_linear(state, f"{name}.") for name in names] or [_linear(state, linear or "")]
    if any(b.in_features != a.out_features for a, b in pairwise(layers)) or layers[-1].out_features != 1:
        shapes = [tuple(layer.weight.shape) for layer in layers]
        raise loading.CheckpointError(
            f"{checkpoint} holds layers of shapes {shapes}: expected a chain that ends in one number"
        )
    if sorted(found) == [0, 3, 6, 9, 11]:  # positions in a stack of (linear, ReLU, dropout)
        return nn.Sequential(layers[0], *(m for layer in layers[1:] for m in (nn.ReLU(), layer)))
    return nn.Sequential(*layers)


def _linear(state: dict[str, Tensor], prefix: str) -> nn.Linear:
    weight, bias = (state[f"{prefix}{name}"].float() for name in ("weight", "bias"))
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="cpu", dtype=torch.float32)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer
