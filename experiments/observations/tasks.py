"""Inverse problems on MNIST, the published samplers for them, and what draws are worth.

    y = A x + tolerance ε       x a digit in [-1, 1], ε standard normal

    inpainting          A x = the upper half of x
    super-resolution    A x = means over 4 × 4 squares
    de-blurring         A x = x under a Gaussian of 1.5 pixels
    projection          A x = 100 entries of the cosine transform: the 64 lowest and 36 that chance picks

The projection stands where pictures in colour have colourisation: of each part some combinations are seen and the
others are not. The model has one channel, so that a grey picture of it would be the picture itself.

Test digits: those that go with the shipped restoration model, the first of each class of MNIST's test set (Y. LeCun,
C. Cortes, C. J. C. Burges; CC BY-SA 3.0), which no shipped network was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from experiments.processes.train_restoration import EXAMPLES
from treesearch.backends.models.restoration_file import load_model
from treesearch.backends.models.shipped import shipped_file
from treesearch.rewards import Reward
from treesearch.rewards.observation import Operator, blurred, frequencies, masked, measurement, pooled
from treesearch.rewards.values import flat

SHAPE = (1, 28, 28)
KNOWN_ROWS, LOWEST, PICKED = 14, 8, 36


@dataclass(frozen=True)
class Task:
    """An inverse problem.

    Args:
        title: for people.
        make: the operator A.
        largest: the largest eigenvalue of A Aᵀ.
        dps: step ζ' of DPS as published, the best of 1, 3, 10 and 30 for the mean on the digit 9 at ten steps.
    """

    title: str
    make: Callable[[], Operator]
    largest: float
    dps: float


def upper_half() -> Operator:
    """The rows that inpainting knows."""
    mask = torch.zeros(SHAPE, dtype=torch.bool, device="cpu")
    mask[:, :KNOWN_ROWS] = True
    return masked(mask)


def some_frequencies() -> Operator:
    """The lowest frequencies and some others."""
    mask = torch.zeros(28 * 28, dtype=torch.bool, device="cpu")
    mask[torch.randperm(28 * 28, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:PICKED]] = True
    mask = mask.reshape(28, 28)
    mask[:LOWEST, :LOWEST] = True
    return frequencies(mask)


TASKS = {
    "inpainting": Task("inpainting: the upper half is seen", upper_half, 1.0, 3.0),
    "super-resolution": Task("×4 super-resolution: 7 × 7 means", partial(pooled, 4), 1 / 16, 30.0),
    "de-blurring": Task("de-blurring: a Gaussian of 1.5 pixels", partial(blurred, 1.5), 1.0, 10.0),
    "projection": Task("projection: some cosine frequencies", some_frequencies, 1.0, 10.0),
}


@cache
def digits() -> dict[int, Tensor]:
    """Test digits (1, 28, 28) in [-1, 1] by their class."""
    with shipped_file("blur.safetensors") as file:
        images = load_model(file).clean
    return {label: 2 * image - 1 for label, image in zip(EXAMPLES, images, strict=True)}


def observe(x: Tensor, operator: Operator, tolerance: float, seed: int) -> Reward:
    """The log-likelihood of a noisy observation of x (1, 28, 28)."""
    seen = operator(x[None].double())[0]
    noise = torch.randn(
        seen.shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    return measurement(operator, seen + tolerance * noise, tolerance=tolerance)


def residual(y: Reward) -> Reward:
    """-|y - A x|², the objective of published guides."""
    of = y.fn

    def score(x: Tensor, prompts: Any = None) -> Tensor:
        return -flat(of.operator(x.double()) - of.observed.to(x.device)).square().sum(1)

    return Reward(score, f"residual({of.operator.name})", "state", settings=y.settings, prompted=False)


def seen_picture(y: Reward) -> Tensor:
    """The observation as a picture (1, 28, 28) in [-1, 1]: A⁺ y where A Aᵀ = g I, the blurred picture itself elsewhere;
    NaN where nothing is seen of a pixel."""
    of = y.fn
    back = of.operator.adjoint(of.observed[None])[0] / of.operator.gram if of.operator.gram else of.observed
    reach = of.operator.adjoint(torch.ones_like(of.observed)[None])[0] != 0
    return torch.where(reach, back, torch.nan) if of.operator.name.startswith("mask") else back


def psnr(images: Tensor, truth: Tensor) -> float:
    """Peak signal to noise in decibel, of images in [0, 1]."""
    return -10 * math.log10(float((images.double() - truth.double()).square().mean()))


def misfit(images: Tensor, weights: Tensor, y: Reward) -> float:
    """Root mean square of (y - A x)/tolerance over weighted images in [0, 1]: 1 of the truth."""
    of = y.fn
    gap = flat(of.operator(2 * images.double() - 1) - of.observed) / of.tolerance
    return float((weights @ gap.square().mean(1)).sqrt())


Weighted = tuple[Tensor, Tensor]
"""Images (n, 1, 28, 28) in [0, 1] and weights (n,) that sum to 1."""


def weighted(task: Any, *, exact: bool) -> Weighted:
    """The samples of a search; equally weighted where the sampler is taken as published."""
    images = task.samples
    n = len(images)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64, device="cpu")
    return images, task.log_weights.softmax(0) if exact else uniform
