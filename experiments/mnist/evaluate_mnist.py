"""Figures of the shipped MNIST weights: sample quality, speed, accuracy of both classifiers.

    MMD^2(X, Y) = mean k(X, X) + mean k(Y, Y) - 2 mean k(X, Y)
    k(a, b)     = exp(-|a - b|^2 / (2 h^2))

in the judge's penultimate features. The V-statistic (diagonals included) is biased upwards by
about 2 (1 - mean k) / n, which keeps the train-against-test reference away from zero; all sets
have the same size n. h is the median distance between images of the train and test sets, the same
for every comparison. (Gretton et al., "A Kernel Two-Sample Test", 2012, eq. 5.)

    python -m experiments.mnist.evaluate_mnist --data mnist.npz

Writes figures.json and samples.png and ends with status 1 when a target is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.mnist.judge import grade
from experiments.mnist.train_classifiers import blur, load_split
from experiments.shared.distances import biased_mmd2
from treesearch.backends.models.mnist import load_network, mnist_kernel, to_images
from treesearch.rewards.images.classifier import load_classifier


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the evaluation script."""

    data: Path
    """npz file with train_x, train_y, test_x, test_y: uint8 images (n, 28, 28) and labels."""
    out: Path = Path("runs/results/mnist")
    samples: int = 2000
    quality: bool = True
    speed: bool = True
    """Measure on an otherwise idle machine. A part that is switched off keeps its old figures."""
    threads: int = 2
    seed: int = 0


def sample(num_steps: int, n: int, seed: int, batch_size: int = 100) -> Tensor:
    """n unguided images from the bare chain, eta = 1."""
    kernel = mnist_kernel(num_steps, eta=1.0)
    rng = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, n, batch_size):
        shape = (min(batch_size, n - start), *kernel.state_shape)
        x = kernel.prior(torch.randn(shape, generator=rng))
        for t in range(num_steps, 0, -1):
            transition = kernel.transition(x, torch.full(shape[:1], t))
            x = transition.sample(torch.randn(shape, generator=rng))
        images.append(kernel.decode(x))
    return torch.cat(images)


def nearest(images: Tensor, train: Tensor) -> float:
    """Median distance to the nearest training image; far below that of test images: copies."""
    rows = [torch.cdist(x, train).amin(dim=1) for x in images.flatten(1).split(200)]
    return torch.cat(rows).median().item()


def grades(images: Tensor) -> dict[str, Any]:
    """Share of confident images and of each class, by the judge."""
    probs, _ = grade(images)
    top, digit = probs.max(dim=1)
    share = torch.bincount(digit, minlength=10) / len(images)
    return {
        "n": len(images),
        "top_prob_above_0.9": (top > 0.9).float().mean().item(),
        "class_shares": [round(s, 4) for s in share.tolist()],
    }


