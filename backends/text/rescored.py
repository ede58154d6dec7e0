"""Tokens that are revealed together, weighed as if they had been drawn one after another.

    log p/q = Σ_j log p(x_{i_j} | x_t, x_{i_1}, ..., x_{i_{j-1}}) - log p(x_{i_j} | x_t)       i_1 < i_2 < ... revealed

A step draws k positions apart, from the product of their marginals: that is q. Under p each sees those before it, so
that p's samples are those of a chain that reveals one position at a time. For a network whose conditionals are of one
joint law that is this law, in however few steps; the weights say what it costs. Each step asks the network k - 1 times
more, in the same evaluation: NFE stay, rows grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Tokens, Wrapper, describe, optional
from treesearch.backends.text.scaffold import Scaffold


@final
@dataclass(frozen=True, eq=False)
class Rescored(Wrapper):
    """A kernel of masked text whose parallel reveals carry log p/q.

    Args:
        kernel: a `MaskedTextKernel` that reveals in an order (`reveal="confidence"` or "left"), so that how many
            tokens a step reveals is known before; or a `Scaffold` of one.

    Raises:
        TypeError: another kernel.
        ValueError: one that reveals at random, or draws from the most probable tokens alone (top_p).
    """

    def __post_init__(self) -> None:
        order = getattr(self._texts, "reveal", None)
        if order is None:
            raise TypeError(f"rescored is for a MaskedTextKernel, got {type(self.kernel).__name__}")
        if order == "random":
            raise ValueError("rescored needs reveal='left' or 'confidence', where a step's share of tokens is known")
        if self._texts.top_p < 1:
            raise ValueError(
                "rescored weighs draws that may be any token, and top_p leaves most of them out: use top_p=1"
            )

    @property
    def _texts(self) -> Any:
        """The kernel that reveals."""
        return self.kernel.kernel if isinstance(self.kernel, Scaffold) else self.kernel

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Law:
        return Law(self.kernel.transition(x, t, cond), t, cond or {}, self.kernel)

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """A row for each token that a step may reveal, twice under guidance."""
        spec = describe(self.kernel, identify=False)
        each = (-(-math.prod(spec.state_shape) // t) for t in range(1, spec.num_steps + 1))
        return (1, *(rows * k for rows, k in zip(spec.rows_per_nfe[1:], each, strict=True)))

    @property
    def departs(self) -> None:
        """Its steps carry log p/q."""

    @property
    def base_law(self) -> str:
        """Whose law p is."""
        said = optional(self.kernel, "base_law")
        own = "" if said is None else f"; {said}"
        return f"the network's tokens one at a time, each given those before it{own}"


@final
@dataclass(frozen=True)
class Law:
    """A law of tokens with the weight of drawing them in turn.

    Args:
        law: q.
        t: of the rows (n,).
        cond: of the rows.
        kernel: that is asked again.
    """

    law: Tokens
    t: Tensor
    cond: Mapping[str, Any]
    kernel: Any

    @property
    def endpoint(self) -> Tensor:
        return self.law.endpoint

    def sample(self, noise: Tensor) -> Tensor:
        return self.law.sample(noise)

    def endpoints(self, noise: Tensor) -> Tensor:
        return self.law.endpoints(noise)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)

    def log_weight(self, x: Tensor) -> Tensor:
        revealed = x != self.law.x
        rank = revealed.long().cumsum(1)  # 1 for the first
        weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for j in range(2, int(revealed.sum(1).max()) + 1):
            row, column = (revealed & (rank == j)).nonzero(as_tuple=True)
            before = torch.where(revealed[row] & (rank[row] < j), x[row], self.law.x[row])
            seen = self.kernel.transition(before, self.t[row], _rows(self.cond, row, len(x)))
            token, here = x[row, column], torch.arange(len(row), device=x.device)
            gain = seen.log_prob_of(here, column, token) - self.law.log_prob_of(row, column, token)
            weight.index_add_(0, row, gain)
        return weight

    def take(self, rows: Tensor) -> Law:
        rows = rows.to(self.t.device)
        return replace(self, law=self.law.take(rows), t=self.t[rows], cond=_rows(self.cond, rows, len(self.t)))


def _rows(cond: Mapping[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) and len(v) == n else v for k, v in cond.items()}
