"""Train the reward classifier (`rewards/images/classifier.py`) and the judge (`experiments/mnist/judge.py`).

reward: cross-entropy; shifts by up to 2 pixels, half of each batch with Gaussian noise or blur
judge:  cross-entropy; random rotation, scale and shift; one image in seven is no digit and has
        the uniform law over classes as its target

python -m experiments.mnist.train_classifiers --data mnist.npz
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.mnist.judge import Judge
from treesearch.backends.training import loop as training
from treesearch.backends.training.loop import Plan
from treesearch.offline.arrays import read_npz
from treesearch.rewards.images.classifier import DigitClassifier

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(images in [0, 1], one-hot labels, generator) -> the same, augmented."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    data: Path
    """npz file with train_x, train_y, test_x, test_y: uint8 images (n, 28, 28) and labels."""
    reward_weights: Path = Path("checkpoints/mnist_classifier.safetensors")
    judge_weights: Path = Path("checkpoints/mnist_judge.safetensors")
    which: tuple[str, ...] = ("reward", "judge")
    reward_epochs: int = 6
    judge_epochs: int = 8
    batch_size: int = 128
    lr: float = 2e-3
    limit: int | None = None
    """Use only this many training images (smoke runs)."""
    threads: int = 1
    reward_seed: int = 0
    judge_seed: int = 1


def load_split(path: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 1, 28, 28) and int64 labels (n,)."""
    found = read_npz(path, [f"{split}_x", f"{split}_y"])
    images = torch.from_numpy(found[f"{split}_x"][:limit]).unsqueeze(1)
    return images, torch.from_numpy(found[f"{split}_y"][:limit].astype(np.int64))


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with standard deviation `sigma` in pixels."""
    r = torch.arange(-5, 6, dtype=images.dtype)
    k = torch.exp(-0.5 * (r / sigma) ** 2)
    k = k / k.sum()
    rows = F.conv2d(images, k.view(1, 1, 1, -1), padding=(0, 5))
    return F.conv2d(rows, k.view(1, 1, -1, 1), padding=(5, 0))


def warp(images: Tensor, angle: float, scale: float, shift: float, rng: torch.Generator) -> Tensor:
    """Rotate by up to `angle` radians, scale by 1 +- `scale`, shift by up to `shift` pixels."""
    u = 2 * torch.rand(4, len(images), generator=rng) - 1
    a, s = angle * u[0], 1 + scale * u[1]
    cos, sin = torch.cos(a) * s, torch.sin(a) * s
    dx, dy = u[2] * shift / 14, u[3] * shift / 14
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def noisy_and_blurred(x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shift all by <= 2 pixels; a quarter gets noise, a quarter blur (then some of it noise)."""
    x = warp(x, 0.1, 0.05, 2.0, rng)
    q = len(x) // 4
    sigma = 0.5 * torch.rand(q, 1, 1, 1, generator=rng)
    x[:q] = (x[:q] + sigma * torch.randn(x[:q].shape, generator=rng)).clamp(0, 1)
    width = 0.5 + 1.5 * torch.rand((), generator=rng).item()
    x[q : 2 * q] = blur(x[q : 2 * q], width)
    return x, y


def warped_with_outliers(x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Warp all, and append images that are no digits with the uniform law as their label."""
    x = warp(x, 0.25, 0.15, 2.5, rng)
    bad = outliers(x[: len(x) // 6], rng)
    uniform = torch.full((len(bad), 10), 0.1)
    return torch.cat([x, bad]), torch.cat([y, uniform])


def outliers(x: Tensor, rng: torch.Generator) -> Tensor:
    """A third each: pixel noise, smooth blobs, digits with their quarters shuffled."""
    third = max(1, len(x) // 3)
    noise = 0.5 + torch.rand((), generator=rng) * torch.randn(x[:third].shape, generator=rng)
    width = 0.7 + 2 * torch.rand((), generator=rng).item()
    blobs = blur(torch.randn(x[third : 2 * third].shape, generator=rng), width)
    blobs = 6 * (blobs / blobs.std() - 2 * torch.rand(len(blobs), 1, 1, 1, generator=rng))
    shuffled = shuffle_quarters(x[2 * third :], rng)
    return torch.cat([noise.clamp(0, 1), blobs.sigmoid(), shuffled])


def shuffle_quarters(x: Tensor, rng: torch.Generator) -> Tensor:
    """Move every quarter of the images to another place, the same way for the whole batch."""
    quarters = [x[..., :14, :14], x[..., :14, 14:], x[..., 14:, :14], x[..., 14:, 14:]]
    orders = ([3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1], [1, 3, 0, 2], [2, 0, 3, 1])
    order = orders[int(torch.randint(len(orders), (), generator=rng))]
    a, b, c, d = (quarters[i] for i in order)
    return torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of uint8 images whose most probable class is their label."""
    network.eval()
    right = [
        (network(x.float() / 255).argmax(dim=1) == y).sum().item()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return sum(right) / len(images)


def losses(
    network: nn.Module, data: tuple[Tensor, Tensor], augment: Augment, steps: int, size: int, rng: torch.Generator
) -> Iterator[Tensor]:
    """One pass over the data."""
    images, labels = data
    network.train()
    order = torch.randperm(len(images), generator=rng)
    for rows in order[: steps * size].split(size):
        x, y = augment(images[rows].float() / 255, F.one_hot(labels[rows], 10).float(), rng)
        yield F.cross_entropy(network(x), y)


def fit(network: nn.Module, augment: Augment, epochs: int, seed: int, args: Args) -> None:
    """AdamW, linear warm-up and a half cosine to zero; prints one line per epoch."""
    data, test = (load_split(args.data, split, args.limit) for split in ("train", "test"))
    rng, steps = torch.Generator().manual_seed(seed), len(data[0]) // args.batch_size
    plan = Plan(
        epochs=epochs,
        steps=steps,
        lr=args.lr,
        warmup=min(200, epochs * steps // 5 + 1),
        cooldown=1.0,
        weight_decay=0.02,
        betas=(0.9, 0.999),
        ema=None,
        clip=None,
    )
    state = training.begin(network, plan)

    def after(loss: float, seconds: float) -> None:
        line = f"epoch {state.epoch}/{epochs} loss {loss:.4f} test accuracy {accuracy(network, *test):.4f}"
        print(f"{line} ({seconds:.0f} s)", flush=True)

    each = (network, data, augment, steps, args.batch_size, rng)
    training.train(state, plan, lambda _: losses(*each), None, after)


def train(build: type[nn.Module], augment: Augment, epochs: int, seed: int, args: Args) -> nn.Module:
    """A network trained from `seed`; dropout and initial weights draw from a forked generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build()
        fit(network, augment, epochs, seed, args)
    return network


def export(network: nn.Module, path: Path) -> None:
    """float32 safetensors; the counters of batch norm are kept, they are a few bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in network.state_dict().items()}, path)
    path.chmod(0o644)


def main(args: Args) -> None:
    """Train what `args.which` names."""
    torch.set_num_threads(args.threads)
    if "reward" in args.which:
        network = train(DigitClassifier, noisy_and_blurred, args.reward_epochs, args.reward_seed, args)
        export(network, args.reward_weights)
    if "judge" in args.which:
        network = train(Judge, warped_with_outliers, args.judge_epochs, args.judge_seed, args)
        export(network, args.judge_weights)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
