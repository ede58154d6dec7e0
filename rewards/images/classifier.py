"""Digit rewards from a small CNN: log p(c | x) for one class, or the best of a set of classes.

    digit(c)(x)  = log p(c | x)
    digits(S)(x) = max_{c in S} log p(c | x)          (S = even or odd digits)
    digit(c, tau1, tau2)(x) = tau1 f_c(x) - log sum_k exp(tau2 f_k(x)),  f the logits

As a guide the last may pull where log p(c | x) is flat: see `backends.guidance.elucd`. softplus = b takes
log(1 + exp(b z))/b for every ReLU max(z, 0), which has gradients everywhere.

Source of the two rewards: Jain et al., "Diffusion Tree Sampling: Scalable inference-time alignment
of diffusion models" (2025), MNIST experiments. Searches also score predicted endpoints, which are
blurred and noisy, so the classifier was trained on such images too. Its weights are the project's
own: `rewards/weights/README.md`. Samples are graded by another network that no search can reach.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.headed import Headed, LogProbability
from treesearch.rewards.numeric import is_number, is_positive

WEIGHTS = "mnist_classifier.safetensors"
_FACTS = {
    "range": "-inf to 0",
    "differentiable": True,
    "checkpoint": WEIGHTS,
    "licence": "Apache-2.0",
    "memory": "0.8 MB",
    "limits": "images (n, 1, 28, 28) in [0, 1]",
    "source": "Jain et al. 2025, Diffusion Tree Sampling",
}


class DigitClassifier(nn.Module):
    """Six convolutions and two linear layers, 28 x 28 -> 14 x 14 -> 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 16),
            *_block(16, 32, stride=2),
            *_block(32, 32),
            *_block(32, 64, stride=2),
            *_block(64, 64),
            *_block(64, 32),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28) in [0, 1]."""
        return self.head(self.features(2 * images - 1))


@facts(**_FACTS)
def digit(number: int, *, tau1: float = 1.0, tau2: float = 1.0, softplus: float | None = None) -> Reward:
    """The reward log p(number | x) of images (n, 1, 28, 28) in [0, 1].

    Args:
        number: c in 0..9.
        tau1: factor of the digit's own logit, >= 0.
        tau2: factor of all logits in log Σ_k exp, >= 0; below tau1 a guide pulls where the classifier is sure already.
        softplus: b > 0 of the smoothed activations, None for the trained ones.

    Raises:
        ValueError: a setting out of range.
    """
    if (tau1, tau2, softplus) == (1.0, 1.0, None):
        return _reward([number], f"digit({number})")
    if not (is_number(tau1, 0) and is_number(tau2, 0) and tau1 + tau2 < math.inf):
        raise ValueError(f"tau1 and tau2 are {tau1!r} and {tau2!r}, expected finite numbers >= 0")
    if softplus is not None and not is_positive(softplus):
        raise ValueError(f"softplus is {softplus!r}, expected a positive number, or None for ReLU")
    (c,) = _checked([number])
    network = functools.partial(smoothed, beta=softplus)
    return Reward(Headed(network, Tempered(c, tau1, tau2), _images), name=f"digit({number}, tau1={tau1}, tau2={tau2})")


@dataclass(frozen=True)
class Tempered:
    """logits (n, 10) -> tau1 f_c - log Σ_k exp(tau2 f_k), (n,) float64."""

    c: int
    tau1: float
    tau2: float

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        return self.tau1 * logits[:, self.c] - (self.tau2 * logits).logsumexp(1)


@facts(**_FACTS)
def digits(numbers: Sequence[int]) -> Reward:
    """The reward max over `numbers` of log p(c | x): any of them will do, none is preferred.

    Raises:
        ValueError: no digits, or one that is not in 0..9.
    """
    return _reward(numbers, f"digits([{', '.join(map(str, numbers))}])")


@facts(**_FACTS)
def even() -> Reward:
    """The reward max over 0, 2, 4, 6, 8 of log p(c | x)."""
    return _reward([0, 2, 4, 6, 8], "even")


@facts(**_FACTS)
def odd() -> Reward:
    """The reward max over 1, 3, 5, 7, 9 of log p(c | x)."""
    return _reward([1, 3, 5, 7, 9], "odd")


@functools.cache
def load_classifier(device: str = "cpu") -> nn.Module:
    """The trained classifier in eval mode, read once per device; gradients to its input work."""
    try:
        from safetensors.torch import load
    except ImportError as error:
        message = "the digit classifier needs safetensors: pip install safetensors"
        raise ImportError(message) from error
    with torch.device("cpu"):  # whatever torch's default device and dtype
        network = DigitClassifier().float()
    network.load_state_dict(load(resources.files("treesearch.rewards").joinpath("weights", WEIGHTS).read_bytes()))
    return network.to(device).eval().requires_grad_(False)


@functools.cache
def smoothed(device: str, beta: float | None) -> nn.Module:
    """The classifier with softplus of sharpness beta for its ReLUs, itself for None."""
    network = load_classifier(device)
    if beta is None:
        return network
    network = copy.deepcopy(network)
    for parent in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta))
    return network


def _reward(numbers: Sequence[int], name: str) -> Reward:
    """max over `numbers` of log p(c | x) as a Reward."""
    return Reward(Headed(load_classifier, LogProbability(tuple(_checked(numbers))), _images), name=name)


def _block(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def _checked(numbers: Sequence[int]) -> list[int]:
    classes = list(numbers)
    if not classes or any(c not in range(10) for c in classes):
        raise ValueError(f"expected digits from 0 to 9, got {classes}: name at least one")
    return classes


def _images(samples: Tensor) -> Tensor:
    if not isinstance(samples, Tensor) or samples.shape[1:] != (1, 28, 28):
        got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"expected images (n, 1, 28, 28) in [0, 1], got {got}: decode states first; digits are the MNIST kernel's"
        )
    return samples.float()
