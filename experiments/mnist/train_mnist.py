"""Train the embedded MNIST model (`backends/models/mnist.py`) and export its weights.

    loss = E_{k, x_0, eps} || v_theta(x_k, k) - v_k ||^2
    v_k  = sqrt(alpha_bar_k) eps - sqrt(1 - alpha_bar_k) x_0

AdamW with warm-up, a flat stretch and a cosine cool-down to zero over the last part of the run, so
that `--epochs` can still be changed before the cool-down; EMA with warm-up. Every epoch ends with
an atomic checkpoint, one line of the curve and an export of the EMA weights. Draws of epoch e
depend on (seed, e) only, so a resumed run repeats an uninterrupted one.

    python -m experiments.mnist.train_mnist --data mnist.npz --out checkpoints/mnist
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from treesearch.backends.models.mnist import TRAIN_STEPS, build_network, cosine_alphas_cumprod
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train
from treesearch.offline.arrays import read_npz

FIELDS = ["epoch", "step", "lr", "train_v_mse", "test_v_mse_ema", "images_per_s", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """npz file with train_x, test_x: uint8 images (n, 28, 28)."""
    out: Path
    """Folder for the checkpoint; training goes on from the one found there."""
    weights: Path = Path("checkpoints/mnist.safetensors")
    """Where the EMA weights are exported, in float16, after every `export_every`-th epoch."""
    curve: Path = Path("runs/results/mnist/curve.csv")
    epochs: int = 11
    export_every: int = 1
    batch_size: int = 128
    lr: float = 1.5e-3
    warmup: int = 300
    """Optimiser steps of linear warm-up."""
    cooldown: float = 0.45
    """Last fraction of the run over which lr falls to zero."""
    weight_decay: float = 0.01
    ema: float = 0.999
    limit: int | None = None
    """Use only this many training images (smoke runs)."""
    threads: int = 2
    seed: int = 0


def load_images(path: Path, split: str, limit: int | None = None) -> Tensor:
    """Images as a uint8 tensor (n, 1, 28, 28)."""
    return torch.from_numpy(read_npz(path, [f"{split}_x"])[f"{split}_x"][:limit]).unsqueeze(1)


def noised(x0: Tensor, alpha_bar: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_k, the timestep index and the target v, with k stratified over the batch."""
    n = len(x0)
    index = stratified(n, TRAIN_STEPS, rng)
    a = alpha_bar[index].sqrt().float().view(-1, 1, 1, 1)
    s = (1 - alpha_bar[index]).sqrt().float().view(-1, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=rng)
    return a * x0 + s * eps, index, a * eps - s * x0


def batches(images: Tensor, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Shuffled full batches in [-1, 1]."""
    order = torch.randperm(len(images), generator=rng)
    for rows in order[: len(order) // size * size].split(size):
        yield images[rows].float() / 127.5 - 1


@torch.no_grad()
def test_loss(ema: nn.Module, images: Tensor, seed: int) -> float:
    """v-MSE of the EMA weights on test images, the same draws every time."""
    rng = torch.Generator().manual_seed(seed)
    alpha_bar = cosine_alphas_cumprod()
    losses = []
    for x0 in batches(images, min(250, len(images)), rng):
        x, index, v = noised(x0, alpha_bar, rng)
        losses.append(F.mse_loss(ema(x, index), v).item())
    return sum(losses) / len(losses)


def losses(network: nn.Module, images: Tensor, args: Args, epoch: int) -> Iterator[Tensor]:
    """One pass over the data."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    alpha_bar = cosine_alphas_cumprod()
    for x0 in batches(images, args.batch_size, rng):
        x, index, v = noised(x0, alpha_bar, rng)
        yield F.mse_loss(network(x, index), v)


def plan_of(args: Args, images: int) -> Plan:
    """How weights move, over so many images an epoch."""
    return Plan(
        epochs=args.epochs,
        steps=images // args.batch_size,
        lr=args.lr,
        warmup=args.warmup,
        cooldown=args.cooldown,
        weight_decay=args.weight_decay,
        ema=args.ema,
    )


def export(ema: nn.Module, path: Path) -> None:
    """EMA weights as float16 safetensors, replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file({name: w.half().contiguous() for name, w in ema.state_dict().items()}, part)
    part.chmod(0o644)
    part.replace(path)


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data, "train", args.limit)
    test = load_images(args.data, "test", 2000 if args.limit is None else args.limit)
    plan = plan_of(args, len(images))
    state = create(build_network, plan, args.seed, args.out)

    def after(loss: float, seconds: float) -> None:
        if state.epoch % args.export_every == 0 or state.epoch == args.epochs:
            export(state.ema, args.weights)
        lr, rate = plan.learning_rate(state.step - 1), plan.steps * args.batch_size / seconds
        values = (state.epoch, state.step, lr, loss, test_loss(state.ema, test, args.seed + 1), rate, seconds)
        append_row(args.curve, dict(zip(FIELDS, values, strict=True)))

    train(state, plan, partial(losses, state.network, images, args), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
