"""Teach small classifiers of sentiment and of acceptability, a reward and a judge of each, and say how well they do.

    python -m experiments.text.train_classifiers --data FOLDER --out checkpoints/classifiers

FOLDER holds rt-polarity.pos and rt-polarity.neg. Sentiment tells positive from negative reviews; acceptability tells
real reviews from unguided draws of the masked model, so that it is of this model alone. A tenth of the sentences is
held out; of the others a reward learns from every other one, on n-grams of words, and its judge from the rest, on
n-grams of letters: no sentence teaches both.

    min_W  mean log(1 + exp(-y z)) + c/2n |W|²        z = b + 1/√m Σ_g W_g ρ_g,   ρ_g the log-ratio of counts of g

A line of JSON a classifier: accuracy on what was held out, its standard error, and Matthews' correlation.

Source: Baselines and Bigrams (Wang and Manning, 2012).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import treesearch as ts
from experiments.text import corpus
from treesearch.backends import small_text
from treesearch.rewards.analytic import constant
from treesearch.rewards.text.ngrams import BUCKETS, NGrams, grams, save_ngrams

UNITS = {"reward": "words", "judge": "letters"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """Folder of rt-polarity.pos and rt-polarity.neg."""
    out: Path = Path("checkpoints/classifiers")
    which: tuple[str, ...] = ("sentiment", "acceptability")
    """Which of the two."""
    weights: str = "text.safetensors"
    """The masked model whose draws are told from real sentences."""
    num_steps: int = 16
    """Of its draws."""
    length: int = 32
    """Tokens of a draw, to which real sentences are cut."""
    draws: int = 5000
    """How many, and as many real sentences."""
    ridge: float = 0.1
    """c."""
    smoothing: float = 1.0
    """Added to every count."""
    threads: int = 1
    seed: int = 0


class Labelled(NamedTuple):
    """Sentences and the numbers of their classes."""

    texts: list[str]
    classes: list[int]


def sentiment(args: Args) -> tuple[tuple[str, str], Labelled]:
    """Negative and positive reviews."""
    both = [corpus.lines(args.data / f"rt-polarity.{end}") for end in ("neg", "pos")]
    return ("negative", "positive"), _labelled(both)


def acceptability(args: Args) -> tuple[tuple[str, str], Labelled]:
    """Draws of the model, and as many reviews as its tokenizer writes them."""
    kernel = small_text(args.weights, num_steps=args.num_steps, length=args.length)
    budget = ts.Budget(nfe=args.draws * args.num_steps)
    drawn = ts.search(kernel, constant(0.0), ts.BestOfN(), budget=budget, seed=args.seed).samples
    every = corpus.reviews(args.data)
    picked = torch.randperm(len(every), generator=torch.Generator().manual_seed(args.seed))[: args.draws]
    rows = [corpus.Rows(kernel.words.tokenizer, kernel.length).text(every[i]) for i in picked.tolist()]
    return ("drawn", "real"), _labelled([drawn, kernel.decode(torch.tensor(rows))])


TASKS = {"sentiment": sentiment, "acceptability": acceptability}


def _labelled(classes: Sequence[Sequence[str]]) -> Labelled:
    return Labelled([x for texts in classes for x in texts], [k for k, texts in enumerate(classes) for _ in texts])


def parts(data: Labelled, seed: int) -> dict[str, Labelled]:
    """Sentences for a reward, for its judge and for neither."""
    order = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    test, rest = order[: len(order) // 10], order[len(order) // 10 :]
    rows = {"test": test, "reward": rest[::2], "judge": rest[1::2]}
    return {name: Labelled([data.texts[i] for i in at], [data.classes[i] for i in at]) for name, at in rows.items()}


def taught(labels: Sequence[str], unit: str, data: Labelled, args: Args) -> NGrams:
    """A classifier of two classes."""
    bags = [grams(text, unit) for text in data.texts]
    row = torch.tensor([i for i, bag in enumerate(bags) for _ in bag])
    bucket = torch.tensor([b for bag in bags for b in bag])
    y, size = torch.tensor(data.classes).double(), torch.tensor([len(bag) for bag in bags]).double()
    ratio = log_ratio(row, bucket, y, args.smoothing)
    inputs = ratio[bucket] / size[row].sqrt()
    w, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (BUCKETS, 1))

    def loss() -> Tensor:
        z = torch.zeros(len(y), dtype=torch.float64).index_add(0, row, inputs * w[bucket]) + b
        return F.binary_cross_entropy_with_logits(z, y) + args.ridge / 2 / len(y) * w.square().sum()

    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    network = NGrams(labels, unit).requires_grad_(False)
    network.weight.copy_((w * ratio)[:, None])
    network.bias.copy_(b)
    return network


def log_ratio(row: Tensor, bucket: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """ρ (BUCKETS,) of texts' buckets; 0 of those in no text."""
    share = []
    for of in (y, 1 - y):
        count = torch.zeros(BUCKETS, dtype=torch.float64).index_add(0, bucket, of[row]) + smoothing
        share.append((count / count.sum()).log())
    seen = torch.zeros(BUCKETS, dtype=torch.bool).index_fill(0, bucket, True)
    return torch.where(seen, share[0] - share[1], 0.0)


def graded(network: NGrams, data: Labelled) -> dict[str, float]:
    """Accuracy, its standard error and Matthews' correlation."""
    said, true = network(data.texts).argmax(1).double(), torch.tensor(data.classes).double()
    right = float((said == true).double().mean())
    spread = float(said.std(correction=0) * true.std(correction=0))
    matthews = float(((said - said.mean()) * (true - true.mean())).mean()) / spread if spread else 0.0
    error = math.sqrt(right * (1 - right) / len(true))
    return {"accuracy": round(right, 4), "se": round(error, 4), "matthews": round(matthews, 4), "sentences": len(true)}


def main(args: Args) -> list[dict[str, object]]:
    """Teach all four; returns the printed rows."""
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    for name in args.which:
        labels, data = TASKS[name](args)
        given = parts(data, args.seed)
        for role, unit in UNITS.items():
            network = taught(labels, unit, given[role], args)
            row = {"task": name, "role": role, "unit": unit, **graded(network, given["test"])}
            end = "" if role == "reward" else "_judge"
            save_ngrams(network, args.out / f"text_{name}{end}.safetensors", row | {"seed": args.seed})
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
