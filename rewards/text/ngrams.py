"""A small text classifier of our own: a bag of hashed n-grams, their mean embedding and a linear head.

    log p(c | x) = log softmax(W 1/n Σ_g E[h(g)] + b)_c        g the n-grams of words (1, 2) or of letters (3 to 5) of x

It is read from one file of safetensors, which names its classes. Two of them on different n-grams, taught on different
sentences, are a reward and a judge that do not err alike.

Source: Bag of Tricks for Efficient Text Classification (Joulin et al., 2017).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.text.texts import TEXTS, checked

UNITS = {"words": range(1, 3), "letters": range(3, 6)}
BUCKETS = 2**15


def grams(text: str, unit: str) -> list[int]:
    """Buckets of the n-grams of a text, at least one."""
    parts = text.lower().split() if unit == "words" else f" {' '.join(text.lower().split())} "
    joined = " ".join if unit == "words" else "".join
    found = [joined(parts[i : i + n]) for n in UNITS[unit] for i in range(len(parts) - n + 1)]
    return [zlib.crc32(gram.encode("utf-8", "surrogatepass")) % BUCKETS for gram in found or [""]]


class NGrams(nn.Module):
    """Logits (n, C) of n texts."""

    def __init__(self, labels: Sequence[str], unit: str = "words", width: int = 16) -> None:
        super().__init__()
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}, expected one of {', '.join(UNITS)}")
        self.labels, self.unit = tuple(labels), unit
        self.embed = nn.EmbeddingBag(BUCKETS, width, mode="mean")
        self.head = nn.Linear(width, len(labels))

    def forward(self, texts: Sequence[str]) -> Tensor:
        rows = [grams(text, self.unit) for text in texts]
        starts = torch.tensor([0, *map(len, rows)], device="cpu")[:-1].cumsum(0)
        flat = torch.tensor([bucket for row in rows for bucket in row], dtype=torch.int64, device="cpu")
        return self.head(self.embed(flat, starts))


def save_ngrams(network: NGrams, path: Path, card: dict[str, Any] | None = None) -> None:
    """Write a classifier as one file, weights in float16, replaced atomically; `card` is how it came about."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().half().contiguous() for name, w in network.state_dict().items()}
    says = {"labels": json.dumps(network.labels), "unit": network.unit, "card": json.dumps(card)}
    part = path.with_suffix(".tmp")
    save_file(weights, part, says)
    part.chmod(0o644)
    part.replace(path)


@loading.once
def load_ngrams(path: str) -> NGrams:
    """A classifier from its file, in float32, without gradients to weights; read once.

    Raises:
        CheckpointError: no such file, or one of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            says, weights = file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        with torch.device("cpu"):  # whatever torch's default device and dtype
            network = NGrams(json.loads(says["labels"]), says["unit"], weights["head.weight"].shape[1]).float()
        network.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise loading.CheckpointError(f"{path} holds no classifier of n-grams: {error}") from error
    return network.eval().requires_grad_(False)


@facts(
    range="-inf to 0",
    differentiable=False,
    memory="1 MB",
    limits=TEXTS,
    source="Joulin et al. 2017, Bag of Tricks for Efficient Text Classification",
)
def ngrams(path: str, label: str) -> Reward:
    """r = log p(label | x) of a small classifier.

    Args:
        path: a file that `save_ngrams` wrote, by `experiments.text.train_classifiers` say.
        label: one of its classes.

    Raises:
        CheckpointError: no such file, or one of another kind.
        ValueError: a label that it does not know.
    """
    labels = load_ngrams(path).labels
    if label not in labels:
        raise ValueError(f"{path} has no label {label!r}: it has {', '.join(labels)}")
    column = labels.index(label)

    def fn(samples: Any, _: Any) -> Tensor:
        return load_ngrams(path)(checked(samples)).double().log_softmax(1)[:, column]

    return Reward(fn, f"ngrams({Path(path).name}, {label})")
