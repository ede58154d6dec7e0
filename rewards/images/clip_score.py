"""CLIPScore: how well an image fits its prompt, by CLIP.

    r(x, y) = w max(cos(x, y), 0)        w = 2.5

Source: CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al., 2021), section 3. The paper
uses CLIP ViT-B/32 and puts "A photo depicts " before each caption; torchmetrics uses ViT-L/14, no prefix and w = 100.
"""

from __future__ import annotations

import torch

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images.clip import CUT, DEFAULT, SQUARE, Clip, check_clip, prompt_reward


@facts(
    range="0 to 2.5, mostly 0.4 to 0.9",
    differentiable=True,
    prompts=True,
    checkpoint=DEFAULT,
    licence="MIT",
    memory="1.7 GB",
    limits=f"{CUT}; {SQUARE}",
    source="Hessel et al. 2021, CLIPScore",
)
def CLIPScore(
    checkpoint: str = DEFAULT,
    *,
    weight: float = 2.5,
    prefix: str = "",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 16,
    allow_pickle: bool = False,
) -> Reward:
    """r = weight × max(cos, 0) of images (n, 1 or 3, h, w) in [0, 1] with their prompts.

    Args:
        checkpoint: a CLIP of transformers with its processor, a hub id or a local folder.
        weight: 2.5 as in the paper, 100 as in torchmetrics.
        prefix: put before each prompt, "A photo depicts " in the paper.
        device: to score on; None is where the samples are, or the CPU.
        dtype: of the network; None is float32.
        batch_size: images in one forward pass.
        allow_pickle: also read weights that are not safetensors, as tensors only.

    Raises:
        CheckpointError: the checkpoint is absent, gated or no CLIP.
        ImportError: transformers is not installed.
    """
    check_clip(checkpoint)
    clip = Clip(
        checkpoint=checkpoint,
        processor=checkpoint,
        dtype=loading.as_dtype(dtype),
        allow_pickle=allow_pickle,
        prefix=prefix,
    )
    name = "CLIPScore" if checkpoint == DEFAULT else f"CLIPScore({checkpoint})"
    return prompt_reward(clip, name, lambda cos, _: weight * cos.clamp(min=0), device, batch_size)
