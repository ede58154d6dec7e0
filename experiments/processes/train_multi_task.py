"""Train the model of digits and labels (`backends/models/multi_task.py`), or its label head alone for comparison.

    loss = E || (Ê_1 - E_1) / c(t) ||² + λ CE(p_θ(y | image part of z_t), y)
    c(t)² = s² σ² / (α² s² + σ²),  s² the variance of pixels

In half of the rows the network is told the label, which its head does not see. `--task label` trains the same network
on the second term alone: a noise-aware classifier of the same size. AdamW with warm-up and a cosine cool-down, an
average of the weights, convolutions in bfloat16; draws of epoch e depend on (seed, e) only.

    python -m experiments.processes.train_multi_task --data mnist.npz --out checkpoints/mt
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.mnist.train_classifiers import load_split
from experiments.mnist.train_mnist import export
from experiments.processes.train_spd import hasten
from treesearch.backends.base import expand
from treesearch.backends.models.mnist import TRAIN_STEPS
from treesearch.backends.models.multi_task import SPREAD, UNKNOWN, MultiTaskNetwork
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train

TOLD = 2  # one row in so many is told its label


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """npz file with train_x, train_y, test_x, test_y: uint8 images (n, 28, 28) and labels."""
    out: Path
    """Folder for the checkpoint, the curve and the weights; training goes on from the checkpoint found there."""
    task: Literal["joint", "label"] = "joint"
    epochs: int = 24
    steps: int = 500
    """Optimiser steps an epoch."""
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.6
    ema: float = 0.99
    labels: float = 0.3
    """λ, the weight of the labels' cross-entropy."""
    limit: int | None = None
    """Use only this many training images (smoke runs)."""
    threads: int = 1
    seed: int = 0


def states(network: MultiTaskNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """E (n, 2, 28, 28) of uint8 images and their labels."""
    return torch.cat([images.float() / 127.5 - 1, network.plane(F.one_hot(labels, 10).float())], 1)


def terms(
    network: MultiTaskNetwork, e: Tensor, labels: Tensor, told: Tensor | None, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Both terms of the loss, of states E at levels stratified over the batch.

    Args:
        network: as said.
        e: E (n, 2, 28, 28).
        labels: (n,).
        told: labels that the network is told (n,), `UNKNOWN` in other rows; None for none.
        rng: draws levels and noise.
    """
    index = stratified(len(e), TRAIN_STEPS, rng)
    alpha, sigma = expand(network.alpha[index], e), expand(network.sigma[index], e)
    ends, seen, _ = network(alpha * e + sigma * torch.randn(e.shape, generator=rng), index, told)
    scale = SPREAD * sigma / ((alpha * SPREAD) ** 2 + sigma**2).sqrt()
    images = ((ends[:, :1] - e[:, :1]) / scale).square().mean()
    return images, F.cross_entropy(seen, labels)


def losses(network: MultiTaskNetwork, data: tuple[Tensor, Tensor], args: Args, epoch: int) -> Iterator[Tensor]:
    """An epoch of random batches."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    for _ in range(args.steps):
        rows = torch.randint(len(data[0]), (args.batch_size,), generator=rng)
        labels = data[1][rows]
        blind = torch.randperm(len(labels), generator=rng) >= len(labels) // TOLD
        told = torch.where(blind, UNKNOWN, labels) if args.task == "joint" else None
        images, of_labels = terms(network, states(network, data[0][rows], labels), labels, told, rng)
        yield images + args.labels * of_labels if args.task == "joint" else of_labels


@torch.no_grad()
def test_terms(network: MultiTaskNetwork, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Both terms on test images, the same draws every time."""
    images, labels = data
    rng = torch.Generator().manual_seed(1)
    parts = [float(v) for v in terms(network, states(network, images, labels), labels, None, rng)]
    return parts[0], parts[1]


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    data, test = load_split(args.data, "train", args.limit), load_split(args.data, "test", 1000)
    plan = Plan(epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown,
                ema=args.ema)  # fmt: skip
    state = create(MultiTaskNetwork, plan, args.seed, args.out)
    network: MultiTaskNetwork = state.network  # pyright: ignore[reportAssignmentType]
    hasten(network.unet)

    def after(loss: float, seconds: float) -> None:
        export(state.ema, args.out / "weights.safetensors")
        images, labels = test_terms(state.ema, test)  # pyright: ignore[reportArgumentType]
        row = {"epoch": state.epoch, "step": state.step, "train_loss": loss, "test_image": images, "test_ce": labels}
        append_row(args.out / "curve.csv", row | {"seconds": seconds})

    train(state, plan, lambda epoch: losses(network, data, args, epoch), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
