"""Train small classifiers of sentiment and of acceptability, a reward and a judge of each, and say how well they do.

    python -m experiments.text.train_classifiers --data FOLDER --out checkpoints

FOLDER holds rt-polarity.pos, rt-polarity.neg and cola_in_domain_train.tsv. A tenth of the sentences is held out; of the
others a reward learns from every other one, on n-grams of words, and its judge from the rest, on n-grams of letters: no
sentence teaches both. A line of JSON a classifier: accuracy on what was held out, its standard error, and Matthews'
correlation, since most sentences of the second are acceptable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.text import corpus
from treesearch.backends.training.loop import Plan, create, train
from treesearch.rewards.text.ngrams import NGrams, save_ngrams

UNITS = {"reward": "words", "judge": "letters"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """Folder of rt-polarity.pos, rt-polarity.neg and cola_in_domain_train.tsv."""
    out: Path = Path("checkpoints")
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.02
    weight_decay: float = 0.05
    drop: float = 0.3
    """Share of a sentence's words that is left out while it is learnt from."""
    threads: int = 1
    seed: int = 0


class Labelled(NamedTuple):
    """Sentences and the numbers of their classes."""

    texts: list[str]
    classes: list[int]


def tasks(folder: Path) -> dict[str, tuple[tuple[str, str], Labelled]]:
    """Classes and sentences by the name of what is told apart."""
    both = [corpus.lines(folder / f"rt-polarity.{end}") for end in ("neg", "pos")]
    told = [(text, k) for k, texts in enumerate(both) for text in texts]
    judged = corpus.judged(folder)
    return {
        "sentiment": (("negative", "positive"), Labelled(*map(list, zip(*told, strict=True)))),
        "acceptability": (("unacceptable", "acceptable"), Labelled(*map(list, zip(*judged, strict=True)))),
    }


def parts(data: Labelled, seed: int) -> dict[str, Labelled]:
    """Sentences for a reward, for its judge and for neither."""
    order = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    test, rest = order[: len(order) // 10], order[len(order) // 10 :]
    rows = {"test": test, "reward": rest[::2], "judge": rest[1::2]}
    return {name: Labelled([data.texts[i] for i in at], [data.classes[i] for i in at]) for name, at in rows.items()}


def losses(network: NGrams, data: Labelled, args: Args, epoch: int) -> Iterator[Tensor]:
    """One pass over the sentences."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    for rows in torch.randperm(len(data.texts), generator=rng).split(args.batch_size):
        texts = [_thinned(data.texts[i], args.drop, rng) for i in rows.tolist()]
        yield F.cross_entropy(network(texts), torch.tensor([data.classes[i] for i in rows.tolist()]))


def _thinned(text: str, drop: float, rng: torch.Generator) -> str:
    words = text.split()
    kept = torch.rand(len(words), generator=rng) >= drop
    return " ".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep)


def graded(network: NGrams, data: Labelled) -> dict[str, float]:
    """Accuracy, its standard error and Matthews' correlation."""
    said, true = network(data.texts).argmax(1).double(), torch.tensor(data.classes).double()
    right = float((said == true).double().mean())
    spread = float(said.std(correction=0) * true.std(correction=0))
    matthews = float(((said - said.mean()) * (true - true.mean())).mean()) / spread if spread else 0.0
    error = math.sqrt(right * (1 - right) / len(true))
    return {"accuracy": round(right, 4), "se": round(error, 4), "matthews": round(matthews, 4), "sentences": len(true)}


def main(args: Args) -> list[dict[str, object]]:
    """Train all four; returns the printed rows."""
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    for name, (labels, data) in tasks(args.data).items():
        given = parts(data, args.seed)
        for role, unit in UNITS.items():
            steps = -(-len(given[role].texts) // args.batch_size)
            plan = Plan(epochs=args.epochs, steps=steps, lr=args.lr, warmup=steps, cooldown=0.5,
                        weight_decay=args.weight_decay, ema=None)  # fmt: skip
            state = create(lambda labels=labels, unit=unit: NGrams(labels, unit), plan, args.seed, None)
            network = state.network
            assert isinstance(network, NGrams)
            train(state, plan, lambda epoch, n=network, d=given[role]: losses(n, d, args, epoch), None, lambda *_: None)
            with torch.no_grad():
                found = graded(network.eval(), given["test"])
            row = {"task": name, "role": role, "unit": unit, **found}
            save_ngrams(network, args.out / f"{name}_{role}.safetensors", row | {"seed": args.seed})
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
