"""Samples that are texts, as rewards of texts take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward

TEXTS = "texts, a list of n strings"
"""What rewards of texts take, `Facts.limits`."""


def checked(samples: Any) -> list[str]:
    """The samples, if they are texts.

    Raises:
        ValueError: something else.
    """
    if isinstance(samples, Sequence) and not isinstance(samples, str) and all(isinstance(s, str) for s in samples):
        return list(samples)
    got = type(samples).__name__
    if hasattr(samples, "shape"):
        got = f"an array of shape {tuple(samples.shape)}"
    raise ValueError(
        f"expected {TEXTS}, got {got}: this is a reward of texts, which kernels of text decode; rewards with "
        "input='state' see token numbers (n, L)"
    )


def answers(samples: Any, prompts: Sequence[Any] | None) -> list[str]:
    """The texts, less the prompt where one begins with it."""
    texts = checked(samples)
    if prompts is None:
        return texts
    return [text.removeprefix(p) if isinstance(p, str) else text for text, p in zip(texts, prompts, strict=True)]


def by_text(score: Callable[[str], float], name: str) -> Reward:
    """A reward of each text alone."""

    def fn(samples: Any, _: Any) -> Tensor:
        return torch.tensor([score(text) for text in checked(samples)], dtype=torch.float64, device="cpu")

    return Reward(fn, name)
