"""Train the shortest-path model of digits (`backends/models/shortest_path.py`), or the same network on the cosine path.

    loss = E_{τ, x_0, ε} || v_θ(x_τ, τ) - (α ε - σ x_0) ||²          τ stratified over the batch

AdamW with warm-up and a cosine cool-down, an average of the weights, convolutions in bfloat16. Every epoch of 250 steps
ends with an atomic checkpoint and a line of the curve; draws of epoch e depend on (seed, e) only. The spectrum and the
mean are those of the training images.

    python -m experiments.processes.train_spd --data mnist.npz --out checkpoints/spd
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mnist.train_mnist import export, load_images
from treesearch.backends.chains import shortest_path
from treesearch.backends.models.shortest_path import Levels, SpectralNetwork
from treesearch.backends.training.loop import Plan, append_row, create, stratified, train

GRID = 100_000  # levels that τ is drawn from


def cosine_levels(spectrum: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """ᾱ = cos²(πτ/2), the same in every frequency."""
    angle = 0.5 * math.pi * tau.double().reshape(-1, *(1,) * spectrum.ndim)
    return angle.cos() ** 2, angle.sin() ** 2


PATHS: dict[str, Levels] = {"shortest": shortest_path.levels, "cosine": cosine_levels}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """npz file with train_x, test_x: uint8 images (n, 28, 28)."""
    out: Path
    """Folder for the checkpoint, the curve and the weights; training goes on from the checkpoint found there."""
    path: Literal["shortest", "cosine"] = "shortest"
    epochs: int = 4
    steps: int = 250
    """Optimiser steps an epoch."""
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.6
    ema: float = 0.99
    limit: int | None = None
    """Use only this many training images (smoke runs)."""
    threads: int = 1
    seed: int = 0


def noised(network: SpectralNetwork, x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_τ, 1000 τ and v of states x_0."""
    tau = (stratified(len(x0), GRID, rng) + 0.5) / GRID
    kept, lost = network.levels(network.spectrum, tau)
    alpha, sigma = kept.sqrt().float(), lost.sqrt().float()
    eps = torch.randn(x0.shape, generator=rng)
    return alpha * x0 + sigma * eps, 1000 * tau.float(), alpha * eps - sigma * x0


def losses(network: SpectralNetwork, images: Tensor, args: Args, epoch: int) -> Iterator[Tensor]:
    """An epoch of random batches."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    for _ in range(args.steps):
        rows = torch.randint(len(images), (args.batch_size,), generator=rng)
        x, timestep, v = noised(network, network.encode(images[rows].float() / 127.5 - 1), rng)
        yield F.mse_loss(network(x, timestep), v)


@torch.no_grad()
def test_loss(network: SpectralNetwork, images: Tensor) -> float:
    """v-MSE on test images, the same draws every time."""
    rng = torch.Generator().manual_seed(1)
    x, timestep, v = noised(network, network.encode(images.float() / 127.5 - 1), rng)
    return float(F.mse_loss(network(x, timestep), v))


def hasten(network: nn.Module) -> None:
    """Compute a network's forward pass in bfloat16."""
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images, test = load_images(args.data, "train", args.limit), load_images(args.data, "test", 1000)
    plan = Plan(epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown,
                ema=args.ema)  # fmt: skip

    def build() -> SpectralNetwork:
        network = SpectralNetwork(PATHS[args.path])
        network.fit(images.float() / 127.5 - 1)
        return network

    state = create(build, plan, args.seed, args.out)
    network: SpectralNetwork = state.network  # pyright: ignore[reportAssignmentType]
    hasten(network.unet)

    def after(loss: float, seconds: float) -> None:
        export(state.ema, args.out / "weights.safetensors")
        of_test = test_loss(state.ema, test)  # pyright: ignore[reportArgumentType]
        row = {"epoch": state.epoch, "step": state.step, "train_v_mse": loss, "test_v_mse": of_test}
        append_row(args.out / "curve.csv", row | {"seconds": seconds})

    train(state, plan, lambda epoch: losses(network, images, args, epoch), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
