"""What guides by a reward share: its prompts, its gradient at states, and what they say of themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Spec, Transition, Wrapper, bare, describe, expand, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance.prompts import encoded
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.values import flat


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
        return encoded(self.kernel, prompts)

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

    @cached_property
    def _still(self) -> bool:
        """Whether steps below the prior have no noise; that of entries which are held does not count."""
        chain = optional(self.kernel, "chain")
        return not any(self._spec.stochastic[1:]) or (isinstance(chain, Chain) and not chain.stochastic[1:].any())

    def _slope(self, x: Tensor, t: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        """∇_x r(decode(x)) of states x (k, *state) as if they were samples; no network takes part."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            rewards, gradient = self._differentiate(leaf, leaf, prompts)
        return self._checked(gradient, rewards, t)

    def _differentiate(self, states: Tensor, leaf: Tensor, prompts: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
        """r of states (k, *state), and its gradient to the leaf that they come from."""
        samples = bare(self.kernel, states) if self.reward.input == "state" else self._draw(states)
        attached(samples, "the decoder keeps no graph: guide by a reward of states (input='state')")
        rewards = self.reward.attached(samples, prompts)
        gradient = gradient_of(rewards, leaf, self._objective)
        return rewards.detach().to(leaf.device), gradient

    def _climbed(
        self, endpoint: Tensor, t: Tensor, prompts: Sequence[Any] | None, steps: int, length: float
    ) -> tuple[Tensor, Tensor]:
        """How far endpoints (k, *state) go in some steps along ∇r, and their r (k,) before."""
        at, before = endpoint.detach(), []
        for _ in range(steps):
            with torch.enable_grad():
                leaf = at.detach().requires_grad_()
                rewards, gradient = self._differentiate(leaf, leaf, prompts)
            before.append(rewards)
            at = at + length * self._checked(gradient, rewards, t)
        return at - endpoint, before[0]

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
                f"the gradient of {self._objective} is NaN or infinite in {int(bad.sum())} of {len(bad)} "
                f"rows, at t = {sorted(set(t[bad].tolist()))}: compute in float32, clip the reward, or guide other "
                "levels, with window=(low, high) where the guide has one"
            )

    @property
    def _objective(self) -> str:
        """What errors call that which the gradient is of."""
        return f"reward {self.reward.name!r}"

    def _settings(self) -> str | None:
        """Name and settings of the reward, and the guide's own."""
        settings = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[2:] if f.name != "value"]
        return f"{self.reward.name!r} {self.reward.settings}, {', '.join(settings)}"


def clamped(kernel: Any, x: Tensor, cond: Cond) -> Tensor:
    """x with known entries put back, where the kernel knows any."""
    clamp = optional(kernel, "clamp")
    return x if clamp is None or cond is None else clamp(x, cond)


def held_by(kernel: Any, x: Tensor, cond: Cond) -> Tensor | None:
    """Entries of states (n, *state) that the kernel holds, bool of their shape; None where it holds none."""
    held = optional(kernel, "held")
    return None if held is None else held(x, cond).expand(x.shape)


def loose(kernel: Any, move: Tensor, cond: Cond) -> Tensor:
    """A move of states (n, *state), 0 for entries that the kernel holds, where it holds any."""
    held = held_by(kernel, move, cond)
    return move if held is None else torch.where(held, 0.0, move)


def attached(value: Any, otherwise: str) -> None:
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise TypeError(f"no gradient reaches x_t: {otherwise}")


def gradient_of(rewards: Tensor, leaf: Tensor, name: str) -> Tensor:
    """∂ Σ r / ∂ leaf: rows do not touch each other."""
    found = torch.autograd.grad(rewards.sum(), leaf, allow_unused=True)[0] if rewards.requires_grad else None
    if found is None:
        raise TypeError(
            f"{name} has no gradient to its samples: guide by a differentiable reward, learn a value of it "
            "(backends.guidance.transfer), or steer by it without a guide"
        )
    return found
