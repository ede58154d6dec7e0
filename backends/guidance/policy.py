"""Policy-guided diffusion: trajectories of a behaviour model moved towards the actions of another policy, as published.

    k = T - t = 0..T-1 steps taken,   λ_k = coefficient · ((1 - k/T) + cosine · sin(π (k + 1)/T)),   λ_{T-1} = 0
    y = x_t / α_t                                              the noisy trajectory, in the coordinates of the data
    g = ∇_a Σ_h log π(a_h | s_h)   at y ("noised") or x̂_0(x_t) ("denoised"), observations held fixed
    x_t <- x_t + α_t λ_k g / |g|   in the action channels, then the step of the base kernel

Its chain is a law of its own (`departs`): steps carry no log p/q, and what comes out is not p(τ) Π_h π(a_h | s_h)^λ.

That law is the target of `TDS(kernel, reward, lam=λ)` with reward = Σ_h log π(a_h | s_h), which is
`trajectories.policy.PolicyLikelihood`: the gradient goes through x̂_0(x_t) to observations and actions, the shift is
std² λ ∇, and steps carry log p/q. Any method of the same reward and λ (Feynman-Kac, tree sampling) then samples it.

Source: Policy-Guided Diffusion (Jackson et al., 2024), section 3, and its released code for λ_k, cosine = .3, the norm
over a whole trajectory and the unit Gaussian about a deterministic action. Deviations: the step is the base kernel's
and not Heun's with churn; 1e-8, there added after the division by |g|, is left out; actions have no tanh but the
policy's own.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Literal, final, get_args

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Transition, expand, optional
from treesearch.backends.guidance.base import RewardGuided, clamped, loose
from treesearch.backends.guidance.prompts import unpack
from treesearch.rewards.numeric import is_number
from treesearch.rewards.values import flat

At = Literal["noised", "denoised"]


@final
@dataclass(frozen=True)
class PolicyGuided(RewardGuided):
    """The published sampler.

    An evaluation costs a reward call; "denoised" calls the network twice, which counts as one NFE of two rows.

    Args:
        kernel: of trajectories: it has `channels`, and `chain.alpha` with α_t (`backends.chains.diffusion.Chain`).
        reward: Σ_h log π(a_h | s_h), differentiable in the actions.
        coefficient: >= 0; 0 is the base kernel.
        cosine: weight of the sine in λ_k, >= 0.
        normalise: divide g by its norm over the trajectory.
        at: where the policy is asked.

    Raises:
        TypeError: the kernel is guided already, or lacks `channels` or `chain.alpha`.
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    coefficient: float = 1.0
    cosine: float = 0.3
    normalise: bool = True
    at: At = "noised"

    undrafted = "moves without weights, of which a leap would know one"
    departs = "policy guidance as published: its steps move x_t without weights, towards no known law"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coefficient", "cosine"):
            value = getattr(self, name)
            if not (is_number(value, 0) and value < math.inf):
                raise ValueError(f"{name} is {value!r}, expected a finite number >= 0")
        if self.at not in get_args(At):
            raise ValueError(f"unknown at {self.at!r}: choose noised or denoised")
        if optional(self.kernel, "channels") is None:
            raise TypeError(f"{type(self.kernel).__name__} has no `channels`: expected a kernel of trajectories")
        if not isinstance(getattr(optional(self.kernel, "chain"), "alpha", None), Tensor):
            raise TypeError(f"{type(self.kernel).__name__} has no `chain.alpha`: expected α_t of x_t = α_t x_0 + σ_t ε")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The base step from the moved x_t.

        Raises:
            TypeError: no gradient reaches the actions.
            ValueError: the gradient is not finite.
        """
        inner, prompts = unpack(cond)
        lam = self.schedule.to(x)[t]
        rows = lam.nonzero().flatten()
        if not len(rows):
            return self.kernel.transition(x, t, inner)
        alpha = self.kernel.chain.at("alpha", t, x)
        if self.at == "noised":
            y = clamped(self.kernel, x / alpha, inner)
        else:
            y = self.kernel.transition(x, t, inner).endpoint
        g = self._action_slope(y[rows], t[rows], None if prompts is None else [prompts[i] for i in rows.tolist()])
        move = torch.zeros_like(x)
        move[rows] = alpha[rows] * expand(lam[rows], x) * g
        return self.kernel.transition(x + loose(self.kernel, move, inner), t, inner)

    def _action_slope(self, y: Tensor, t: Tensor, prompts: list | None) -> Tensor:
        """g of trajectories (k, H, C), zero outside the action channels."""
        slope = self._slope(y, t, prompts)
        g = torch.zeros_like(slope)
        self.kernel.channels.actions(g).copy_(self.kernel.channels.actions(slope))
        if not self.normalise:
            return g
        norm = expand(flat(g).norm(dim=1), g)
        return torch.where(norm > 0, g / norm, 0.0)

    @cached_property
    def schedule(self) -> Tensor:
        """λ of the step from t, (T + 1,) float64; 0 at t = 1, and at t = 0, which is no step."""
        steps = self._spec.num_steps
        k = steps - torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        lam = self.coefficient * ((1 - k / steps) + self.cosine * torch.sin(math.pi * (k + 1) / steps))
        lam[:2] = 0
        return lam

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return tuple(int(lam != 0) for lam in self.schedule.tolist())

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Network rows of an evaluation at each t."""
        twice = self.at == "denoised"
        return tuple(
            n * (1 + (twice and g > 0)) for n, g in zip(self._spec.rows_per_nfe, self.rewards_per_nfe, strict=True)
        )
