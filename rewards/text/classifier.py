"""Any text classifier of transformers as a reward, and three by name.

    r(x) = log p(c | x)        several labels S: max over S, or log Σ_{c in S} p(c | x)

Sources: acceptability is that of Jain et al., Diffusion Tree Sampling (2025), and of Singhal et al., A General
Framework for Inference-time Scaling and Steering of Diffusion Models (2025), whose third reward is toxicity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.text.texts import TEXTS, checked

LONGEST = 2**16  # tokens of a text, where nothing says how many are read
READ = f"{TEXTS}; as many tokens as the checkpoint reads, the rest does not count"
COLA, SST, TOXIC = (
    "textattack/roberta-base-CoLA",
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "s-nlp/roberta_toxicity_classifier",
)


@facts(range="-inf to 0", differentiable=False, memory="the checkpoint's", limits=f"{READ}; labels that it knows")
def text_classifier(
    checkpoint: str,
    label: str | int | Sequence[str | int],
    *,
    combine: Literal["max", "logsumexp"] = "max",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    """r = log p(label | x) of texts.

    Args:
        checkpoint: anything that AutoModelForSequenceClassification reads, a hub id or a local folder.
        label: a name or an index, or several.
        combine: of several labels, the best one or the probability of any.
        device: to score on; None is the CPU.
        dtype: of the network; None is float32.
        batch_size: texts in one forward pass.
        allow_pickle: also read weights that are not safetensors, as tensors only.

    Raises:
        ValueError: a label that the checkpoint does not know, or a setting out of range.
        CheckpointError: the checkpoint is absent or gated.
        ImportError: transformers is not installed.
    """
    return _classifier(checkpoint, label, combine, device, dtype, batch_size, allow_pickle)


def _classifier(
    checkpoint: str,
    label: str | int | Sequence[str | int],
    combine: str = "max",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    if combine not in ("max", "logsumexp"):
        raise ValueError(f"combine is {combine!r}, expected 'max' or 'logsumexp'")
    classes, told = loading.classes(checkpoint, label)
    where, precision = str(device or "cpu"), loading.as_dtype(dtype)
    words = loading.load_part("AutoTokenizer", checkpoint)

    def part(texts: list[str], _: Any) -> Tensor:
        network = loading.load("AutoModelForSequenceClassification", checkpoint, where, precision, allow_pickle)
        longest = min(words.model_max_length, getattr(network.config, "max_position_embeddings", None) or LONGEST)
        inputs = words(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(where)
        with torch.no_grad():
            chosen = network(**inputs).logits.double().log_softmax(1)[:, classes]
        return (chosen.amax(1) if combine == "max" else chosen.logsumexp(1)).cpu()

    def fn(samples: Any, _: Sequence[Any] | None) -> Tensor:
        return loading.micro_batches(part, checked(samples), None, batch_size)

    return Reward(fn, f"text_classifier({checkpoint}, {told})")


@facts(
    range="-inf to 0",
    differentiable=False,
    checkpoint=COLA,
    licence="none stated",
    memory="0.5 GB",
    limits=READ,
    source="Jain et al. 2025, Diffusion Tree Sampling",
)
def acceptability(
    checkpoint: str = COLA,
    label: str | int = 1,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    """r = log p(acceptable | x), whether a text is a well-formed sentence; arguments as of `text_classifier`.

    Raises:
        CheckpointError: the checkpoint is absent, gated, or a pickle that was not allowed.
    """
    return _classifier(checkpoint, label, device=device, batch_size=batch_size, allow_pickle=allow_pickle)


@facts(
    range="-inf to 0",
    differentiable=False,
    checkpoint=SST,
    licence="Apache-2.0",
    memory="0.3 GB",
    limits=f"{READ}; English",
)
def sentiment(
    label: str | int = "POSITIVE",
    checkpoint: str = SST,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    """r = log p(positive | x), or of another label; arguments as of `text_classifier`.

    Raises:
        ValueError: a label that the checkpoint does not know.
        CheckpointError: the checkpoint is absent or gated.
    """
    return _classifier(checkpoint, label, device=device, batch_size=batch_size, allow_pickle=allow_pickle)


@facts(
    range="-inf to 0",
    differentiable=False,
    checkpoint=TOXIC,
    licence="OpenRAIL++",
    memory="0.5 GB",
    limits=f"{READ}; English",
    source="Singhal et al. 2025, A General Framework for Inference-time Scaling and Steering of Diffusion Models",
)
def toxicity(
    label: str | int = "toxic",
    checkpoint: str = TOXIC,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    allow_pickle: bool = False,
) -> Reward:
    """r = log p(toxic | x), to find what a model can be led to; label="neutral" leads away from it.

    Raises:
        ValueError: a label that the checkpoint does not know.
        CheckpointError: the checkpoint is absent, gated, or a pickle that was not allowed.
    """
    return _classifier(checkpoint, label, device=device, batch_size=batch_size, allow_pickle=allow_pickle)
