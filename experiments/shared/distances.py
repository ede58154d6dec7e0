"""Distances between sets of samples or features, rows (n, D).

    MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean k(x_i, y_j)       unbiased: may be negative
    k = Σ_b exp(-|x - y|² / 2 b²) / B,  b in {1/4, 1/2, 1, 2, 4} times the median distance of the reference

Draws with replacement from a few weighted leaves count their repeats: the estimate is of the law that is drawn from.

Source: A Kernel Two-Sample Test (Gretton et al., 2012), lemma 6; eq. 5 for the biased estimator. GANs Trained by a Two
Time-Scale Update Rule (Heusel et al., 2017), eq. 6, for the Fréchet distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

WIDTHS = (4.0, 2.0, 1.0, 0.5, 0.25)  # of the kernel; each half of the one before
PROJECTIONS = 128
BLOCK = 64


def kernel_sum(x: Tensor, y: Tensor, widths: Sequence[float]) -> float:
    """Σ_ij k(x_i, y_j), the mean of Gaussian kernels of these widths, each half of the one before.

    Distances are in float64, kernels in float32, in blocks that fit the cache.
    """
    total, of_y = 0.0, (y * y).sum(1)
    for block in x.split(BLOCK):
        square = ((block * block).sum(1)[:, None] + of_y).addmm_(block, y.T, alpha=-2).clamp_min_(0)
        k = square.mul_(-0.5 / widths[0] ** 2).float().exp_()
        total += float(k.sum(dtype=torch.float64))
        for _ in widths[1:]:
            k.square_().square_()  # half the width: the fourth power
            total += float(k.sum(dtype=torch.float64))
    return total / len(widths)


def biased_mmd2(x: Tensor, y: Tensor, width: float) -> float:
    """MMD² with one Gaussian kernel and the diagonals (V-statistic), of x and y (n, ...): never negative."""
    x, y = (z.double().flatten(1) for z in (x, y))
    within, across = ((kernel_sum(z, z, (width,)) / len(z) ** 2 for z in (x, y)), kernel_sum(x, y, (width,)))
    return sum(within) - 2 * across / (len(x) * len(y))


class Floor(NamedTuple):
    """What samplers of the target itself come out with, half of a reference against the other half."""

    mmd2: float  # root mean square: its mean is 0
    w1: float


class Reference:
    """Independent draws of a target, to compare others with.

    Args:
        draws: (n, D) or (n, ...), features or samples.
    """

    def __init__(self, draws: Tensor) -> None:
        self.draws = draws.double().flatten(1)
        gaps = torch.pdist(self.draws[:2_000])
        self.width = float(gaps[gaps > 0].median()) if (gaps > 0).any() else 1.0
        chance = torch.Generator().manual_seed(0)
        lines = torch.randn(self.draws.shape[1], PROJECTIONS, generator=chance, dtype=torch.float64)
        self.lines = lines / lines.norm(dim=0)

    def kernel_sum(self, x: Tensor, y: Tensor) -> float:
        """Σ_ij k(x_i, y_j) at the widths of this reference."""
        return kernel_sum(x, y, [w * self.width for w in WIDTHS])

    def _within(self, x: Tensor) -> float:
        """Mean of k over pairs of different rows, of which k(x, x) = 1 is taken off."""
        n = len(x)
        return (self.kernel_sum(x, x) - n) / (n * (n - 1))

    @cached_property
    def _own(self) -> float:
        return self._within(self.draws)

    def mmd2(self, draws: Tensor) -> float:
        """Unbiased MMD² of draws (n, ...) to the reference."""
        x = draws.double().flatten(1)
        return self._within(x) + self._own - 2 * self.kernel_sum(x, self.draws) / (len(x) * len(self.draws))

    def error(self, repeats: float) -> float:
        """Mean unbiased MMD² of draws of the target itself to this reference, if its rows are a resampled pool.

        A weighted pool is off the target by Σ w² (1 - mean k) in the mean (of a large pool: weights are normalised),
        whatever is compared with it. Draws of it count that as pairs of one row, own = p + (1 - p) U with U of
        different rows, and p (1 - U) is what is left.

        Args:
            repeats: p, the share of pairs of rows that are one draw of the pool.
        """
        return repeats * (1 - self._own) / (1 - repeats)

    def w1(self, draws: Tensor) -> float:
        """Mean over directions of the exact W1 of projections."""
        return sliced_w1(draws.double().flatten(1), self.draws, self.lines)

    def floor(self, splits: int = 20) -> Floor:
        """Distances of random halves, in the same units."""
        chance, n = torch.Generator().manual_seed(1), len(self.draws) // 2
        squares, gaps = [], []
        for _ in range(splits):
            order = torch.randperm(2 * n, generator=chance)
            one, other = self.draws[order[:n]], self.draws[order[n:]]
            cross = self.kernel_sum(one, other) / n**2
            squares.append((self._within(one) + self._within(other) - 2 * cross) ** 2)
            gaps.append(sliced_w1(one, other, self.lines))
        return Floor(math.sqrt(np.mean(squares)), float(np.mean(gaps)))


def sliced_w1(x: Tensor, y: Tensor, lines: Tensor) -> float:
    """Mean over columns of lines (D, L) of ∫ |F_x - F_y| of the projections, exact for any two sizes."""
    a, b = (x @ lines).sort(0).values, (y @ lines).sort(0).values
    steps = torch.cat([torch.arange(1, len(v) + 1, dtype=torch.float64) / len(v) for v in (a, b)]).unique()
    width, middle = steps.diff(prepend=steps.new_zeros(1)), steps - 0.5 * steps.diff(prepend=steps.new_zeros(1))
    at = [v[(middle * len(v)).long().clamp_max(len(v) - 1)] for v in (a, b)]  # quantile functions
    return float((width[:, None] * (at[0] - at[1]).abs()).sum(0).mean())


def total_variation(shares: ArrayLike, masses: ArrayLike) -> float:
    """Σ |shares - masses| / 2."""
    return 0.5 * float(np.abs(np.asarray(shares) - np.asarray(masses)).sum())


def frechet(x: Tensor, y: Tensor) -> float:
    """|m - m'|² + tr(S + S' - 2 (S S')^1/2) of two sets of features (n, D)."""
    x, y = x.double(), y.double()
    left, right = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp_min(0).sqrt().sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return float(gap + left.trace() + right.trace() - 2 * cross)


def diversity(x: Tensor) -> float:
    """Mean over pairs of different draws of 1 - cosine, of features (n, D)."""
    unit, n = torch.nn.functional.normalize(x.double(), dim=1), len(x)
    return float(1 - (unit.sum(0).square().sum() - n) / (n * (n - 1)))
