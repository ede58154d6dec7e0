"""Experts of the MNIST kernel's noisy states, from its own draws alone; no data are read.

    python -m experiments.observations.train_experts --out checkpoints/experts

    ppap        five experts of the digit classifier, which see x_t    shipped: ppap.safetensors
    single      one expert for all levels, as many steps
    endpoint    five experts of the digit classifier, which see x̂_0    shipped: ppap_endpoint.safetensors
    jpeg        five experts of `compressibility`, which see x̂_0, for λ = 40

All from the same rollouts. `experiments.observations.experts` has their figures.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treesearch.backends.guidance.transfer import Plan, rollouts, transfer
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.rewards.images.classifier import digit
from treesearch.rewards.images.image import compressibility

FAMILIES: dict[str, dict[str, Any]] = {
    "ppap": {"bands": 5, "reads": "state"},
    "endpoint": {"bands": 5, "reads": "endpoint"},
    "jpeg": {"bands": 5, "reads": "endpoint", "lam": 40.0},
    "single": {"bands": 1, "reads": "state"},
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path = Path("checkpoints/experts")
    """folder of the families' files"""
    families: tuple[str, ...] = tuple(FAMILIES)
    samples: int = 2_000
    """rollouts"""
    num_steps: int = 20
    """T of the rollouts"""
    steps: int = 1_500
    batch_size: int = 64
    seed: int = 0
    threads: int = 1


def main(args: Args) -> None:
    """Train what `args.families` names."""
    torch.set_num_threads(args.threads)
    kernel, began = mnist_kernel(args.num_steps), time.monotonic()
    drawn = rollouts(kernel, args.samples, seed=args.seed)
    print(f"{args.samples} rollouts: {time.monotonic() - began:.0f} s", flush=True)
    plan = Plan(steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    for name in args.families:
        reward, began = compressibility() if name == "jpeg" else digit(8), time.monotonic()
        family = transfer(reward, kernel, samples=drawn, plan=plan, **FAMILIES[name])
        family.save(args.out / f"{name}.safetensors")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
