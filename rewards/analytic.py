"""Rewards in closed form, for the exact beds and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_positive
from treesearch.rewards.values import flat

_VECTORS = "vectors (n, D); samples of other shapes are read as such"


@facts(range="any", differentiable=True, limits=_VECTORS)
def linear(c: float | Sequence[float] = 1.0) -> Reward:
    """r(x) = c·x over vectors (n, D); a number stands for the same in every dimension."""
    weight = torch.as_tensor(c, dtype=torch.float64, device="cpu")
    return Reward(lambda x, _: (weight.to(x.device) * flat(x.double())).sum(1), f"linear({c})")


@facts(range="-inf to 0", differentiable=True, limits=_VECTORS)
def quadratic(k: float = 1.0, y: float | Sequence[float] = 0.0) -> Reward:
    """r(x) = -k |x - y|² / 2 over vectors (n, D)."""
    if not is_positive(k):
        raise ValueError(f"k is {k!r}, expected a positive number")
    centre = torch.as_tensor(y, dtype=torch.float64, device="cpu")
    return Reward(
        lambda x, _: -0.5 * k * ((flat(x.double()) - centre.to(x.device)) ** 2).sum(1), f"quadratic({k}, {y})"
    )


@facts(range="any", differentiable=True, limits="vectors (n, D)")
def log_mixture(means: Sequence[Sequence[float]], weights: Sequence[float], std: float) -> Reward:
    """r(x) = log Σ_j w_j N(x; m_j, std² I), up to the constant (2π std²)^{-D/2}."""
    centres = torch.as_tensor(means, dtype=torch.float64, device="cpu")
    log_w = torch.as_tensor(weights, dtype=torch.float64, device="cpu").log()

    def fn(x: Tensor, _: object) -> Tensor:
        square = ((x.double()[:, None] - centres.to(x.device)) ** 2).sum(2)
        return torch.logsumexp(log_w.to(x.device) - square / (2 * std**2), 1)

    return Reward(fn, "log_mixture")


@facts(range="its values", differentiable=False, limits="one integer a sample, (n, 1)")
def table(values: Sequence[float]) -> Reward:
    """r(x) = values[x] for a chain whose state is one integer, (n, 1)."""
    entries = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    return Reward(lambda x, _: entries.to(x.device)[x[:, 0]], "table")


@facts(range="its value", differentiable=False, limits="any samples")
def constant(value: float = 0.0) -> Reward:
    """r = value."""
    return Reward(lambda x, _: torch.full((len(x),), value, dtype=torch.float64, device="cpu"), f"constant({value})")
