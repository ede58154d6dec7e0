"""Laws of a denoising step: what a transition must know, and the ready-made ones.

Notation: x_t is the state with t steps to go, q the law that a step draws from, p the base kernel's; q = p without a
guide. A law is no draw: `sample` turns standard normals into states and draws none itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from treesearch.rewards.values import flat


@runtime_checkable
class Transition(Protocol):
    """p(x_{t-1} | x_t) for n rows: a law, not a draw."""

    @property
    def endpoint(self) -> Tensor:
        """Predicted x_0, shape (n, *state), from the same network call."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """x_{t-1} (n, *state) from standard normals (n, *noise_shape)."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(x_{t-1} = x | x_t), shape (n,)."""
        ...

    def log_weight(self, x: Tensor) -> Tensor:
        """log p/q of the step that ended in x, shape (n,): zeros unless a proposal q replaces the base kernel p."""
        ...

    def take(self, rows: Tensor) -> Transition:
        """The same law for the given rows (repeats allowed): offspring share the network call and draw apart."""
        ...


def uniform(noise: Tensor) -> Tensor:
    """Φ(z) in float64: the uniforms that standard normals stand for."""
    return torch.special.ndtr(noise.double())


def expand(rows: Tensor, like: Tensor) -> Tensor:
    """Give a tensor (n,) trailing axes so that it broadcasts against (n, *state); one that has them stays as it is."""
    return rows if rows.ndim > 1 else rows.reshape(-1, *(1,) * (like.ndim - 1))


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Index drawn from each row of probs (..., S) by its uniform u (...), in float64."""
    cdf = probs.double().cumsum(-1)
    total = cdf[..., -1:].contiguous()
    drawn = torch.searchsorted(cdf, u.double()[..., None] * total, right=True)
    return torch.minimum(drawn, torch.searchsorted(cdf, total))[..., 0]  # at most the last that has any


@dataclass(frozen=True)
class Gaussian:
    """q = N(mean, std²), beside the base kernel p = N(base_mean, std²) when a guide moved the mean.

    Args:
        mean: (n, *state).
        std: broadcastable to mean with its row axis kept, zero where the step is deterministic.
        endpoint: predicted x_0 (n, *state).
        base_mean: mean of p (n, *state); None where q = p.
        rewards: r of the endpoints (n,) float64 where a guide computed it, NaN in the rows where it did not.
    """

    mean: Tensor
    std: Tensor
    endpoint: Tensor
    base_mean: Tensor | None = None
    rewards: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        std = self.std.double().expand(self.mean.shape)
        gap = x.double() - self.mean.double()
        density = -0.5 * (gap / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        atom = torch.where(gap == 0, 0.0, -math.inf)
        return flat(torch.where(std > 0, density, atom)).sum(1)

    def log_weight(self, x: Tensor) -> Tensor:
        if self.base_mean is None:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        # -Σ(zδ + δ²/2): a difference of two log densities loses digits over many dimensions.
        std = self.std.double()
        z = (x.double() - self.mean.double()) / std
        delta = (self.mean.double() - self.base_mean.double()) / std
        moved = torch.where(self.mean == self.base_mean, 0.0, -math.inf)
        return flat(torch.where(std > 0, -(z * delta + 0.5 * delta**2), moved)).sum(1)

    def take(self, rows: Tensor) -> Gaussian:
        base = None if self.base_mean is None else self.base_mean[rows]
        known = None if self.rewards is None else self.rewards[rows]
        return Gaussian(self.mean[rows], self.std[rows], self.endpoint[rows], base, known)

    @staticmethod
    def cat(parts: Sequence[Gaussian]) -> Gaussian:
        """The rows of several Gaussians in one; either all or none carry a base mean, and likewise rewards."""
        bases = [p.base_mean for p in parts if p.base_mean is not None]
        known = [p.rewards for p in parts if p.rewards is not None]
        std = torch.cat([p.std.expand(p.mean.shape) for p in parts])
        return Gaussian(
            torch.cat([p.mean for p in parts]),
            std,
            torch.cat([p.endpoint for p in parts]),
            torch.cat(bases) if bases else None,
            torch.cat(known) if known else None,
        )


@dataclass(frozen=True)
class Mixture:
    """Σ_j exp(log_mix_j) N(mean_j, std_j² I) over vector states (n, D); noise (n, D + 1), its first entry picks j.

    Args:
        log_mix: (n, J), normalised.
        mean: (n, J, D).
        std: (n, J).
        endpoint: (n, D).
    """

    log_mix: Tensor
    mean: Tensor
    std: Tensor
    endpoint: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        pick = inverse_cdf(self.log_mix.exp(), uniform(noise[:, 0]))
        rows = torch.arange(len(pick), device=pick.device)
        return self.mean[rows, pick] + self.std[rows, pick][:, None] * noise[:, 1:].to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.log_mix + log_normal(x[:, None], self.mean, self.std), 1)

    def log_weight(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def take(self, rows: Tensor) -> Mixture:
        return Mixture(self.log_mix[rows], self.mean[rows], self.std[rows], self.endpoint[rows])

    @staticmethod
    def cat(parts: Sequence[Mixture]) -> Mixture:
        """The rows of several mixtures in one."""
        return Mixture(
            *(torch.cat(field) for field in zip(*((p.log_mix, p.mean, p.std, p.endpoint) for p in parts), strict=True))
        )


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std² I) over the last axis; std without that axis."""
    gap = ((x - mean) ** 2).sum(-1) / std**2
    return -0.5 * gap - x.shape[-1] * (std.log() + 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class Categorical:
    """Independent tokens: x_{t-1}[i] ~ probs[:, i]; one normal a token, read as a uniform, inverse CDF in float64.

    Args:
        probs: (n, L, S), rows of float64 probabilities.
        endpoint: predicted x_0 (n, L).
        base_probs: probabilities of the base kernel where this is a proposal.
    """

    probs: Tensor
    endpoint: Tensor
    base_probs: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        return inverse_cdf(self.probs, uniform(noise))

    def log_prob(self, x: Tensor) -> Tensor:
        return _log_categorical(self.probs, x)

    def log_weight(self, x: Tensor) -> Tensor:
        if self.base_probs is None:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return _log_categorical(self.base_probs, x) - _log_categorical(self.probs, x)

    def take(self, rows: Tensor) -> Categorical:
        base = None if self.base_probs is None else self.base_probs[rows]
        return Categorical(self.probs[rows], self.endpoint[rows], base)

    @staticmethod
    def cat(parts: Sequence[Categorical]) -> Categorical:
        """The rows of several categoricals in one; either all or none carry base probabilities."""
        bases = [p.base_probs for p in parts if p.base_probs is not None]
        return Categorical(
            torch.cat([p.probs for p in parts]),
            torch.cat([p.endpoint for p in parts]),
            torch.cat(bases) if bases else None,
        )


def _log_categorical(probs: Tensor, x: Tensor) -> Tensor:
    return probs.double().gather(-1, x.long()[..., None]).squeeze(-1).log().sum(-1)
