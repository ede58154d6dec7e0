"""Trust region: a tempered gradient as proposal, whose divergence from the base chain is bounded.

    q(x_s | x_t) = N(mean + min(1, ρ/|shift/std|) shift, std²),   s = t - 1
    shift = std² λ (1 - s/T) ∇_{x_t} r(x̂_0(x_t))
    ρ² = 2 kl / n,  n the guided steps;   KL(q | p) of a step <= ρ²/2, of the whole chain <= kl

The gradient of an endpoint's reward points somewhere useful long before its size means anything: where modes have not
parted, or λ r is steep, λ ∇ r̂ asks for steps of many standard deviations, after which one path in thousands carries all
of the weight (`backends.guidance.base`). Here a step leans that way by a small part of its own noise, which costs
the weights kl nats at most in all, a part of a nat between two levels of a sampler that weighs and resamples, and the
levels do the rest. The bound knows nothing of the reward's scale, of the dimension or of T. It is a bound, not a cure:
a gradient that points nowhere (r = sin 40 x) costs its kl nats and gains nothing; leave the guide away then. Over a
kernel that carries log p/q itself the bound is on what this guide adds.

Source: the twist is that of TDS, Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et
al., 2023); a limit on KL: Trust Region Policy Optimization (Schulman et al., 2015). The linear temperature and kl = 4.5
are this project's, chosen on the beds of `experiments.mixtures.evidence` with seeds of their own.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import final

from torch import Tensor

from treesearch.backends.base import expand
from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.rewards.numeric import is_number, is_positive


@final
@dataclass(frozen=True)
class TrustRegion(GradientGuided):
    """A proposal within kl nats of the kernel that it wraps, for methods that weigh their samples, as `TreeSampling`.

    Args:
        lam: λ of the target, as a rule that of the search.
        kl: bound of KL(q | p) of a whole chain, in nats.
        kernel, reward, window, max_shift, through_network, value: as in `GradientGuided`.

    Raises:
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    lam: float = 1.0
    kl: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.lam, 0) and self.lam < math.inf):
            raise ValueError(f"lam is {self.lam!r}, expected a finite number >= 0")
        if not is_positive(self.kl):
            raise ValueError(f"kl is {self.kl!r}, expected a positive number of nats; TDS is without a bound")

    def shift(self, step: Step) -> Tensor:
        """By the gradient, tempered by the level that the step leads to."""
        factor = 1 - (step.t - 1).to(step.gradient) / self._spec.num_steps
        return step.law.std**2 * self.lam * (expand(factor, step.gradient) * step.gradient)

    @property
    def limit(self) -> float:
        """ρ, or `max_shift` where that is less."""
        steps = int(self._levels[1:].sum())
        own = math.sqrt(2 * self.kl / steps) if steps else 0.0
        return own if self.max_shift is None else min(own, self.max_shift)
