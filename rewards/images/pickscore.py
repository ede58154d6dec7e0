"""PickScore: which image people prefer for a prompt, by a CLIP-H trained on their choices.

    r(x, y) = s cos(x, y)        s = exp(logit scale) of the checkpoint, about 100

Differences are log odds: people choose x over x' with probability σ(r(x, y) - r(x', y)).

Source: Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (Kirstain et al., 2023), section 3.
"""

from __future__ import annotations

import torch

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images.clip import CUT, SQUARE, Clip, check_clip, prompt_reward

CHECKPOINT = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@facts(
    range="15 to 26, mostly about 21",
    differentiable=True,
    prompts=True,
    checkpoint=CHECKPOINT,
    licence="not stated; its base model is MIT",
    memory="3.9 GB",
    limits=f"{CUT}; {SQUARE}",
    source="Kirstain et al. 2023, Pick-a-Pic",
)
def PickScore(
    checkpoint: str = CHECKPOINT,
    *,
    processor: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 16,
    allow_pickle: bool = False,
) -> Reward:
    """r = exp(logit scale) × cos of images (n, 1 or 3, h, w) in [0, 1] with their prompts.

    Args:
        checkpoint: a CLIP of transformers, a hub id or a local folder.
        processor: hub id or folder of its tokenizer and image processor; None is its base model's for the published
            checkpoint, which has none, and the checkpoint's own for any other.
        device: to score on; None is where the samples are, or the CPU.
        dtype: of the network; None is float32. The scale stays float32.
        batch_size: images in one forward pass.
        allow_pickle: also read weights that are not safetensors, as tensors only.

    Raises:
        CheckpointError: the checkpoint is absent, gated or no CLIP.
        ImportError: transformers is not installed.
    """
    check_clip(checkpoint)
    if processor is None:
        processor = PROCESSOR if checkpoint == CHECKPOINT else checkpoint
    clip = Clip(checkpoint=checkpoint, processor=processor, dtype=loading.as_dtype(dtype), allow_pickle=allow_pickle)
    name = "PickScore" if checkpoint == CHECKPOINT else f"PickScore({checkpoint})"
    return prompt_reward(clip, name, lambda cos, network: network.logit_scale.exp() * cos, device, batch_size)
