"""Exact chains: Gaussian data and Gaussian mixtures, whose reverse kernels and tilted laws are known in closed form.

Forward process x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε with ᾱ_t = cos²(.98 π t / 2T). For data N(m, s² I):

    μ_t = √ᾱ_t m,  v_t = ᾱ_t s² + 1 - ᾱ_t,  c_t = √(ᾱ_t/ᾱ_{t-1}) v_{t-1}
    x_{t-1} | x_t ~ N(A_t x_t + B_t, S_t²),  A_t = c_t / v_t,  B_t = μ_{t-1} - A_t μ_t,  S_t² = v_{t-1} - c_t²/v_t

is the exact discrete reverse kernel: x_0 is N(m, s² I) at any number of steps. A mixture of such data has a mixture of
such kernels, weighted by the responsibilities of x_t. Chains run in float64.

Tilting by r linear (c·x) or quadratic (-k|x - y|²/2) keeps every law in the family: `LinearGaussian.tilted` and
`GaussianMixture.tilted` return log Z, the target's moments and the soft values V_t = (1/λ) log E[exp(λ r(x_0)) | x_t].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Mixture, log_normal
from treesearch.rewards.numeric import is_positive, is_whole

F64 = torch.float64


class Tilt(NamedTuple):
    """r(x) = c·x, or -k|x - y|²/2 where k > 0; a number stands for the same in every dimension."""

    c: float | tuple[float, ...] = 0.0
    k: float = 0.0
    y: float | tuple[float, ...] = 0.0


class Tilted(NamedTuple):
    """Closed forms of π(x_0) ∝ p(x_0) exp(λ r(x_0))."""

    log_z: float
    weight: Tensor  # (J,) mixture weights of π
    mean: Tensor  # (J, D) component means of π
    std: Tensor  # (J,)
    value: Callable[[Tensor, Tensor], Tensor]  # (x_t (n, D), t (n,)) -> V_t (n,)


def cosine_bar(num_steps: int) -> Tensor:
    """ᾱ_t = cos²(.98 π t / 2T), t = 0..T."""
    return torch.cos(0.98 * math.pi * torch.arange(num_steps + 1, dtype=F64, device="cpu") / (2 * num_steps)) ** 2


def log_gaussian_tilt(mean: Tensor, var: Tensor, tilt: Tilt, lam: float) -> Tensor:
    """log E[exp(λ r(X))] for X ~ N(mean (..., D), var (...) I)."""
    if tilt.k == 0:
        c = torch.as_tensor(tilt.c, dtype=F64, device="cpu").expand(mean.shape[-1])
        return (lam * mean * c).sum(-1) + 0.5 * lam**2 * (c**2).sum() * var
    y = torch.as_tensor(tilt.y, dtype=F64, device="cpu")
    grow = 1 + lam * tilt.k * var
    return -0.5 * mean.shape[-1] * grow.log() - 0.5 * lam * tilt.k * ((mean - y) ** 2).sum(-1) / grow


def tilt_gaussian(mean: Tensor, std: Tensor, tilt: Tilt, lam: float) -> tuple[Tensor, Tensor]:
    """Mean and std of N(mean, std² I) exp(λ r), normalised."""
    var = std**2
    if tilt.k == 0:
        return mean + lam * torch.as_tensor(tilt.c, dtype=F64, device="cpu") * var[..., None], std
    y = torch.as_tensor(tilt.y, dtype=F64, device="cpu").expand(mean.shape[-1])
    new = 1 / (1 / var + lam * tilt.k)
    return new[..., None] * (mean / var[..., None] + lam * tilt.k * y), new.sqrt()


class Reverse(NamedTuple):
    """The reverse kernel's coefficients for J components of one D-dimensional mixture."""

    bar: Tensor  # (T + 1,)
    mu: Tensor  # (T + 1, J, D)
    var: Tensor  # (T + 1, J)
    gain: Tensor  # (T + 1, J)  A_t
    std: Tensor  # (T + 1, J)  S_t

    @staticmethod
    def of(mean: Tensor, std: Tensor, num_steps: int) -> Reverse:
        bar = cosine_bar(num_steps)
        mu = bar.sqrt()[:, None, None] * mean
        var = bar[:, None] * std**2 + 1 - bar[:, None]
        cov = torch.zeros_like(var)
        cov[1:] = (bar[1:] / bar[:-1]).sqrt()[:, None] * var[:-1]
        gain = torch.zeros_like(var)
        gain[1:] = cov[1:] / var[1:]
        scale = torch.zeros_like(var)
        scale[1:] = (var[:-1] - cov[1:] ** 2 / var[1:]).clamp_min(0).sqrt()
        return Reverse(bar, mu, var, gain, scale)

    def posterior(self, x: Tensor, t: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 | x_t and component: mean (n, J, D) and variance (n, J)."""
        slope = self.bar[t].sqrt()[:, None] * std**2 / self.var[t]
        mean = self.mu[0] + slope[..., None] * (x[:, None] - self.mu[t])
        return mean, std**2 - slope * self.bar[t].sqrt()[:, None] * std**2


@final
@dataclass(frozen=True, kw_only=True)
class LinearGaussian:
    """The exact reverse chain of N(mean, std² I) data.

    Args:
        num_steps: T.
        dim: D.
        mean, std: of the data, the same in every dimension.
    """

    num_steps: int = 5
    dim: int = 1
    mean: float = 0.3
    std: float = 0.8

    def __post_init__(self) -> None:
        _positive(num_steps=self.num_steps, dim=self.dim, std=self.std)

    dtype = F64

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    @property
    def fingerprint(self) -> str:
        return repr(self)

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        return torch.full((1, self.dim), self.mean, dtype=F64, device="cpu"), torch.tensor(
            [self.std], dtype=F64, device="cpu"
        )

    @cached_property
    def reverse(self) -> Reverse:
        return Reverse.of(*self._data, self.num_steps)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return self.reverse.mu[-1, 0] + self.reverse.var[-1, 0].sqrt() * noise.double()

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        gap = x - self.reverse.mu[t, 0]
        mean = self.reverse.mu[t - 1, 0] + self.reverse.gain[t] * gap
        slope = self.reverse.bar[t].sqrt() * self.std**2 / self.reverse.var[t, 0]
        return Gaussian(mean, self.reverse.std[t], self.mean + slope[:, None] * gap)

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def tilted(self, tilt: Tilt, lam: float = 1.0) -> Tilted:
        """Closed forms under exp(λ r)."""
        return _tilted(torch.zeros(1, dtype=F64, device="cpu"), *self._data, self.reverse, tilt, lam)


@final
@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """The exact mixture reverse chain of Σ_j weights_j N(means_j, stds_j² I) data.

    Args:
        num_steps: T.
        weights: (J,) positive, normalised here.
        means: J tuples of D numbers.
        stds: (J,).
    """

    num_steps: int
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]

    def __post_init__(self) -> None:
        _positive(num_steps=self.num_steps)
        for std, weight in zip(self.stds, self.weights, strict=False):
            _positive(std=std, weight=weight)
        if not len(self.weights) == len(self.means) == len(self.stds):
            raise ValueError("weights, means and stds must have one entry a component")

    dtype = F64

    @staticmethod
    def ring(num_steps: int = 100, modes: int = 8, radius: float = 4.0, std: float = 0.3) -> GaussianMixture:
        """Equal Gaussians on a circle, the 2-D bed of the tree-sampling literature."""
        angles = [2 * math.pi * j / modes for j in range(modes)]
        means = tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)
        return GaussianMixture(num_steps=num_steps, weights=(1.0,) * modes, means=means, stds=(std,) * modes)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (len(self.means[0]),)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (len(self.means[0]) + 1,)

    @property
    def fingerprint(self) -> str:
        return repr(self)

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.means, dtype=F64, device="cpu"), torch.tensor(self.stds, dtype=F64, device="cpu")

    @cached_property
    def log_mix(self) -> Tensor:
        return torch.tensor(self.weights, dtype=F64, device="cpu").log().log_softmax(0)

    @cached_property
    def reverse(self) -> Reverse:
        return Reverse.of(*self._data, self.num_steps)

    def responsibilities(self, x: Tensor, t: Tensor) -> Tensor:
        """log γ_j(x_t), shape (n, J)."""
        joint = self.log_mix + log_normal(x[:, None], self.reverse.mu[t], self.reverse.var[t].sqrt())
        return joint.log_softmax(1)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        n = len(noise)
        var, mu = self.reverse.var[-1].sqrt().expand(n, -1), self.reverse.mu[-1].expand(n, -1, -1)
        return Mixture(self.log_mix.expand(n, -1), mu, var, mu[:, 0]).sample(noise)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Mixture:
        log_gamma = self.responsibilities(x, t)
        mean = self.reverse.mu[t - 1] + self.reverse.gain[t][..., None] * (x[:, None] - self.reverse.mu[t])
        data, _ = self.reverse.posterior(x, t, self._data[1])
        return Mixture(log_gamma, mean, self.reverse.std[t], (log_gamma.exp()[..., None] * data).sum(1))

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def tilted(self, tilt: Tilt, lam: float = 1.0) -> Tilted:
        """Closed forms under exp(λ r)."""
        return _tilted(self.log_mix, *self._data, self.reverse, tilt, lam)


def _tilted(log_mix: Tensor, mean: Tensor, std: Tensor, reverse: Reverse, tilt: Tilt, lam: float) -> Tilted:
    joint = log_mix + log_gaussian_tilt(mean, std**2, tilt, lam)
    new_mean, new_std = tilt_gaussian(mean, std, tilt, lam)

    def value(x: Tensor, t: Tensor) -> Tensor:
        prior = log_mix + log_normal(x[:, None], reverse.mu[t], reverse.var[t].sqrt())
        at, var = reverse.posterior(x, t, std)
        return torch.logsumexp(prior.log_softmax(1) + log_gaussian_tilt(at, var, tilt, lam), 1) / lam

    return Tilted(float(torch.logsumexp(joint, 0)), joint.softmax(0), new_mean, new_std, value)


def _positive(**values: float) -> None:
    for name, value in values.items():
        kind = "whole number" if name in ("num_steps", "dim") else "number"
        if not is_positive(value) or (kind != "number" and not is_whole(value)):
            raise ValueError(f"{name} is {value!r}, expected a positive {kind}")
