"""Train the painter (`experiments/pie_mini/painter.py`): six minutes on one core.

    loss = E_{scene, backdrop, t, ε} || v_θ(x_t, t, c) - (√ᾱ ε - √(1 - ᾱ) x_0) ||²

One picture in eight shows nothing, and one prompt in ten says nothing ("", which is ∅). AdamW with warm-up and a cosine
cool-down, an average of the weights. Every epoch ends with a checkpoint and a line of the curve, and draws of epoch e
depend on (seed, e) only.

    python -m experiments.pie_mini.train --out checkpoints/painter
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.interventions.scenes import drawn
from experiments.mnist.train_mnist import export
from experiments.pie_mini.painter import parts, pipeline
from experiments.pie_mini.pictures import backdrops, cover, every_scene, prompt_of
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train

BARE, EMPTY = 0.12, 0.1  # shares of pictures of nothing, and of prompts that say nothing


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path
    """Folder for the checkpoint, the curve and the weights; training goes on from the checkpoint found there."""
    epochs: int = 7
    steps: int = 250
    """Optimiser steps an epoch."""
    batch_size: int = 48
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.28
    ema: float = 0.995
    threads: int = 1
    seed: int = 0


class Table:
    """Training pictures in [-1, 1] and tokens of their prompts; the last scene is nothing."""

    def __init__(self, words: Any) -> None:
        scenes = every_scene()
        self.drawn = torch.stack([*(drawn(scene) for scene in scenes), torch.zeros(3, 16, 16)])
        self.cover = torch.stack([cover(scene) for scene in (*scenes, None)])[:, None]
        texts = [*(prompt_of(scene) for scene in (*scenes, None)), ""]
        self.tokens = words(texts, padding="max_length", return_tensors="pt").input_ids

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures and tokens of n prompts."""
        last = len(self.drawn) - 1
        scene = torch.randint(last, (n,), generator=rng)
        bare, empty = (torch.rand(n, generator=rng) < share for share in (BARE, EMPTY))
        scene = torch.where(bare, last, scene)
        behind = torch.stack([each.picture for each in backdrops(n, rng)])
        pictures = torch.where(self.cover[scene], self.drawn[scene], behind)
        return 2 * pictures - 1, self.tokens[torch.where(empty, last + 1, scene)]


def losses(painter: nn.ModuleDict, bars: Tensor, table: Table, args: Args, epoch: int) -> Iterator[Tensor]:
    """An epoch of random batches."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    for _ in range(args.steps):
        x0, tokens = table.draw(args.batch_size, rng)
        t = stratified(len(x0), len(bars), rng)
        alpha, sigma = (b[t].sqrt().float()[:, None, None, None] for b in (bars, 1 - bars))
        eps = torch.randn(x0.shape, generator=rng)
        text = painter["text_encoder"](tokens)[0]
        v = painter["unet"](alpha * x0 + sigma * eps, t, text, return_dict=False)[0]
        yield F.mse_loss(v, alpha * eps - sigma * x0)


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = pipeline()
    table, bars = Table(pipe.tokenizer), pipe.scheduler.alphas_cumprod
    plan = Plan(epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown,
                ema=args.ema)  # fmt: skip
    state = create(lambda: parts(pipeline()), plan, args.seed, args.out)

    def after(loss: float, seconds: float) -> None:
        export(state.ema, args.out / "weights.safetensors")
        append_row(args.out / "curve.csv", {"epoch": state.epoch, "train_v_mse": loss, "seconds": seconds})

    network: Any = state.network
    train(state, plan, lambda epoch: losses(network, bars, table, args, epoch), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
