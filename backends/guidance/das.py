"""DAS: tempered TDS, whose target rises from p to p exp(λ r) along the chain.

    λ_t = λ · min((1 + γ)^(T - t) - 1, 1)                                               temperatures; λ_T = 0
    q(x_s | x_t) = N(mean + std² λ_s ∇_{x_t} r(x̂_0(x_t)), std²),   s = t - 1            this kernel
    w_s = [p(x_s | x_t) / q(x_s | x_t)] · exp(λ_s r(x̂_0(x_s)) - λ_t r(x̂_0(x_t)))        Feynman-Kac, `tempering` below
    resample (ssp) where ESS < K/2

Early endpoints mislead, so their rewards enter weakly; where λ_t has reached λ (from t = T - log 2 / log(1 + γ) on) it
is TDS. The whole sampler, where `das` is this kernel:

    FeynmanKac(lam=λ, schedule=das.schedule, tempering=das.tempering(das.schedule), resampling="ssp")

What it converges to: π as K grows. Bias: none in Ẑ, for the temperatures are fixed beforehand and x_0 is weighed by the
whole of λ, also where λ_0 < λ. Cost: T NFE, backward passes and reward calls a sample.

Source: Test-time Alignment of Diffusion Models without Reward Over-optimization (Kim, Kim and Park, 2025); γ = .008 at
T = 100 in its experiments. The released code adds up log Σ w of every step as log Z; here levels without resampling
carry their weights on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import expand
from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.rewards.numeric import is_number, is_positive


@final
@dataclass(frozen=True)
class DAS(GradientGuided):
    """The tempered proposal of diffusion alignment as sampling.

    Args:
        lam: λ of the target, as a rule that of the search.
        gamma: γ > 0; the larger, the sooner the whole of λ is reached. log 2 / gamma steps are tempered.
        kernel, reward, window, max_shift, through_network, value: as in `GradientGuided`.

    Raises:
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    lam: float = 1.0
    gamma: float = 0.008

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.lam, 0) and self.lam < math.inf):
            raise ValueError(f"lam is {self.lam!r}, expected a finite number >= 0")
        if not is_positive(self.gamma):
            raise ValueError(f"gamma is {self.gamma!r}, expected a positive number; TDS is its limit")

    def shift(self, step: Step) -> Tensor:
        """By the gradient of the tempered reward of the level that the step leads to."""
        factor = self.factors.to(step.gradient)[step.t - 1]
        return step.law.std**2 * self.lam * (expand(factor, step.gradient) * step.gradient)

    @cached_property
    def factors(self) -> Tensor:
        """λ_t / λ, (T + 1,) float64."""
        done = torch.arange(self._spec.num_steps, -1, -1, dtype=torch.float64, device="cpu")
        return torch.expm1(done * torch.log1p(torch.tensor(self.gamma, dtype=torch.float64, device="cpu"))).clamp(
            max=1.0
        )

    @property
    def schedule(self) -> tuple[int, ...]:
        """Every level at which Feynman-Kac can weigh and branch, descending: λ_T = 0 leaves x_T out."""
        return (*(t for t in range(self._spec.num_steps - 1, 0, -1) if self._spec.branchable(t)), 0)

    def tempering(self, schedule: Sequence[int]) -> tuple[float, ...]:
        """λ_t / λ at the levels of a schedule that ends in 0, where it is 1: what `FeynmanKac(tempering=...)` takes."""
        if list(schedule) != sorted(set(schedule), reverse=True) or schedule[-1] != 0:
            raise ValueError(f"schedule {list(schedule)}: expected descending levels that end in 0")
        return (*(float(self.factors[t]) for t in schedule[:-1]), 1.0)