def quality(args: Args) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Figures of samples, real images and noise; and the samples by number of steps."""
    train, test = (load_split(args.data, split)[0].float() / 255 for split in ("train", "test"))
    rng = torch.Generator().manual_seed(args.seed + 1)
    real = test[torch.randperm(len(test), generator=rng)[: args.samples]]
    held = train[torch.randperm(len(train), generator=rng)[: args.samples]]
    noise = to_images(torch.randn(real.shape, generator=rng))
    features = {"test": grade(real)[1], "train": grade(held)[1]}
    bandwidth = torch.cdist(features["test"], features["train"]).median().item()
    reference = biased_mmd2(features["train"], features["test"], bandwidth)
    figures: dict[str, Any] = {
        "seed": args.seed,
        "mmd2_kernel": {"name": "gaussian, biased V-statistic", "bandwidth": bandwidth},
        "test": grades(real) | {"nearest_train": nearest(real, train.flatten(1))},
        "noise": grades(noise),
        "train": {"n": len(held), "mmd2_to_test": reference},
    }
    sheets = {}
    for steps in (25, 50):
        sheets[steps] = images = sample(steps, args.samples, args.seed)
        distance = biased_mmd2(grade(images)[1], features["test"], bandwidth)
        figures[f"samples_{steps}_steps"] = grades(images) | {
            "mmd2_to_test": distance,
            "mmd2_over_train": distance / reference,
            "nearest_train": nearest(images, train.flatten(1)),
        }
    return figures, sheets


def accuracies(args: Args) -> dict[str, float]:
    """Test accuracy of both classifiers, and of the reward on blurred and on noisy test images."""
    images, labels = load_split(args.data, "test")
    x = images.float() / 255
    rng = torch.Generator().manual_seed(args.seed + 2)
    noisy = (x + 0.3 * torch.randn(x.shape, generator=rng)).clamp(0, 1)

    def accuracy(images: Tensor) -> float:
        digit = torch.cat([load_classifier()(part).argmax(dim=1) for part in images.split(500)])
        return (digit == labels).float().mean().item()

    return {
        "judge": (grade(x)[0].argmax(dim=1) == labels).float().mean().item(),
        "reward": accuracy(x),
        "reward_blur_1.5_pixels": accuracy(blur(x, 1.5)),
        "reward_noise_0.3": accuracy(noisy),
    }


def speed(batch_size: int = 64, rounds: int = 9, seconds: float = 1.0) -> dict[str, Any]:
    """NFE/s of the embedded network and of a plain pixel UNet, measured in turns; their ratio."""
    from diffusers import UNet2DModel

    plain = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
    ).eval()
    embedded = load_network()
    x, t = torch.zeros(batch_size, 1, 28, 28), torch.full((batch_size,), 500)
    pairs = []
    for _ in range(rounds + 1):
        pairs.append([nfe_rate(network, x, t, seconds) for network in (embedded, plain)])
    pairs = pairs[1:]
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "embedded_nfe_per_s": statistics.median(a for a, _ in pairs),
        "plain_32_48_64_nfe_per_s": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(a / b for a, b in pairs),
        "ratio_min": min(a / b for a, b in pairs),
    }


@torch.no_grad()
def nfe_rate(network: Callable[..., Any], x: Tensor, t: Tensor, seconds: float) -> float:
    """Network evaluations of one state per second, over about `seconds`."""
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        network(x, t)
        calls += 1
    return calls * len(x) / elapsed


def save_sheet(sheets: dict[int, Tensor], path: Path, columns: int = 20, rows: int = 6) -> None:
    """One picture: the first samples of each number of steps, a light strip between them."""
    from PIL import Image

    parts = []
    for images in sheets.values():
        grid = images[: rows * columns, 0].reshape(rows, columns, 28, 28).transpose(1, 2)
        parts += [grid.reshape(rows * 28, columns * 28), torch.ones(4, columns * 28)]
    picture = (255 * torch.cat(parts[:-1])).round().byte().numpy()
    Image.fromarray(np.kron(picture, np.ones((2, 2), np.uint8))).save(path, optimize=True)


def targets(figures: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(name, value, sense, bound) of everything that must hold."""
    checks = []
    if found := figures.get("quality"):
        own = found["samples_50_steps"]
        checks += [
            ("samples, 50 steps: top probability > 0.9", own["top_prob_above_0.9"], ">=", 0.85),
            (
                "test images: top probability > 0.9",
                found["test"]["top_prob_above_0.9"],
                ">=",
                0.97,
            ),
            ("noise: top probability > 0.9", found["noise"]["top_prob_above_0.9"], "<=", 0.10),
            ("rarest class", min(own["class_shares"]), ">=", 0.05),
            ("commonest class", max(own["class_shares"]), "<=", 0.15),
            ("MMD^2 to test over train's", own["mmd2_over_train"], "<=", 3.0),
            ("reward classifier accuracy", figures["accuracy"]["reward"], ">=", 0.985),
            ("judge accuracy", figures["accuracy"]["judge"], ">=", 0.99),
        ]
    if found := figures.get("speed"):
        checks.append(("NFE/s over a plain UNet's", found["ratio_median"], ">=", 1.5))
    return checks


def report(figures: dict[str, Any]) -> bool:
    """Print the targets as a table; whether all are met."""
    met = []
    for name, value, sense, bound in targets(figures):
        met.append(value >= bound if sense == ">=" else value <= bound)
        print(f"{name:42s} {value:8.4f}  {sense} {bound:<6g} {'ok' if met[-1] else 'MISSED'}")
    if found := figures.get("quality"):
        own = found["samples_25_steps"]
        top, ratio = own["top_prob_above_0.9"], own["mmd2_over_train"]
        print(f"25 steps, for comparison: top probability > 0.9 {top:.4f}, MMD^2 ratio {ratio:.2f}")
    return all(met)


def main(args: Args) -> None:
    """Measure, write figures.json and samples.png, judge."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    figures |= {"machine": "2 shared CPU cores", "torch": torch.__version__}
    if args.speed:
        figures["speed"] = speed()
    if args.quality:
        figures["quality"], sheets = quality(args)
        figures["accuracy"] = accuracies(args)
        save_sheet(sheets, args.out / "samples.png")
    path.write_text(json.dumps(figures, indent=2) + "\n")
    if not report(figures):
        sys.exit(1)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
