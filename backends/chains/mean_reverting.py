"""Mean reversion: a chain from a clean image x_0 to a noisy copy of a degraded one, μ.

    dx = θ_t (μ - x) dt + √(2 θ_t) σ∞ dw          α_t = exp(-∫θ), σ_t = σ∞ √(1 - α_t²)
    x_t = μ + α_t (x_0 - μ) + σ_t ε               prior x_T = μ + σ∞ ε

On y = x - μ this is a diffusion chain of y_0 = x_0 - μ, and the first-order steps of the paper are those of DDIM there:

    SDE-1   η = 1, also the exact law of x_s given x_t and x_0        ODE-1   η = 0

What the network returns is told as x̂_0 - μ, whichever it is:

    noise      (y - σ_t ε)/α_t                data      x̂_0 - μ
    velocity   α_t y - (σ_t/σ∞) v             residual  itself

α falls on a grid of K training steps, straight in log α between them:

    θ_k ∝ 1 - f_{k+1}/f_0,  f_u = cos²(π/2 · (u/(K + 2) + s)/(1 + s)), s = .008,  α_K = floor

A chain of T steps visits times evenly spaced from where λ = log(α/σ) is at least `lambda_min` to 0. The defaults are
the paper's, σ∞ = 50/255 for images in [0, 1]. Velocity loses no digits where α is small; noise loses 1/α_t.

Sources:
    MRS: A Fast Sampler for Mean Reverting Diffusion (Li et al., 2025): steps, parametrisations and their defaults.
    Image Restoration with Mean-Reverting Stochastic Differential Equations (Luo et al., 2023): the process and θ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Schedule
from treesearch.rewards.numeric import is_number, is_positive, is_whole

Predicts = Literal["noise", "data", "velocity", "residual"]
_SHIFT = 0.008  # s


@final
@dataclass(frozen=True, kw_only=True)
class MeanReverting:
    """The process.

    Args:
        predicts: what the network returns.
        spread: σ∞, standard deviation of the prior around μ.
        floor: α at the last training step.
        train_steps: K.
        lambda_min: least log(α/σ) that a chain begins at.

    Raises:
        ValueError: an unknown prediction, or a number out of range.
    """

    predicts: Predicts = "noise"
    spread: float = 50 / 255
    floor: float = 0.005
    train_steps: int = 100
    lambda_min: float = -5.0

    def __post_init__(self) -> None:
        if self.predicts not in get_args(Predicts):
            raise ValueError(f"unknown prediction {self.predicts!r}: choose {', '.join(get_args(Predicts))}")
        if not is_positive(self.spread):
            raise ValueError(f"spread is {self.spread!r}, expected a standard deviation above 0")
        if not (is_number(self.floor, 0, 1) and 0 < self.floor < 1):
            raise ValueError(f"floor is {self.floor!r}, expected α_K between 0 and 1")
        if not is_whole(self.train_steps, 2):
            raise ValueError(f"train_steps is {self.train_steps!r}, expected at least 2")
        if not is_number(self.lambda_min):
            raise ValueError(f"lambda_min is {self.lambda_min!r}, expected a number")

    outputs = 1  # tensors like x that the network returns

    def log_alpha(self) -> Tensor:
        """log α of the training steps 0..K, (K + 1,) float64."""
        k = self.train_steps
        u = torch.arange(k + 2, dtype=torch.float64, device="cpu")
        f = torch.cos(0.5 * math.pi * (u / (k + 2) + _SHIFT) / (1 + _SHIFT)) ** 2
        theta = 1 - f / f[0]
        passed = torch.cat([theta.new_zeros(1), theta[2:].cumsum(0)])
        return math.log(self.floor) * passed / passed[-1]

    def alpha(self, times: Tensor) -> Tensor:
        """α at times (n,) in 0..K, float64."""
        table, times = self.log_alpha(), times.double().cpu()
        below = times.floor().long().clamp(0, self.train_steps - 1)
        return torch.lerp(table[below], table[below + 1], times - below).exp()

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Times in 0..K at which log(α/σ) is as given (n,), the last one where it never falls so low; float64."""
        q, table = self.spread * log_snr.double().cpu().exp(), self.log_alpha()
        wanted = q.log() - 0.5 * torch.log1p(q * q)
        wanted = torch.where(q < torch.inf, wanted, 0.0).clamp(float(table[-1]), 0.0)
        above = torch.searchsorted(-table, -wanted, right=True).clamp(1, self.train_steps)
        return above - 1 + (table[above - 1] - wanted) / (table[above - 1] - table[above])

    def at(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is told, α and σ, at shares (n,) in 0..1 of the training steps; float64."""
        times = self.train_steps * share.double().cpu()
        alpha = self.alpha(times)
        return times, alpha, self.spread * (1 - alpha**2).clamp_min(0).sqrt()

    def schedule(self, num_steps: int) -> Schedule:
        """T steps, evenly spaced in time; the network is told the time in training steps.

        Raises:
            ValueError: num_steps below 1.
        """
        if not is_whole(num_steps):
            raise ValueError(f"num_steps is {num_steps!r}, expected at least 1")
        last = float(self.time_of(torch.tensor([self.lambda_min], device="cpu"))) / self.train_steps
        times, alpha, sigma = self.at(torch.linspace(0, last, num_steps + 1, dtype=torch.float64, device="cpu"))
        return Schedule(times[1:].float(), alpha, sigma, "sample", prior_std=self.spread)

    def read(self, output: Tensor, y: Tensor, mu: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x̂_0 - μ, which `Chain.law` takes, from a network output (n, *state) at y = x_t - μ."""
        if self.predicts == "noise":
            return (y - sigma * output) / alpha
        if self.predicts == "velocity":
            return alpha * y - sigma / self.spread * output
        return output - mu if self.predicts == "data" else output

    def target(self, clean: Tensor, mu: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should return: the inverse of `read`."""
        if self.predicts == "noise":
            return eps
        if self.predicts == "velocity":
            return alpha * self.spread * eps - sigma / self.spread * (clean - mu)
        return clean if self.predicts == "data" else clean - mu
