"""What gradient guides share: the gradient of r(x̂_0(x_t)), and a Gaussian step that it moves.

    g = ∇_{x_t} r(decode(x̂_0(x_t)))                                  or preview, where the kernel has one
    q(x_s | x_t) = N(mean + shift(g), std²),   log p/q = -Σ(zδ + δ²/2),   δ = shift / std

Every method weighs its samples by Σ log p/q, so whatever the shift (its rule, window, limit) the target p(x_0)
exp(λ r(x_0)) stays. What the shift decides is the spread of those weights: KL(q | p) of a step is |δ|²/2, and where
Σ|δ|² is large against the logarithm of the number of samples, a few samples carry all of the weight. Then an
uncorrected guide looks better than a corrected one; `diagnostics["ess"]` tells. A step without noise (std = 0) cannot
move: its q would have no density against p.

Notation: x_t the state, s = t - 1, x̂_0 the endpoint, λ = `lam`, z the noise of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Shared, Spec, Transition, Wrapper, describe, expand, optional
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.numeric import is_number, is_whole
from treesearch.rewards.values import flat

PROMPTS = "guide_prompts"


@dataclass(frozen=True)
class RewardGuided(Wrapper, ABC):
    """A kernel whose steps depend on a differentiable reward, which gets the prompts of the search.

    Args:
        kernel: the base kernel p.
        reward: differentiable, higher is better.

    Raises:
        TypeError: the kernel is guided by a gradient already.
    """

    reward: Reward

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))
        if (inner := optional(self.kernel, "scores")) is not None:
            raise TypeError(
                f"{type(self.kernel).__name__} is guided by {inner.name!r} already: guide once, by the sum of rewards"
            )

    @abstractmethod
    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The guided step; see `unpack` for the prompts."""

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the base kernel makes of the prompts, and the prompts themselves for the reward."""
        encode = optional(self.kernel, "encode")
        return ((encode(prompts) if encode else None) or {}) | {PROMPTS: Shared(list(prompts))}

    @property
    def scores(self) -> Reward:
        """The reward that an evaluation calls."""
        return self.reward

    @property
    def proposes_for(self) -> Any:
        """The kernel p that the weights of the steps lead back to."""
        return self.kernel

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _slope(self, x: Tensor, t: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        """∇_x r(decode(x)) of states x (k, *state) as if they were samples; no network takes part."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            rewards, gradient = self._differentiate(leaf, leaf, prompts)
        return self._checked(gradient, rewards, t)

    def _differentiate(self, states: Tensor, leaf: Tensor, prompts: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
        """r of states (k, *state), and its gradient to the leaf that they come from."""
        samples = states if self.reward.input == "state" else self._draw(states)
        _attached(samples, "the decoder keeps no graph: guide by a reward of states (input='state')")
        rewards = self.reward.attached(samples, prompts)
        gradient = _gradient(rewards, leaf, self.reward.name)
        return rewards.detach().to(leaf.device), gradient

    def _checked(self, gradient: Tensor, rewards: Tensor, t: Tensor) -> Tensor:
        gradient = torch.where(expand(rewards, gradient) > -torch.inf, gradient, 0.0)  # forbidden: no direction
        self._check_finite(gradient, t)
        return gradient

    def _draw(self, endpoint: Tensor) -> Any:
        """What a search would show the reward: a preview, where the kernel has one."""
        preview = optional(self.kernel, "preview")
        return self.kernel.decode(endpoint) if preview is None else preview(endpoint)

    def _check_finite(self, gradient: Tensor, t: Tensor) -> None:
        bad = ~flat(gradient.isfinite()).all(1)
        if bad.any():
            raise ValueError(
                f"the gradient of reward {self.reward.name!r} is NaN or infinite in {int(bad.sum())} of {len(bad)} "
                f"rows, at t = {sorted(set(t[bad].tolist()))}: compute in float32, clip the reward, or guide other "
                "levels, with window=(low, high) where the guide has one"
            )

    def _settings(self) -> str:
        """Name and settings of the reward, and the guide's own."""
        settings = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[2:]]
        return f"{self.reward.name!r} {self.reward.settings}, {', '.join(settings)}"


