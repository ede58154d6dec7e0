"""What is known of a frozen policy's noise, in a search: where x_T should be drawn.

    w ~ q(w | s) = (1 - ε) N(m(s), diag v(s)²) + ε N(0, I),  x_T = prior(w)
    log p/q = log N(w; 0, I) - log q(w | s),  at most log 1/ε

m and v are the moments of the learnt policy of noise π^W. π^W itself has no mass outside a box, where p has, so
that it could not be weighed; with the share ε of the prior every estimate keeps its weights, and every search its
target.

Q^W is no value of states in a search: it is what x_T is worth where no step has noise, and there no tree branches.

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

from treesearch.backends.base import Cond, Wrapper, describe, optional
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


@final
@dataclass(frozen=True, eq=False)
class NoiseProposal(Wrapper):
    """A kernel whose x_T is drawn where the policy of noise would, with exact log p/q.

    Args:
        kernel: whose prior is a standard normal times a number (`chain.schedule.prior_std`), of any η; one that
            begins at a picture, at given noise or with known entries has another.
        steers: what was learnt.
        share: ε of the prior's own draws, in (0, 1].
        least: smallest standard deviation of w.

    Raises:
        ValueError: a setting out of range, or a kernel without such a prior; when drawn, conditioning that changes it.
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
        shape = describe(self.kernel, identify=False).noise_shape
        self._prior(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), None)

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
        return self._prior(w.to(noise).reshape(noise.shape), cond)

    def _prior(self, w: Tensor, cond: Cond) -> Tensor:
        """x_T of noise w (n, *noise_shape), as the weights take it: w times a number, to the precision of states."""
        x = self.kernel.prior(w, cond)
        plain = (self.kernel.chain.schedule.prior_std * w).to("cpu", F64)
        if x.shape != w.shape or not torch.allclose(x.to("cpu", F64), plain, rtol=0.01, atol=1e-6):
            raise ValueError(
                f"the prior of {type(self.kernel).__name__} is no multiple of its noise, so that a proposal of x_T has "
                "no weights: take the kernel as it was before from_image, from_noise or known entries"
            )
        return x

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
