"""Train a small masked language model on film reviews, acceptable sentences and records, and export it.

    bound = E_{t, x_0} 1/t Σ_{masked i} -log p_θ(x_0[i] | x_t)      t uniform on (0, 1], each token masked with t
    loss  = E_{t, x_0}   2 Σ_{masked i} -log p_θ(x_0[i] | x_t) / L

The bound of masked diffusion with log-linear noise is what the curve has; the loss weighs every masked token alike,
which has the same minimum at each t and less noise. Of most records only the fields are masked: sentence and structure
are what a scaffold knows. AdamW with warm-up, a flat stretch and a cosine cool-down, EMA, bfloat16 where autocast says
so. Every epoch (a number of optimiser steps) ends with an atomic checkpoint, one line of the curve and an export of the
EMA weights. Draws of epoch e depend on (seed, e) only, so a resumed run repeats an uninterrupted one.

    python -m experiments.text.train_text --data FOLDER --out checkpoints/text

FOLDER holds rt-polarity.pos, rt-polarity.neg and cola_in_domain_train.tsv. The curve has the bound in nats a token of
held-out reviews, on the same draws every time; padding behind the end is counted to the text that it ends.

Source: Simple and Effective Masked Diffusion Language Models (Sahoo et al., 2024), eq. 10.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.text import corpus
from treesearch.backends.text.own import MaskedTransformer, OwnTokenizer, Size, save_own
from treesearch.backends.training.loop import Plan, append_row, create, train

FIELDS = ["epoch", "step", "lr", "train_loss", "test_nats_a_token", "rows_per_s", "seconds"]
LOWEST = 0.02  # of t


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """Folder of rt-polarity.pos, rt-polarity.neg and cola_in_domain_train.tsv."""
    out: Path
    """Folder of checkpoint, tokenizer and curve; training goes on from what is found there."""
    weights: Path = Path("checkpoints/text.safetensors")
    """Where the EMA weights are exported, in float16, after every epoch."""
    vocabulary: int = 2048
    length: int = 64
    width: int = 128
    depth: int = 6
    heads: int = 4
    records: float = 0.3
    """Share of records among the rows of a batch."""
    conditional: float = 0.8
    """Share of records of which the fields alone are masked."""
    epochs: int = 20
    steps: int = 200
    """Optimiser steps an epoch."""
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 200
    cooldown: float = 0.5
    """Last fraction of the run over which lr falls to zero."""
    weight_decay: float = 0.05
    ema: float = 0.999
    threads: int = 1
    seed: int = 0


def levels(n: int, rng: torch.Generator) -> Tensor:
    """t of n rows, one from each n-th part of (LOWEST, 1]."""
    u = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    return (LOWEST + (1 - LOWEST) * u)[torch.randperm(n, generator=rng)]


def masked_nats(
    network: nn.Module, rows: Tensor, open_: Tensor, mask: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Nats (n, L) of the masked among the open positions (n, L) of rows (n, L), 0 elsewhere, and t (n, 1)."""
    t = levels(len(rows), rng)[:, None]
    hidden = open_ & (torch.rand(rows.shape, generator=rng) < t)
    logits = network(rows.masked_fill(hidden, mask), hidden)
    nats = torch.zeros(rows.shape)
    nats[hidden] = F.cross_entropy(logits.float(), rows[hidden], reduction="none")
    return nats, t


def batch(
    texts: Tensor, made: corpus.Rows, args: Args, draw: random.Random, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows (n, L) and which of their positions are open."""
    count = round(args.records * args.batch_size)
    picked = texts[torch.randint(len(texts), (args.batch_size - count,), generator=rng)]
    told = [made.record(draw) for _ in range(count)]
    fields = torch.tensor([inside for _, inside in told], dtype=torch.bool).reshape(count, args.length)
    whole = torch.rand(count, 1, generator=rng) >= args.conditional
    rows = torch.cat([picked, torch.tensor([row for row, _ in told], dtype=torch.int64).reshape(count, args.length)])
    return rows, torch.cat([torch.ones_like(picked, dtype=torch.bool), fields | whole])


def losses(network: nn.Module, texts: Tensor, made: corpus.Rows, args: Args, epoch: int) -> Iterator[Tensor]:
    """One epoch."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    draw = random.Random(f"{args.seed}/{epoch}")
    torch.manual_seed(1_000_003 * args.seed + epoch)  # of dropout
    for _ in range(args.steps):
        rows, open_ = batch(texts, made, args, draw, rng)
        with torch.autocast("cpu", torch.bfloat16):
            nats, _ = masked_nats(network, rows, open_, made.tokenizer.mask_token_id, rng)
        yield 2 * nats.mean()


@torch.no_grad()
def test_bound(ema: nn.Module, rows: Tensor, made: corpus.Rows, seed: int) -> float:
    """Nats a token of held-out rows."""
    rng, ema = torch.Generator().manual_seed(seed), ema.eval()
    everything = torch.ones_like(rows, dtype=torch.bool)
    mask = made.tokenizer.mask_token_id
    parts = [masked_nats(ema, part, everything[: len(part)], mask, rng) for part in rows.split(64)]
    return float(sum((nats / t).sum() for nats, t in parts)) / int((rows != made.pad).sum())


def tokenizer_in(out: Path, lines: list[str], args: Args) -> str:
    """The tokenizer of a folder, trained once."""
    path = out / "tokenizer.json"
    if not path.exists():
        spoken = corpus.spoken(random.Random(args.seed), len(lines) // 4 + 50)
        path.write_text(corpus.tokenizer_of([*lines, *spoken], args.vocabulary), "utf-8")
    return path.read_text("utf-8")


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    training, held = corpus.split(corpus.reviews(args.data))
    training += corpus.acceptable(args.data)
    text = tokenizer_in(args.out, training, args)
    made = corpus.Rows(OwnTokenizer(text), args.length)
    texts, test = (torch.tensor([made.text(line) for line in lines]) for lines in (training, held))
    size = Size(
        vocabulary=len(made.tokenizer.get_vocab()),
        length=args.length,
        width=args.width,
        depth=args.depth,
        heads=args.heads,
    )
    plan = Plan(
        epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown,
        weight_decay=args.weight_decay, ema=args.ema,
    )  # fmt: skip
    state = create(lambda: MaskedTransformer(size), plan, args.seed, args.out)

    def after(loss: float, seconds: float) -> None:
        found = test_bound(state.ema, test, made, args.seed + 1)
        about = {"epochs": state.epoch, "steps": state.step, "test_nats_a_token": round(found, 4), "seed": args.seed}
        save_own(state.ema, text, args.weights, about)
        lr, rate = plan.learning_rate(state.step - 1), plan.steps * args.batch_size / seconds
        values = (state.epoch, state.step, lr, loss, found, rate, seconds)
        append_row(args.out / "curve.csv", dict(zip(FIELDS, values, strict=True)))

    train(state, plan, partial(losses, state.network.train(), texts, made, args), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
