"""A small text classifier of our own: a linear function of the hashed n-grams that a text has.

    log p(c | x) = log softmax(b + 1/√n Σ_g W[h(g)])_c      g one of n n-grams of words (1, 2) or letters (3 to 5)

It is read from one file of safetensors, which names its classes. Two of them on different n-grams, taught on different
sentences, are a reward and a judge that do not err alike.

Source: Baselines and Bigrams (Wang and Manning, 2012), whose weights start from the log-ratio of counts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treesearch.rewards import loading
from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.text.texts import TEXTS, checked

UNITS = {"words": range(1, 3), "letters": range(3, 6)}
BUCKETS = 2**17


def grams(text: str, unit: str) -> list[int]:
    """Buckets of the n-grams of a text, each once, at least one."""
    parts = text.lower().split() if unit == "words" else f" {' '.join(text.lower().split())} "
    joined = " ".join if unit == "words" else "".join
    found = {joined(parts[i : i + n]) for n in UNITS[unit] for i in range(len(parts) - n + 1)}
    return sorted({zlib.crc32(gram.encode("utf-8", "surrogatepass")) % BUCKETS for gram in found or {""}})


class NGrams(nn.Module):
    """Logits (n, C) of n texts, those of the first class 0."""

    def __init__(self, labels: Sequence[str], unit: str = "words") -> None:
        super().__init__()
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}, expected one of {', '.join(UNITS)}")
        self.labels, self.unit = tuple(labels), unit
        self.weight = nn.Parameter(torch.zeros(BUCKETS, len(labels) - 1))
        self.bias = nn.Parameter(torch.zeros(len(labels) - 1))

    def forward(self, texts: Sequence[str]) -> Tensor:
        rows = [grams(text, self.unit) for text in texts]
        sums = torch.stack([self.weight[row].sum(0) / len(row) ** 0.5 for row in rows]) + self.bias
        return torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)


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
    """A classifier from its file, or from a shipped one by name, in float32, without gradients to weights; read once.

    Raises:
        CheckpointError: no such file, or one of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with resources.as_file(_file(path)) as found, safe_open(found, framework="pt") as file:
            says, weights = file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        with torch.device("cpu"):  # whatever torch's default device and dtype
            network = NGrams(json.loads(says["labels"]), says["unit"]).float()
        network.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise loading.CheckpointError(f"{path} holds no classifier of n-grams: {error}") from error
    return network.eval().requires_grad_(False)


def _file(path: str) -> Any:
    """The file of a path, else the shipped one of that name."""
    shipped = resources.files("treesearch.rewards").joinpath("weights", path)
    return shipped if not Path(path).is_file() and Path(path).name == path and shipped.is_file() else Path(path)


@facts(
    range="-inf to 0",
    differentiable=False,
    memory="1 MB",
    limits=f"{TEXTS}; film reviews in lower case, for the shipped ones",
    source="Wang and Manning 2012, Baselines and Bigrams",
)
def ngrams(path: str, label: str) -> Reward:
    """r = log p(label | x) of a small classifier.

    Args:
        path: a file that `save_ngrams` wrote, by `experiments.text.train_classifiers` say, or the name of a shipped
            one: "text_sentiment.safetensors" (negative, positive), "text_acceptability.safetensors" (drawn, real).
        label: one of its classes.

    Raises:
        CheckpointError: no such file, or one of another kind.
        ValueError: a label that it does not know.
    """
    if Path(path).is_file():
        path = str(Path(path).absolute())  # it stays this file, wherever the process goes
    labels = load_ngrams(path).labels
    if label not in labels:
        raise ValueError(f"{path} has no label {label!r}: it has {', '.join(labels)}")
    column = labels.index(label)

    def fn(samples: Any, _: Any) -> Tensor:
        return load_ngrams(path)(checked(samples)).double().log_softmax(1)[:, column]

    return Reward(fn, f"ngrams({Path(path).name}, {label})")
