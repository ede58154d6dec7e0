"""What is known of a frozen policy's noise, in a search: where x_T should be drawn, and what it is worth.

    NoiseProposal     w ~ q(w | s) = (1 - ε) N(m(s), diag v(s)²) + ε N(0, I),  x_T = prior(w)
                      log p/q = log N(w; 0, I) - log q(w | s),  at most log 1/ε
    NoiseValue        v(x_T) = Q^W(s, w),  v(x_t) = Q^A(s, x̂_0(x_t)) below

m and v are the moments of the learnt policy of noise π^W. π^W itself has no mass outside a box, where p has, so
that it could not be weighed; with the share ε of the prior every estimate keeps its weights, and every search its
target. Q^W asks neither the network nor the reward, in place of a rollout.

Sources: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025). Defensive
mixtures: Weighted Average Importance Sampling and Defensive Mixture Distributions (Hesterberg, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Wrapper, optional
from treesearch.backends.guidance.prompts import PROMPTS
from treesearch.rewards.numeric import is_number, is_positive

MEAN, STD = "noise_mean", "noise_std"  # of conditioning
F64 = torch.float64


class Steers(Protocol):
    """What was learnt about noise; `treesearch.policies.dsrl.DSRL` is one."""

    def observations(self, prompts: Sequence[Any]) -> Tensor:
        """What was observed, (n, O)."""
        ...

    def moments(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, d) of w."""
        ...

    def q_noise(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Q^W (n,) of noise (n, d)."""
        ...

    def q_action(self, observations: Tensor, states: Tensor) -> Tensor:
        """Q^A (n,) of states x_0 (n, *state)."""
        ...


@final
@dataclass(frozen=True, eq=False)
class NoiseProposal(Wrapper):
    """A kernel whose x_T is drawn where the policy of noise would, with exact log p/q.

    Args:
        kernel: whose prior is a standard normal times a number (`chain.schedule.prior_std`), of any η.
        steers: what was learnt.
        share: ε of the prior's own draws, in (0, 1].
        least: smallest standard deviation of w.

    Raises:
        ValueError: a setting out of range, or a kernel without such a prior.
        TypeError: the kernel proposes x_T already.
    """

    steers: Steers
    share: float = 0.1
    least: float = 0.1

    def __post_init__(self) -> None:
        if not (is_number(self.share, 0, 1) and self.share > 0 and is_positive(self.least)):
            raise ValueError(f"share is {self.share!r} and least {self.least!r}, expected 0 < share <= 1 and least > 0")
        if optional(self.kernel, "chain") is None:
            raise ValueError(f"{type(self.kernel).__name__} has no `chain`, whose prior is a multiple of its noise")
        if optional(self.kernel, "prior_log_weight") is not None:
            raise TypeError(f"{type(self.kernel).__name__} proposes x_T already: one proposal a kernel")

    @property
    def proposes_for(self) -> Any:
        """The kernel p that the weights lead back to."""
        return optional(self.kernel, "proposes_for", self.kernel)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the kernel makes of the prompts, and the moments of their noise."""
        encode = optional(self.kernel, "encode")
        mean, std = self.steers.moments(self.steers.observations(prompts))
        own = {MEAN: mean.float(), STD: std.clamp_min(self.least).float()}
        return ((encode(prompts) if encode else None) or {}) | own

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        mean, std = self._moments(cond)
        w = self._drawn(noise.flatten(1).to("cpu", F64), mean, std)
        return self.kernel.prior(w.to(noise).reshape(noise.shape), cond)

    def prior_log_weight(self, x: Tensor, cond: Cond = None) -> Tensor:
        """log p/q of x_T (n, *state), (n,) float64."""
        mean, std = self._moments(cond)
        w = x.flatten(1).to("cpu", F64) / self.kernel.chain.schedule.prior_std
        plain = _log_normal(w, torch.zeros_like(mean), torch.ones_like(std))
        if self.share == 1:
            return torch.zeros_like(plain)
        own = math.log1p(-self.share) + _log_normal(w, mean, std)
        return plain - torch.logaddexp(own, math.log(self.share) + plain)

    def _drawn(self, z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """w ~ q: the first normal says from which part, and what of it is left is as good as new."""
        u = torch.special.ndtr(z[:, 0])
        plain = u < self.share
        left = torch.where(plain, u / self.share, (u - self.share) / max(1 - self.share, EPS)).clamp(EPS, 1 - EPS)
        z = torch.cat([torch.special.ndtri(left)[:, None], z[:, 1:]], 1)
        return torch.where(plain[:, None], z, mean + std * z)

    def _moments(self, cond: Cond) -> tuple[Tensor, Tensor]:
        if cond is None or MEAN not in cond:
            raise ValueError("noise is proposed for what was observed: give prompts, prompts=[...]")
        return cond[MEAN].to("cpu", F64), cond[STD].to("cpu", F64)

    def _settings(self) -> str | None:
        told = optional(self.steers, "fingerprint")
        return None if told is None else f"{told}, {self.share}, {self.least}"


EPS = 2.0**-53


def _log_normal(w: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    z = (w - mean) / std
    return -0.5 * (z.square().sum(1) + w.shape[1] * math.log(2 * math.pi)) - std.log().sum(1)


@final
@dataclass(frozen=True, eq=False)
class NoiseValue:
    """A value for `Valued`: Q^W of the noise at the prior, Q^A of the predicted endpoint below.

    Args:
        steers: what was learnt.
        num_steps: T of the kernel.
        prior_std: by which its noise is multiplied to x_T.
    """

    steers: Steers
    num_steps: int
    prior_std: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, law: Any, cond: Cond) -> Tensor:
        if cond is None or PROMPTS not in cond:
            raise ValueError("noise is worth something for what was observed: give prompts, prompts=[...]")
        seen = self.steers.observations(cond[PROMPTS])
        below = self.steers.q_action(seen, law.endpoint)
        return torch.where(t.cpu() == self.num_steps, self.steers.q_noise(seen, x.flatten(1) / self.prior_std), below)

    @property
    def fingerprint(self) -> str | None:
        """What tells it from others."""
        return optional(self.steers, "fingerprint")
