"""Train the network of scenes (`experiments/interventions/scenes.py`): minutes on one core.

    loss = E_{scene, t, ε} || v_θ(x_t, t, c) - (√ᾱ ε - √(1 - ᾱ) x_0) ||²

A fifth of the pictures has its shadow somewhere, which the prompt then states, and no light. Prompts of the others
state the light with probability 0.7 and the shadow with 0.15. One prompt in ten states nothing. AdamW with warm-up and
a cosine cool-down, an average of the weights. Every epoch ends with a checkpoint and a line of the curve, and draws of
epoch e depend on (seed, e) only.

    python -m experiments.interventions.train_scenes --out checkpoints/scenes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.interventions.scenes import SceneNetwork, condition, drawn, elsewhere, scenes
from experiments.mnist.train_mnist import export
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train

LIT, SHADED, EMPTY = 0.7, 0.15, 0.1  # shares of prompts that state the light, the shadow, nothing
ELSEWHERE = 0.2  # of pictures with a shadow that no light throws


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path
    """Folder for the checkpoint, the curve and the weights; training goes on from the checkpoint found there."""
    epochs: int = 14
    steps: int = 250
    """Optimiser steps an epoch."""
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.6
    ema: float = 0.99
    threads: int = 1
    seed: int = 0


class Table:
    """Training scenes: pictures in [-1, 1], and conditions with light and shadow stated or not (n, 4, WIDTH)."""

    def __init__(self) -> None:
        lit, others = scenes(held_out=False), elsewhere()
        forms = [[s.unlit, s.prompt, s._replace(light=None, shadow=s.place).prompt, s.expanded] for s in lit]
        self.lit, self.sizes = torch.stack([condition(each) for each in forms]), (len(lit), len(others))
        self.others = condition([scene.prompt for scene in others])
        self.pictures = 2 * torch.stack([drawn(scene) for scene in [*lit, *others]]) - 1

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures and conditions of n prompts."""
        row, other = (torch.randint(size, (n,), generator=rng) for size in self.sizes)
        lit, shaded, empty, away = (torch.rand(n, generator=rng) < p for p in (LIT, SHADED, EMPTY, ELSEWHERE))
        told = torch.where(away[:, None], self.others[other], self.lit[row, lit.long() + 2 * shaded.long()])
        return self.pictures[torch.where(away, len(self.lit) + other, row)], torch.where(empty[:, None], 0.0, told)


def losses(network: nn.Module, table: Table, args: Args, epoch: int) -> Iterator[Tensor]:
    """An epoch of random batches."""
    rng, bars = torch.Generator().manual_seed(1_000_003 * args.seed + epoch), cosine_alphas_cumprod()
    for _ in range(args.steps):
        x0, told = table.draw(args.batch_size, rng)
        t = stratified(len(x0), len(bars), rng)
        alpha, sigma = (b[t].sqrt().float()[:, None, None, None] for b in (bars, 1 - bars))
        eps = torch.randn(x0.shape, generator=rng)
        yield F.mse_loss(network(alpha * x0 + sigma * eps, t, told), alpha * eps - sigma * x0)


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table()
    plan = Plan(epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown,
                ema=args.ema)  # fmt: skip
    state = create(SceneNetwork, plan, args.seed, args.out)

    def after(loss: float, seconds: float) -> None:
        export(state.ema, args.out / "weights.safetensors")
        append_row(args.out / "curve.csv", {"epoch": state.epoch, "train_v_mse": loss, "seconds": seconds})

    train(state, plan, lambda epoch: losses(state.network, table, args, epoch), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
