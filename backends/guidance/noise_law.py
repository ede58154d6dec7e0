"""x_T as a learnt policy of noise draws it: a law of its own, to search where the policy is already good.

    w ~ π^W(w | s),  x_T = prior(w)

`NoiseProposal` keeps the law of the kernel, and its weights pull every estimate back to it. Who wants the best chunk
and no draws of p takes this one: trees, particles and best-of-N begin where the policy of noise would, without weights.
With η = 1 a chain of few steps forgets x_T, and there is nothing to gain; with η = 0 there is nothing to branch.

Source: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor

from treesearch.backends.base import Cond, Wrapper, optional

SEEN = "noise_seen"  # of conditioning


class Draws(Protocol):
    """A policy of noise; `treesearch.policies.dsrl.DSRL` is one."""

    def observations(self, prompts: Sequence[Any]) -> Tensor:
        """What was observed, (n, O)."""
        ...

    def noise(self, observations: Tensor, z: Tensor | None = None) -> Tensor:
        """w (n, d) for observations (n, O) and standard normals z (n, d)."""
        ...


@final
@dataclass(frozen=True, eq=False)
class NoiseLaw(Wrapper):
    """A kernel whose x_T a learnt policy of noise draws.

    Args:
        kernel: of any η.
        steers: what was learnt.

    Raises:
        TypeError: the kernel proposes x_T already.
        ValueError: when drawn, no prompts.
    """

    steers: Draws

    departs = "x_T is drawn by a learnt policy of noise: these are no draws of p, nor is there a Z of p"

    def __post_init__(self) -> None:
        if optional(self.kernel, "prior_log_weight") is not None:
            raise TypeError(f"{type(self.kernel).__name__} proposes x_T already: one law of it a kernel")

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the kernel makes of the prompts, and what the policy of noise observes."""
        encode = optional(self.kernel, "encode")
        own = {SEEN: self.steers.observations(prompts).float()}
        return ((encode(prompts) if encode else None) or {}) | own

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        if cond is None or SEEN not in cond:
            raise ValueError("noise is drawn for what was observed: give prompts, prompts=[...]")
        w = self.steers.noise(cond[SEEN], noise.flatten(1))
        return self.kernel.prior(w.to(noise).reshape(noise.shape), cond)

    def _settings(self) -> str | None:
        return optional(self.steers, "fingerprint")
