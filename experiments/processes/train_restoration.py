"""Train the shipped restoration model (`backends/models/restoration.py`): digits out of heavy blur and noise.

    μ = clamp(blur(x_0, 3 px) + .15 z, 0, 1) in eight bits         x_t = μ + α_t (x_0 - μ) + σ_t ε
    loss = E || f(x_t - μ, μ, t) - v ||²,  t uniform in 0..K

The paper takes the mean absolute error; a search draws from the law, so that the mean of x_0 is wanted, not its median.
Draws of epoch e depend on (seed, e) only.

    python -m experiments.processes.train_restoration --data mnist.npz
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mnist.train_mnist import load_images
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.models.restoration_file import RestorationNetwork, save_model
from treesearch.backends.training.loop import Plan, append_row, create, train
from treesearch.offline.arrays import read_npz

BLUR, NOISE = 3.0, 0.15  # pixels; of intensities in [0, 1]
DEGRADATION = f"Gaussian blur of {BLUR:g} pixels, then noise of standard deviation {NOISE:g}, clamped to [0, 1]"
PROCESS = MeanReverting(predicts="velocity", spread=2 * 50 / 255)  # σ∞ of the paper, in states of [-1, 1]
EXAMPLES = (8, 3, 5, 9, 2, 6, 0, 4, 7, 1)  # the first test digit of each class, eights and what looks like them first
FIELDS = ["epoch", "step", "lr", "train_mse", "test_mse_ema", "images_per_s", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """npz file with train_x, test_x, test_y: uint8 images (n, 28, 28) and their digits."""
    out: Path = Path("checkpoints/restoration")
    """Folder for the checkpoint; training goes on from the one found there."""
    weights: Path = Path("checkpoints/blur.safetensors")
    """Where the EMA weights are exported after every epoch."""
    curve: Path = Path("runs/results/processes/restoration_curve.csv")
    epochs: int = 5
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.3
    ema: float = 0.999
    limit: int | None = None
    """Use only this many training images (smoke runs)."""
    threads: int = 1
    seed: int = 0


def degrade(images: Tensor, rng: torch.Generator) -> Tensor:
    """Blurred and noisy copies of images (n, 1, h, w) in [0, 1], as eight bits hold them."""
    reach = round(3 * BLUR)
    taps = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * BLUR**2))
    taps /= taps.sum()
    rows = F.conv2d(images, taps.view(1, 1, -1, 1), padding=(reach, 0))
    blurred = F.conv2d(rows, taps.view(1, 1, 1, -1), padding=(0, reach))
    noisy = blurred + NOISE * torch.randn(images.shape, generator=rng)
    return (255 * noisy.clamp(0, 1)).round() / 255


def example(images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (n, 2, 28, 28), what the network is told (n,) and its targets, at one level of each n-th of the chain."""
    n = len(images)
    clean, mu = 2 * images - 1, 2 * degrade(images, rng) - 1
    share = (torch.arange(n) + torch.rand(n, generator=rng, dtype=torch.float64)) / n
    told, *levels = PROCESS.at(share)
    alpha, sigma = (level.float().view(-1, 1, 1, 1) for level in levels)
    eps = torch.randn(clean.shape, generator=rng)
    y = alpha * (clean - mu) + sigma * eps
    return torch.cat([y, mu], 1), told.float(), PROCESS.target(clean, mu, eps, alpha, sigma)


def batches(images: Tensor, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Shuffled full batches in [0, 1]."""
    order = torch.randperm(len(images), generator=rng)
    for rows in order[: len(order) // size * size].split(size):
        yield images[rows].float() / 255


def losses(network: nn.Module, images: Tensor, args: Args, epoch: int) -> Iterator[Tensor]:
    """One pass over the data."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    for batch in batches(images, args.batch_size, rng):
        x, told, target = example(batch, rng)
        yield F.mse_loss(network(x.to(memory_format=torch.channels_last), told), target)


@torch.no_grad()
def test_loss(ema: nn.Module, images: Tensor, seed: int) -> float:
    """Error of the EMA weights on test images, the same draws every time."""
    rng, found = torch.Generator().manual_seed(seed), []
    for batch in batches(images, min(250, len(images)), rng):
        x, told, target = example(batch, rng)
        found.append(F.mse_loss(ema(x, told), target).item())
    return sum(found) / len(found)


def shipped(data: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Degraded and clean test digits that go with the model, one a class."""
    arrays = read_npz(data, ["test_x", "test_y"])
    first = [int((arrays["test_y"] == label).argmax()) for label in EXAMPLES]
    clean = torch.from_numpy(arrays["test_x"][first]).unsqueeze(1).float() / 255
    return degrade(clean, torch.Generator().manual_seed(seed)), clean


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data, "train", args.limit)
    test = load_images(args.data, "test", 2000 if args.limit is None else args.limit)
    degraded, clean = shipped(args.data, args.seed)
    steps = len(images) // args.batch_size
    plan = Plan(epochs=args.epochs, steps=steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown, ema=args.ema)
    state = create(RestorationNetwork, plan, args.seed, args.out)
    state.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def after(loss: float, seconds: float) -> None:
        save_model(args.weights, state.ema, PROCESS, degraded=degraded, clean=clean, degradation=DEGRADATION)
        lr, rate = plan.learning_rate(state.step - 1), steps * args.batch_size / seconds
        test_mse = test_loss(state.ema, test, args.seed + 1)
        values = (state.epoch, state.step, lr, loss, test_mse, rate, seconds)
        append_row(args.curve, dict(zip(FIELDS, values, strict=True)))

    train(state, plan, partial(losses, state.network, images, args), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
