"""Figures of the shipped student beside its teacher: python -m experiments.students.evaluate_mnist --data mnist.npz

Of samples of 1, 2 and 4 evaluations, and of the teacher's deterministic steps (50 with noise too): the share that the
judge is sure of (top probability > .9), and the Fréchet distance of its features to the 10,000 test images. The judge
is no reward of a search; the floor is that of as many training images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.mnist.judge import grade, load_judge
from experiments.mnist.train_mnist import load_images
from experiments.shared.distances import frechet
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.backends.models.student import WEIGHTS, student
from treesearch.report.tables import markdown_table

T, SURE, BATCH = 50, 0.9, 100
FEW = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the script."""

    data: Path
    """npz file with train_x, test_x: uint8 images (n, 28, 28)."""
    weights: str = WEIGHTS
    samples: int = 500
    seed: int = 0
    threads: int = 1
    out: Path = Path("runs/results/students/mnist.json")


def walked(kernel: DiffusionKernel, x: Tensor, t: int, rng: torch.Generator) -> Tensor:
    """x_0 of states x_t."""
    with torch.inference_mode():
        for level in range(t, 0, -1):
            law = kernel.transition(x, torch.full((len(x),), level))
            x = law.sample(torch.randn(x.shape, generator=rng))
    return x


def drawn(kernel: DiffusionKernel, n: int, seed: int) -> Tensor:
    """Samples (n, 1, 28, 28)."""
    rng, parts = torch.Generator().manual_seed(seed), []
    for rows in torch.arange(n).split(BATCH):
        x = kernel.prior(torch.randn(len(rows), *kernel.state_shape, generator=rng))
        parts.append(kernel.decode(walked(kernel, x, kernel.num_steps, rng)))
    return torch.cat(parts)


def quality(images: Tensor, test: Tensor) -> dict[str, float]:
    """Figures of samples; `test` are features."""
    sure = (grade(images)[0].amax(1) > SURE).float().mean()
    return {"judge is sure": float(sure), "Fréchet": frechet(features(images), test)}


@torch.inference_mode()
def features(images: Tensor) -> Tensor:
    """The judge's."""
    return torch.cat([load_judge().features(part) for part in images.split(500)])


def samples(args: Args) -> dict[str, dict[str, float]]:
    """The first table."""
    test = features(load_images(args.data, "test").float() / 255)
    train = load_images(args.data, "train", args.samples).float() / 255
    kernels: dict[str, Any] = {f"student, {n}": student(args.weights, n) for n in FEW}
    kernels |= {f"teacher, {n}": mnist_kernel(n, eta=0.0) for n in (*FEW, T)}
    kernels[f"teacher, {T}, η = 1"] = mnist_kernel(T)
    found = {}
    for name, kernel in kernels.items():
        found[name] = quality(drawn(kernel, args.samples, args.seed), test)
        print(name, found[name], flush=True)
    return found | {"training images": quality(train, test)}


def page(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        (name, f"{each['judge is sure']:.1%}", f"{each['Fréchet']:.2f}") for name, each in found["samples"].items()
    ]
    parts = ["# The student of the MNIST model", "", (__doc__ or "").partition("\n\n")[2].strip(), ""]
    parts += [markdown_table(lines, ("evaluations", "judge is sure", "Fréchet")), ""]
    return "\n".join(parts)


def main(args: Args) -> None:
    """Compute and write both files."""
    torch.set_num_threads(args.threads)
    found = {"asked": {"samples": args.samples, "seed": args.seed}, "samples": samples(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
