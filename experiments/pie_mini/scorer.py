"""The score of an edit that searches may look at: a small classifier of pictures, trained apart from painter and judge.

    s(x, y) = mean over what y states of log p(. | x)        shape or nothing, colour, column, height, light

A convolutional network of 16 x 16 pixels on drawn scenes before backdrops, under noise and blended with others (mixup:
labels are blended too), so that its score is graded between two scenes. It sees no pair and no mask, and the judge of
PIE-mini is a program that shares nothing with it.

    python -m experiments.pie_mini.scorer --out checkpoints/scorer            trains it: a minute on one core
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.interventions.scenes import COLOURS, COLUMNS, HEIGHTS, LIGHTS, SHAPES, drawn, parsed
from experiments.mnist.train_mnist import export
from experiments.pie_mini.pictures import NOTHING, backdrops, cover, every_scene
from treesearch.backends.training.loop import Plan, append_row, create, train
from treesearch.rewards.base import Reward

WEIGHTS = Path(__file__).parent / "weights" / "scorer.safetensors"
HEADS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "column": len(COLUMNS), "height": len(HEIGHTS),
         "light": len(LIGHTS)}  # fmt: skip
UNSTATED = -1
SMALLEST = -10.0  # of a log p: an edit is not worth less than one that shows nothing of its prompt


class Scorer(nn.Module):
    """Logits of every head, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(512, 64), nn.SiLU(), nn.Linear(64, sum(HEADS.values()))),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Log probabilities (n, 18) of pictures (n, 3, 16, 16) in [0, 1]."""
        parts = self.layers(2 * pictures - 1).split(list(HEADS.values()), 1)
        return torch.cat([part.log_softmax(1) for part in parts], 1)


def labels(prompt: str) -> list[int]:
    """Class by head, `UNSTATED` where the prompt does not say."""
    if prompt == NOTHING:
        return [len(SHAPES), *[UNSTATED] * (len(HEADS) - 1)]
    return [UNSTATED if number is None else number for number in parsed(prompt)[: len(HEADS)]]


def likelihood(logs: Tensor, classes: Tensor) -> Tensor:
    """Mean (n,) of the log p of classes (n, 5) that are stated."""
    starts = torch.tensor([0, *torch.tensor(list(HEADS.values()), device="cpu").cumsum(0)[:-1].tolist()], device="cpu")
    stated = classes != UNSTATED
    found = logs.gather(1, (classes.clamp_min(0) + starts).to(logs.device)).clamp_min(SMALLEST)
    return (found * stated.to(found)).sum(1) / stated.sum(1).to(found)


@cache
def scorer(weights: Path = WEIGHTS) -> Scorer:
    """The trained network."""
    network = Scorer()
    network.load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    return network.eval().requires_grad_(False)


def edit_score(weights: Path = WEIGHTS) -> Reward:
    """How much pictures show what their prompts state: s in [-10, 0]."""
    network = scorer(weights)

    def fn(pictures: Any, prompts: Sequence[Any] | None) -> Tensor:
        classes = torch.tensor([labels(str(prompt)) for prompt in prompts or ()], device="cpu")
        return likelihood(network(pictures.float().cpu()), classes).double()

    return Reward(fn, "edit score")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the training script."""

    out: Path
    """Folder for the checkpoint, the curve and the weights; training goes on from the checkpoint found there."""
    epochs: int = 6
    steps: int = 250
    """Optimiser steps an epoch."""
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.6
    ema: float = 0.99
    noise: float = 0.15
    """Largest standard deviation of noise on a picture."""
    bare: float = 0.15
    """Share of pictures of nothing."""
    seed: int = 1


def losses(network: nn.Module, args: Args, epoch: int) -> Iterator[Tensor]:
    """An epoch of random batches."""
    scenes = every_scene()
    shown, covers = torch.stack([drawn(s) for s in scenes]), torch.stack([cover(s) for s in scenes])[:, None]
    classes = torch.tensor([*(labels(s.prompt) for s in scenes), labels(NOTHING)])
    rng = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
    n = args.batch_size
    for _ in range(args.steps):
        row = torch.randint(len(scenes), (n,), generator=rng)
        bare = torch.rand(n, generator=rng) < args.bare
        behind = torch.stack([each.picture for each in backdrops(n, rng)])
        seen = covers[row] & ~bare[:, None, None, None]
        pictures, told = torch.where(seen, shown[row], behind), classes[torch.where(bare, len(scenes), row)]
        share = 1 - 0.5 * torch.rand(n, generator=rng)
        blend, by = share[:, None, None, None], torch.randperm(n, generator=rng)
        pictures = blend * pictures + (1 - blend) * pictures[by]
        pictures = pictures + args.noise * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(
            n, 3, 16, 16, generator=rng
        )
        logs = network(pictures.clamp(0, 1))
        yield -(share * likelihood(logs, told) + (1 - share) * likelihood(logs, told[by])).mean()


def main(args: Args) -> None:
    """Train until `args.epochs` epochs are done."""
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(epochs=args.epochs, steps=args.steps, lr=args.lr, warmup=args.warmup, cooldown=args.cooldown,
                ema=args.ema)  # fmt: skip
    state = create(Scorer, plan, args.seed, args.out)

    def after(loss: float, seconds: float) -> None:
        export(state.ema, args.out / "weights.safetensors")
        append_row(args.out / "curve.csv", {"epoch": state.epoch, "loss": loss, "seconds": seconds})

    train(state, plan, lambda epoch: losses(state.network, args, epoch), args.out, after)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
