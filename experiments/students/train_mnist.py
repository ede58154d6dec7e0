"""Train the shipped student of the MNIST model: no data but its teacher's samples, twenty minutes of one idle core.

    1. pairs      (ε, x̂_0) of the teacher's deterministic path, T = 25
    2. rectified  x̂_0^θ(α_t x̂_0 + σ_t ε, t) -> x̂_0             what makes the first step
    3. consistency, from there, on fresh noise                  what makes states of the teacher's own chain

Each stage ends every epoch with a checkpoint and a line of the curve; what is exported is the mean of the weights.

    python -m experiments.students.train_mnist --out checkpoints/students/mnist
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from treesearch.backends.models.mnist import load_network, mnist_kernel
from treesearch.backends.models.student import load_student, save_student
from treesearch.backends.training.consistency import Consistency, self_consistency
from treesearch.backends.training.distil import Pairs, Student, Target, distil
from treesearch.backends.training.loop import Plan, append_row
from treesearch.backends.training.rectified import Rectified

STAGES: dict[str, Target] = {"rectified": Rectified(c=0.03), "consistency": Consistency(c=0.03)}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path
    """Folder of pairs, checkpoints, curve and weights; training goes on from what is found there."""
    num_steps: int = 25
    """T of the teacher."""
    pairs: int = 6000
    epochs: tuple[int, int] = (4, 10)
    """Of the two stages."""
    steps: int = 100
    """Optimiser steps an epoch."""
    batch_size: int = 64
    lr: tuple[float, float] = (3e-4, 2e-4)
    """Of the two stages."""
    threads: int = 1
    seed: int = 0


def pairs_of(args: Args) -> Pairs:
    """The teacher's pairs, made once."""
    path = args.out / "pairs.safetensors"
    if not path.exists():
        teacher: Any = mnist_kernel(args.num_steps)
        made = Pairs.of(teacher, args.pairs, seed=args.seed)
        save_file({"noise": made.noise, "x0": made.x0}, path)
    held = load_file(path)
    return Pairs(held["noise"], held["x0"])


def plan_of(args: Args, stage: int) -> Plan:
    """How weights move."""
    return Plan(epochs=args.epochs[stage], steps=args.steps, lr=args.lr[stage], warmup=50, cooldown=0.5,
                weight_decay=0.0, ema=0.98)  # fmt: skip


def main(args: Args) -> None:
    """Train both stages."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher: Any = mnist_kernel(args.num_steps)
    pairs = pairs_of(args)
    network: nn.Module = load_network().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    card = asdict(args) | {"out": "", "teacher": "mnist", "script": "python -m experiments.students.train_mnist"}
    for stage, (name, target) in enumerate(STAGES.items()):

        def after(epoch: int, mean: nn.Module, loss: float, seconds: float, name: str = name) -> None:
            save_student(mean, args.out / f"{name}.safetensors", card | {"stage": name, "epoch": epoch})
            held, rng = pairs[torch.arange(min(len(pairs), 256))], torch.Generator().manual_seed(args.seed)
            gap = self_consistency(teacher, Student(mean, teacher.chain), held, rng)
            row = {"stage": name, "epoch": epoch, "loss": loss, "self_consistency": gap, "seconds": seconds}
            append_row(args.out / "curve.csv", row)

        begins = copy.deepcopy(network).requires_grad_(True)
        distil(teacher, begins, target, pairs, plan_of(args, stage), batch_size=args.batch_size, seed=args.seed + stage,
               out=args.out / name, after=after)  # fmt: skip
        network = load_student(args.out / f"{name}.safetensors")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
