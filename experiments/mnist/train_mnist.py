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

import copy
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.shared.arrays import read_npz
from treesearch.backends.models.mnist import TRAIN_STEPS, build_network, cosine_alphas_cumprod

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


@dataclass
class State:
    """Everything that a checkpoint holds."""

    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0


def load_images(path: Path, split: str, limit: int | None = None) -> Tensor:
    """Images as a uint8 tensor (n, 1, 28, 28)."""
    return torch.from_numpy(read_npz(path, [f"{split}_x"])[f"{split}_x"][:limit]).unsqueeze(1)


def learning_rate(step: int, total: int, args: Args) -> float:
    """Linear warm-up, flat, then a half cosine to zero over the last `cooldown` of the run."""
    start = total * (1 - args.cooldown)
    fall = min(max((step - start) / max(total - start, 1), 0.0), 1.0)
    return args.lr * min(1.0, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * fall))


def noised(x0: Tensor, alpha_bar: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_k, the timestep index and the target v, with k stratified over the batch."""
    n = len(x0)
    u = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    index = (u * TRAIN_STEPS).long().clamp_(max=TRAIN_STEPS - 1)
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
def update_ema(ema: nn.Module, network: nn.Module, step: int, limit: float) -> None:
    """ema <- d ema + (1 - d) network, d = min(limit, (1 + step) / (10 + step))."""
    decay = min(limit, (1 + step) / (10 + step))
    pairs = list(ema.parameters()), list(network.parameters())
    torch._foreach_lerp_(*pairs, 1 - decay)


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


def train_epoch(state: State, images: Tensor, args: Args) -> tuple[float, float]:
    """One pass over the data; returns the mean loss and the last learning rate."""
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + state.epoch)
    alpha_bar = cosine_alphas_cumprod()
    total = args.epochs * (len(images) // args.batch_size)
    losses, lr = [], 0.0
    for x0 in batches(images, args.batch_size, rng):
        lr = learning_rate(state.step, total, args)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        x, index, v = noised(x0, alpha_bar, rng)
        loss = F.mse_loss(state.network(x, index), v)
        state.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
        state.optimizer.step()
        update_ema(state.ema, state.network, state.step, args.ema)
        state.step += 1
        losses.append(loss.item())
    state.epoch += 1
    return sum(losses) / len(losses), lr


def create(args: Args) -> State:
    """A fresh state, or the one saved in `args.out`."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        network = build_network()
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    state = State(network, ema, optimizer)
    path = args.out / "last.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        network.load_state_dict(saved["network"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state.epoch, state.step = saved["epoch"], saved["step"]
    return state


def save(state: State, args: Args) -> None:
    """Write the checkpoint so that a crash leaves the old or the new one, never a part."""
    path = args.out / "last.pt"
    saved = {
        "network": state.network.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
    }
    torch.save(saved, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def export(ema: nn.Module, path: Path) -> None:
    """EMA weights as float16 safetensors, replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file({name: w.half().contiguous() for name, w in ema.state_dict().items()}, part)
    part.chmod(0o644)
    part.replace(path)


def append_row(path: Path, row: dict[str, float]) -> None:
    """Add one epoch to the curve, and the header when the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train = load_images(args.data, "train", args.limit)
    test = load_images(args.data, "test", 2000 if args.limit is None else args.limit)
    state = create(args)
    while state.epoch < args.epochs:
        start = time.monotonic()
        loss, lr = train_epoch(state, train, args)
        seconds = time.monotonic() - start
        save(state, args)
        if state.epoch % args.export_every == 0 or state.epoch == args.epochs:
            export(state.ema, args.weights)
        values = (state.epoch, state.step, lr, loss, test_loss(state.ema, test, args.seed + 1))
        rate = len(train) // args.batch_size * args.batch_size / seconds
        row = dict(zip(FIELDS, (*values, rate, seconds), strict=True))
        append_row(args.curve, row)
        print(row, flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
