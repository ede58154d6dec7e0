"""Any image classifier of transformers as a reward.

    r(x) = log p(c | x)        several labels S: max over S, or log Σ_{c in S} p(c | x)

Source: the classifier reward of Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images import vision


@facts(
    range="-inf to 0",
    differentiable=True,
    memory="the checkpoint's",
    limits="images (n, 1 or 3, h, w) in [0, 1], at the size that the checkpoint reads; labels that it knows",
)
def ImageClassifier(
    checkpoint: str,
    label: str | int | Sequence[str | int],
    *,
    combine: Literal["max", "logsumexp"] = "max",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    """r = log p(label | x) of images (n, 1 or 3, h, w) in [0, 1], prepared as the checkpoint's processor says.

    Args:
        checkpoint: anything that AutoModelForImageClassification reads, a hub id or a local folder.
        label: a name or an index, or several.
        combine: of several labels, the best one or the probability of any.
        device: to score on; None is where the samples are, or the CPU.
        dtype: of the network; None is float32.
        batch_size: images in one forward pass.
        allow_pickle: also read weights that are not safetensors, as tensors only.

    Raises:
        ValueError: a label that the checkpoint does not know, or another way to combine.
        CheckpointError: the checkpoint is absent or gated.
        ImportError: transformers is not installed.
    """
    if combine not in ("max", "logsumexp"):
        raise ValueError(f"combine is {combine!r}, expected 'max' or 'logsumexp'")
    classes, told = loading.classes(checkpoint, label)
    kind, precision = "AutoModelForImageClassification", loading.as_dtype(dtype)

    def part(samples: Any, _: Any) -> Tensor:
        where = vision.place(samples, device)
        samples = samples.to(where) if isinstance(samples, Tensor) else samples
        network = loading.load(kind, checkpoint, where, precision, allow_pickle)
        inputs = vision.preprocessor(checkpoint)(samples).to(where, precision)
        chosen = network(pixel_values=inputs).logits.double().log_softmax(1)[:, classes]
        return chosen.amax(1) if combine == "max" else chosen.logsumexp(1)

    def fn(samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        return loading.micro_batches(part, samples, None, batch_size)

    return Reward(fn, f"ImageClassifier({checkpoint}, {told})")