@dataclass(frozen=True)
class GradientGuided(RewardGuided):
    """A kernel whose Gaussian steps are moved along the gradient of a reward.

    A guided evaluation costs a reward call, a decode (unless the reward reads states) and, through the network, a
    backward pass. The transition carries the rewards of its endpoints: a search for the very same Reward object does
    not compute them again.

    Args:
        kernel: the base kernel p; its steps must be `Gaussian`.
        reward: differentiable, higher is better. Give the search this same object.
        window: (low, high), the levels t that are guided; None for all.
        max_shift: limit of |shift / std| over a state, so that KL(q | p) of a step is at most max_shift²/2. Noise
            itself has norm √d. None for no limit.
        through_network: False takes ∇_{x̂_0} r in place of ∇_{x_t} r, as if ∂x̂_0/∂x_t were the identity: no backward
            pass through the network, and too long a step at high noise, where the endpoint hardly follows x_t.

    Raises:
        TypeError: the kernel is guided by a gradient already.
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    window: tuple[int, int] | None = None
    max_shift: float | None = None
    through_network: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self._spec.num_steps
        if self.window is not None:
            ends = self.window if isinstance(self.window, (tuple, list)) and len(self.window) == 2 else (0, 0)
            if not (all(is_whole(t, 1, steps) for t in ends) and ends[0] <= ends[1]):
                raise ValueError(f"window is {self.window!r}, expected levels 1 <= low <= high <= {steps}")
        if self.max_shift is not None and not (is_number(self.max_shift) and self.max_shift > 0):
            raise ValueError(f"max_shift is {self.max_shift!r}, expected a positive number, or None for no limit")

    @abstractmethod
    def shift(self, std: Tensor, gradient: Tensor, rewards: Tensor) -> Tensor:
        """How far the mean moves (n, *state), from std, which broadcasts, g (n, *state) and r (n,) float64."""

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The base step, moved in the rows that are guided.

        Raises:
            TypeError: no Gaussian step, or something between x_t and the reward that has no gradient.
            ValueError: the gradient is not finite.
        """
        inner, prompts = unpack(cond)
        rows = self._levels.to(t.device)[t].nonzero().flatten()
        if not len(rows):
            return self.kernel.transition(x, t, inner)
        prompts = None if prompts is None else [prompts[i] for i in rows.tolist()]
        law, rewards, gradient = self._evaluate(x, t, inner, rows, prompts)
        mean, known = law.mean.clone(), torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
        mean[rows] += self._move(law.std[rows], gradient, rewards).to(mean.dtype)
        known[rows] = rewards
        base = law.mean if law.base_mean is None else law.base_mean.detach()
        return replace(law, mean=mean, base_mean=base, rewards=known)

    def _evaluate(
        self, x: Tensor, t: Tensor, cond: Cond, rows: Tensor, prompts: Sequence[Any] | None
    ) -> tuple[Gaussian, Tensor, Tensor]:
        """The base step without its graph; r (k,) and its gradient (k, *state) in the given rows."""
        with torch.set_grad_enabled(self.through_network):
            leaf = x.detach().requires_grad_(self.through_network)
            law = self.kernel.transition(leaf, t, cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"gradients guide Gaussian steps, got {type(law).__name__} from the kernel")
        with torch.enable_grad():
            endpoint = law.endpoint[rows]
            if not self.through_network:
                endpoint = leaf = endpoint.detach().requires_grad_()
            _attached(endpoint, "kernel.transition keeps no graph: use through_network=False or another kernel")
            rewards, gradient = self._differentiate(endpoint, leaf, prompts)
        gradient = gradient[rows] if self.through_network else gradient
        gradient = self._checked(gradient, rewards, t[rows])
        law = replace(law, mean=law.mean.detach(), std=law.std.detach(), endpoint=law.endpoint.detach())
        return law, rewards, gradient

    def _move(self, std: Tensor, gradient: Tensor, rewards: Tensor) -> Tensor:
        move = torch.where(std > 0, self.shift(std, gradient, rewards), 0.0)
        if self.limit is None:
            return move
        size = flat(torch.where(std > 0, move.double() / std.double(), 0.0)).norm(dim=1)
        return move * expand((self.limit / size).clamp(max=1.0), move)

    @property
    def limit(self) -> float | None:
        """Limit of |shift / std| over a state."""
        return self.max_shift

    @cached_property
    def _levels(self) -> Tensor:
        """Whether x_t is guided, (T + 1,): a noisy step within the window."""
        low, high = self.window or (1, self._spec.num_steps)
        return torch.tensor([low <= t <= high and noisy for t, noisy in enumerate(self._spec.stochastic)], device="cpu")

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return tuple(self._levels.int().tolist())

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        """Backward passes through the network of an evaluation at each t."""
        return tuple(
            n + self.through_network * guided
            for n, guided in zip(self._spec.backward_per_nfe, self.rewards_per_nfe, strict=True)
        )


def unpack(cond: Cond) -> tuple[Cond, list[Any] | None]:
    """Conditioning of the base kernel, and the prompts of the rows, None where there are none."""
    if cond is None or PROMPTS not in cond:
        return cond, None
    inner = {k: v for k, v in cond.items() if k != PROMPTS}
    return inner, [cond[PROMPTS][i] for i in cond["task"].tolist()]


def clamped(kernel: Any, x: Tensor, cond: Cond) -> Tensor:
    """x with known entries put back, where the kernel knows any."""
    clamp = optional(kernel, "clamp")
    return x if clamp is None or cond is None else clamp(x, cond)


def _attached(value: Any, otherwise: str) -> None:
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise TypeError(f"no gradient reaches x_t: {otherwise}")


def _gradient(rewards: Tensor, leaf: Tensor, name: str) -> Tensor:
    """∂ Σ r / ∂ leaf: rows do not touch each other."""
    found = torch.autograd.grad(rewards.sum(), leaf, allow_unused=True)[0] if rewards.requires_grad else None
    if found is None:
        raise TypeError(
            f"reward {name!r} has no gradient to its samples: guide by a differentiable reward, or steer by this one "
            "without a guide"
        )
    return found
