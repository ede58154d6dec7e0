"""Linear measurements of one state as a single one, y = A x_0 + noise of unit variance, and A Aᵀ taken apart.

    A = [A_1/tolerance_1; A_2/tolerance_2; ...],   A Aᵀ = U diag(a) Uᵀ
    v(x̂_0) = log N(y; A x̂_0, r² A Aᵀ + I) - Σ_i M_i log tolerance_i                    M_i entries of y_i
    K (y - A x̂_0),   K = r² Aᵀ (r² A Aᵀ + I)^{-1};   its limit r → ∞ is the projection Aᵀ (A Aᵀ)^{-1}

Where each A_i A_iᵀ is a multiple of I and no two see the same directions, U is I, whatever the size of y. Otherwise
A Aᵀ is made and its eigenvectors are found, once, up to `LARGEST` entries of y.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from treesearch.rewards.observation import Measurement, Operator, check_adjoint
from treesearch.rewards.values import flat

LARGEST = 4096  # entries of y whose A Aᵀ is taken apart as a matrix
ROWS = 256  # of A Aᵀ that are made at once
NOTHING = 1e-9  # a direction of which y sees no more than this share of the largest is not projected


@final
class Stacked:
    """Linear measurements of states as one.

    Args:
        parts: with an `Operator` each.
        shape: of a state.

    Raises:
        ValueError: an adjoint that does not belong to its operator, a y of another shape, or one that is too large.
    """

    def __init__(self, parts: Sequence[Measurement], shape: Sequence[int]) -> None:
        for part in parts:
            check_adjoint(operator_of(part), shape)
        state = torch.zeros(1, *shape, dtype=torch.float64, device="cpu")
        self.parts = tuple(part.fitted(part.operator(state).shape[1:]) for part in parts)
        self._sizes = [part.observed.numel() for part in self.parts]
        self._diagonal = all(operator_of(part).gram is not None for part in self.parts) and self._orthogonal()
        if not self._diagonal and (size := sum(self._sizes)) > LARGEST:
            several = " of the measurements together" if len(self.parts) > 1 else ""
            raise ValueError(
                f"y has {size} entries, more than {LARGEST}, and A Aᵀ{several} is no multiple of I, so that it would "
                "have to be taken apart as a matrix: see fewer entries, or say the operator's `gram` if it has one"
            )

    def gap(self, endpoint: Tensor) -> Tensor:
        """y - A x̂_0 of endpoints (n, *state) along the eigenvectors of A Aᵀ, (n, M) float64."""
        return self._turned(torch.cat([flat(part.gap(endpoint)) for part in self.parts], 1))

    def seen(self, x: Tensor) -> Tensor:
        """A x of (n, *state) along the eigenvectors, (n, M)."""
        return self._turned(self._forward(x))

    def pull(self, gap: Tensor, variance: Tensor) -> Tensor:
        """K gap of (n, M) for r² (n,): how far endpoints are pulled, (n, *state) float64."""
        return self.back(gap * variance[:, None] / (variance[:, None] * self.axes.to(gap.device) + 1))

    def projection(self, gap: Tensor) -> Tensor:
        """Aᵀ (A Aᵀ)^{-1} gap, (n, *state) float64."""
        axes = self.axes.to(gap.device)
        return self.back(torch.where(axes > NOTHING * axes.max(), gap / axes, 0.0))

    def value(self, gap: Tensor, variance: Tensor) -> Tensor:
        """v of gaps (n, M) for r² (n,), (n,) float64."""
        total = variance[:, None] * self.axes.to(gap.device) + 1
        return -0.5 * (gap**2 / total + total.log()).sum(1) - self.constant

    def back(self, seen: Tensor) -> Tensor:
        """Aᵀ of (n, M) along the eigenvectors, (n, *state)."""
        return self._adjoint(seen if self._basis is None else seen @ self._basis.to(seen.device).T)

    def _adjoint(self, seen: Tensor) -> Tensor:
        """Aᵀ of (n, M), (n, *state)."""
        of = zip(self.parts, seen.split(self._sizes, 1), strict=True)
        back = [operator_of(p).adjoint(v.reshape(len(v), *p.observed.shape)) / p.tolerance for p, v in of]
        return torch.stack(back).sum(0)

    def _forward(self, x: Tensor) -> Tensor:
        """A x of (n, *state), (n, M)."""
        return torch.cat([flat(operator_of(part)(x)) / part.tolerance for part in self.parts], 1)

    def _turned(self, seen: Tensor) -> Tensor:
        return seen if self._basis is None else seen @ self._basis.to(seen.device)

    @cached_property
    def constant(self) -> float:
        """Σ_i M_i log tolerance_i + M/2 log 2π, what every v is less by."""
        each = (n * math.log(part.tolerance) for n, part in zip(self._sizes, self.parts, strict=True))
        return sum(each) + 0.5 * sum(self._sizes) * math.log(2 * math.pi)

    @property
    def axes(self) -> Tensor:
        """Eigenvalues a of A Aᵀ, (M,)."""
        return self._taken_apart[0]

    @property
    def _basis(self) -> Tensor | None:
        """Eigenvectors U of A Aᵀ, (M, M); None for I."""
        return self._taken_apart[1]

    @cached_property
    def _taken_apart(self) -> tuple[Tensor, Tensor | None]:
        if self._diagonal:
            of = zip(self._sizes, self.parts, strict=True)
            grams = [(n, (operator_of(part).gram or 0.0) / part.tolerance**2) for n, part in of]
            return torch.cat([torch.full((n,), g, dtype=torch.float64, device="cpu") for n, g in grams]), None
        eye = torch.eye(sum(self._sizes), dtype=torch.float64, device="cpu")
        rows = [self._forward(self._adjoint(part)) for part in eye.split(ROWS)]
        axes, basis = torch.linalg.eigh(torch.cat(rows))
        return axes.clamp_min(0), basis

    def _orthogonal(self) -> bool:
        """Whether no two parts see the same directions: A_i A_jᵀ v = 0 for a random v."""
        draw = torch.Generator("cpu").manual_seed(0)
        for one, other in itertools.combinations(self.parts, 2):
            v = torch.randn(1, *other.observed.shape, dtype=torch.float64, generator=draw, device="cpu")
            back = operator_of(other).adjoint(v)
            if float(operator_of(one)(back).norm()) > 2.0**-52 * back.numel() * float(back.norm()):
                return False
        return True


def operator_of(part: Measurement) -> Operator:
    """The linear operator of a measurement."""
    assert isinstance(part.operator, Operator)
    return part.operator
