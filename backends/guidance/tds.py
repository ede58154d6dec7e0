"""TDS: each step is twisted by the gradient of the log twisting function λ r(x̂_0(x_t)).

    p̃_t(x_t) = exp(λ r(x̂_0(x_t))),  p̃_0 = exp(λ r)                           twisting functions
    q(x_s | x_t) = N(mean + std² λ ∇_{x_t} r(x̂_0(x_t)), std²)                 the score s_θ + ∇ log p̃_t in place of s_θ
    w_s = [p(x_s | x_t) / q(x_s | x_t)] · [p̃_s(x_s) / p̃_t(x_t)]

`FeynmanKac(potential="difference", schedule=(every level, 0), lam=λ)` on this kernel, for the same reward and λ, is the
twisted diffusion sampler: its potential of the endpoint at a level is p̃_s/p̃_t, the steps' Σ log p/q enters beside it,
and the first scheduled level counts from reference 0, which weighs x_T by p̃_T. With a coarser schedule the twists
between two levels telescope and the same weights come in fewer parts. Best-of-N on it is importance sampling.

The factor. Best for this chain is q ∝ p(x_s | x_t) exp(λ V_s(x_s)), V_s the soft value; to first order in V_s around
the mean it is N(mean + std² λ ∇V_s(mean), std²) for every Gaussian step: DDPM, DDIM(η) and flow alike. TDS takes the
gradient of V_t ≈ r∘x̂_0 at x_t, which the step's own evaluation gives: ∇V_t = (∂mean/∂x_t)ᵀ ∇V_s, the same as steps
shrink. (Linear-Gaussian chain, linear r: a fraction A_t of the best shift.) The other rule in use moves ε̂ to
ε̂ - σ_t λ g in DDIM's eq. 12, as classifier guidance does, and so the mean by (α_s σ_t/α_t - √(σ_s² - std²)) σ_t λ g:
at η = 1 that is std² λ g times (α_s/α_t) σ_t²/σ_s², again the same as steps shrink, but for η < 1 it does not shrink
with std, and the weights spread without bound as η → 0.

Source: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3,
algorithm 1. Classifier guidance: Diffusion Models Beat GANs (Dhariwal and Nichol, 2021), algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import final

from torch import Tensor

from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class TDS(GradientGuided):
    """The twisted proposal of the twisted diffusion sampler.

    Args:
        lam: λ of the twist, as a rule that of the search; less is a more careful proposal, and 0 the base kernel.
        kernel, reward, window, max_shift, through_network, value: as in `GradientGuided`.

    Raises:
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.lam, 0) and self.lam < math.inf):
            raise ValueError(f"lam is {self.lam!r}, expected a finite number >= 0")

    def shift(self, step: Step) -> Tensor:
        return step.law.std**2 * self.lam * step.gradient
