"""Comparisons that a law fails by: what was expected, what came, and how far apart two computations may be.

The rows of a network differ in their last digits with the batch they are in, so comparisons across batches leave room,
`atol`. Without one it is what rounding explains: λ ε Σ_layers √n of the largest entry of the row, with ε of the
network's dtype, n the terms of a sum, λ = 4 (a sum of n terms misses by more with probability 2 exp(-λ²/2)), times the
steps of a chain and 1/α_t where a step divides by α_t. Kernels in closed form pass with atol=0.

Source: A New Approach to Probabilistic Rounding Error Analysis (Higham and Mary, 2019), theorem 2.4.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.results.result import SearchResult, TaskResult

LAM = 4.0  # λ of the bound on rounding
UNSEEN = 256.0  # Σ √n of a network that cannot be looked into: eight layers of sums of 1,000 terms


class CheckFailed(AssertionError):
    """A law that does not hold."""


def require(holds: Any, message: str) -> None:
    """Raise where a law does not hold: an `assert` would be gone under `python -O`."""
    if not holds:
        raise CheckFailed(message)


@dataclass(frozen=True)
class Room:
    """How far two computations of the same rows may be apart: atol (1 + |want|) + share · max |row of want|."""

    atol: float = 0.0
    share: float = 0.0

    def times(self, factor: float) -> Room:
        """More of what rounding explains; what was asked for stays."""
        return Room(self.atol, self.share * factor)

    def of(self, want: Tensor) -> Tensor:
        """For each entry of want (n, ...), float64."""
        size = want.double().abs()
        largest = torch.where(size.isfinite(), size, 0.0).reshape(len(want), -1).amax(1)
        return self.atol * (1 + size) + self.share * largest.reshape(-1, *(1,) * (want.ndim - 1))


def same_result(got: SearchResult, want: SearchResult, atol: float = 0.0, where: str = "a second run") -> None:
    """Two searches found the same trees at the same cost."""
    for name in ("nfe", "reward_calls"):
        a, b = getattr(got.cost, name), getattr(want.cost, name)
        require(a == b, f"{where}: cost.{name}: expected {b}, got {a}")
    for a, b in zip(got.tasks, want.tasks, strict=True):
        same_task(a, b, atol, where)


def same_task(got: TaskResult, want: TaskResult, atol: float = 0.0, where: str = "a second run") -> None:
    """Two tasks have the same tree, samples and weights."""
    for name in ("parent", "t", "key", "visits"):
        a, b = getattr(got.tree, name), getattr(want.tree, name)
        if not np.array_equal(a, b):
            raise CheckFailed(f"{where}: tree.{name}: {differing(a, b)}")
    for name in ("value", "reward", "log_w"):
        a, b = torch.from_numpy(getattr(got.tree, name)), torch.from_numpy(getattr(want.tree, name))
        same(
            f"{where}: tree.{name}", a, b, Room(max(atol, 1e-12))
        )  # a rebuilt value sums its children in another order
    same(f"{where}: samples", got.samples, want.samples, Room(atol))
    same(f"{where}: log_weights", got.log_weights, want.log_weights, Room(max(atol, 1e-12)))


def same(what: str, got: Any, want: Any, room: Room | Tensor = Room()) -> None:
    """Raise where rows differ by more than the room, which may be one number for each row."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        if list(got) != list(want):
            raise CheckFailed(f"{what}: {differing(got, want)}")
        return
    require(got.shape == want.shape, f"{what}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
    one, other = got.double().reshape(len(got), -1), want.double().reshape(len(want), -1)
    allowed = (room.of(want) if isinstance(room, Room) else room[:, None]).to(other).reshape(len(want), -1)
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs())
    far = ~same & ~(gap <= allowed)
    if far.any():
        raise CheckFailed(f"{what}: {_far_rows(one, other, gap, allowed.expand(gap.shape), far)}")


def _far_rows(got: Tensor, want: Tensor, gap: Tensor, allowed: Tensor, far: Tensor) -> str:
    """Which rows (n, entries) are too far apart, and the widest gap."""
    rows = far.any(1).nonzero().flatten().tolist()
    over = torch.where(far, gap.nan_to_num(math.inf, math.inf), -1.0)
    row, entry = divmod(int(over.argmax()), max(1, gap.shape[1]))
    return (
        f"{len(rows)} of {len(got)} rows differ ({short(rows)}), most in row {row}, entry {entry}: expected "
        f"{float(want[row, entry]):.7g}, got {float(got[row, entry]):.7g}, a gap of {float(gap[row, entry]):.2g} where "
        f"{float(allowed[row, entry]):.2g} is allowed"
    )


def differing(got: Any, want: Any) -> str:
    """Where two sequences differ first."""
    if len(got) != len(want):
        return f"expected {len(want)} entries, got {len(got)}"
    rows = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    first = rows[0]
    return f"{len(rows)} of {len(want)} differ ({short(rows)}): expected {short(want[first])}, got {short(got[first])}"


def short(value: Any) -> str:
    return reprlib.repr(value)
