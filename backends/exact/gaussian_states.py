"""Gaussian data of any covariance with an exact denoiser: a chain whose law, and whose posteriors, are closed forms.

    x_0 ~ N(m, Σ),  Σ = U diag(λ) Uᵀ;   x̂_0(x_t) = m + U diag(α_t λ/(α_t² λ + σ_t²)) Uᵀ (x_t - α_t m)

in the steps of `chains.diffusion.Chain`. As x̂_0 is linear, the law of x_0 at any number of steps is a Gaussian
N(m', C') too, near N(m, Σ) and found by recursion (`law`); it, not N(m, Σ), is the p of every search. Given
y = A x_0 + N(0, v² I)

    y ~ N(A m', S),  S = A C' Aᵀ + v² I;   x_0 | y ~ N(m' + C' Aᵀ S^{-1} (y - A m'), C' - C' Aᵀ S^{-1} A C')

(`given`): evidence and posterior of a linear inverse problem, to compare searches with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import cosine_bar

F64 = torch.float64


class Posterior(NamedTuple):
    """What is known of x_0 once y is seen."""

    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)
    log_evidence: float  # log p(y)


class GaussianStates:
    """The chain of N(mean, cov) states.

    Args:
        mean: m (*state).
        cov: Σ (D, D), positive definite, entries ordered as in m.reshape(-1).
        num_steps: T, of the cosine schedule.
        eta: η of the steps.

    Raises:
        ValueError: shapes that do not fit, or a matrix that is no covariance.
    """

    dtype = F64

    def __init__(self, mean: Tensor, cov: Tensor, *, num_steps: int = 30, eta: float = 1.0) -> None:
        if tuple(cov.shape) != (mean.numel(), mean.numel()):
            raise ValueError(f"cov has shape {tuple(cov.shape)}, expected ({mean.numel()}, {mean.numel()})")
        self.mean, self.cov, self.num_steps = mean.to(F64), cov.to(F64), num_steps
        if not (torch.allclose(self.cov, self.cov.T) and self._variances.min() > 0):
            raise ValueError("cov is no covariance: expected a symmetric matrix with positive eigenvalues")
        bar = cosine_bar(num_steps)
        told = torch.arange(1, num_steps + 1, device="cpu")
        self.chain = Chain(Schedule(told, bar.sqrt(), (1 - bar).sqrt(), "sample"), eta=eta)
        self.stochastic = self.chain.stochastic

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    @cached_property
    def fingerprint(self) -> str:
        return f"{type(self).__name__}{self.chain.settings()}{self.mean.tolist()}{self.cov.tolist()}"

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return noise.to(F64)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        gap = (x - self.chain.at("alpha", t, x) * self.mean).flatten(1)
        moved = (gap @ self._axes * self._gain[t]) @ self._axes.T
        return self.chain.law(x, t, self.mean + moved.reshape(x.shape))

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    @cached_property
    def law(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_0."""
        return carried(self)

    def given(self, rows: Tensor, y: Tensor, std: float) -> Posterior:
        """The chain's own law of x_0 given y = A x_0 + N(0, std² I).

        Args:
            rows: A (M, D).
            y: (M,).
            std: v; 0 for what is known exactly, where A C' Aᵀ has full rank.
        """
        mean, cov = self.law
        a, gap = rows.to(F64), y.to(F64) - rows.to(F64) @ mean
        seen = a @ cov @ a.T + std**2 * torch.eye(len(a), dtype=F64, device="cpu")
        pull = torch.linalg.solve(seen, a @ cov)
        constant = torch.logdet(seen) + len(a) * math.log(2 * math.pi)
        evidence = -0.5 * (gap @ torch.linalg.solve(seen, gap) + constant)
        return Posterior(mean + pull.T @ gap, cov - pull.T @ a @ cov, float(evidence))

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.cov)

    @property
    def _variances(self) -> Tensor:
        """λ (D,)."""
        return self._spectrum[0]

    @property
    def _axes(self) -> Tensor:
        """U (D, D)."""
        return self._spectrum[1]

    @cached_property
    def _gain(self) -> Tensor:
        """α_t λ/(α_t² λ + σ_t²), (T + 1, D)."""
        alpha, sigma = self.chain.alpha[:, None], self.chain.sigma[:, None]
        noise = torch.where(alpha > 0, sigma, 1.0) ** 2  # entry 0 is unused
        return alpha * self._variances / (alpha**2 * self._variances + noise)


def carried(kernel: Any) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of x_0 of a chain whose steps are affine in x_t, whose noise does not depend on
    x_t, and whose prior is affine in its noise: a `GaussianStates`, and what wraps one without a reward."""
    dim = math.prod(kernel.state_shape)
    eye = torch.eye(dim, dtype=F64, device="cpu")
    probes = torch.cat([eye.new_zeros(1, dim), eye]).reshape(-1, *kernel.state_shape)
    mean, slope = _affine(kernel.prior(probes))
    cov = slope @ slope.T
    for t in range(kernel.num_steps, 0, -1):
        law = kernel.transition(probes, torch.full((dim + 1,), t, device="cpu"))
        at, slope = _affine(law.mean)
        noise = law.std.expand(law.mean.shape)[0].flatten() ** 2
        mean, cov = slope @ mean + at, slope @ cov @ slope.T + torch.diag(noise)
    return mean, cov


def _affine(images: Tensor) -> tuple[Tensor, Tensor]:
    """Value at 0 (D,) and slope (D, D) from the images of 0 and of the unit vectors."""
    flat = images.flatten(1)
    return flat[0], (flat[1:] - flat[0]).T
