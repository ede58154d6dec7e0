"""What a state is worth by several draws of x_0 from the network's own prediction, in place of one endpoint.

    v(x_t) = 1/n Σ_j r(x_0^j)                         x_0^j ~ p(x_0 | x_t), each token apart, j = 1..n
    v(x_t) = 1/λ log 1/n Σ_j exp(λ r(x_0^j))          with lam

The most probable tokens of a half-masked text are no text that a language model would rate. The draws use numbers that
are the same for all states of a level: v is a function of the state, so that potentials telescope and every estimator
keeps its weights. Each evaluation costs n calls of the reward.

Source: A General Framework for Inference-time Scaling and Steering of Diffusion Models (Singhal et al., 2025), section
4.2, four draws; its code takes the second form with λ = 1 for λ r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Spec, Transition, Wrapper, describe, optional
from treesearch.backends.base.tokens import level_normals
from treesearch.backends.guidance.prompts import encoded, unpack
from treesearch.backends.guidance.valued import Scored
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.numeric import is_positive, is_whole


@final
@dataclass(frozen=True)
class Drawn(Wrapper):
    """A kernel of tokens whose held states are scored by draws of x_0; its law is untouched.

    Args:
        kernel: of tokens, with a law that draws endpoints (`Tokens`).
        reward: the search must be for it.
        draws: n.
        levels: the only ones whose states are worth something, those that the search holds; None is all of them.
        lam: λ of the second form; None is the mean.

    Raises:
        TypeError: the kernel declares values already.
        ValueError: a setting out of range.
    """

    reward: Reward
    draws: int = 4
    lam: float | None = None
    levels: tuple[int, ...] | None = None

    valued = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))
        if not is_whole(self.draws):
            raise ValueError(f"draws is {self.draws!r}, expected at least 1")
        if self.lam is not None and not is_positive(self.lam):
            raise ValueError(f"lam is {self.lam!r}, expected a positive number, or None for the mean")
        if optional(self.kernel, "valued", False):
            raise TypeError(f"{type(self.kernel).__name__} declares values already: one value a kernel")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The kernel's own step, with v of the states that it leaves.

        Raises:
            TypeError: a law that draws no endpoints.
        """
        inner, prompts = unpack(cond)
        law = self.kernel.transition(x, t, inner)
        if not hasattr(law, "endpoints"):
            raise TypeError(f"{type(law).__name__} draws no endpoints: drawn() is for kernels of tokens")
        held = [i for i, level in enumerate(t.tolist()) if self.levels is None or level in self.levels]
        values = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
        if held:
            rows = torch.tensor(held, device=x.device)
            values[rows] = self._value(law.take(rows), t[rows], None if prompts is None else [prompts[i] for i in held])
        return Scored(law, values)

    def _value(self, law: Any, t: Tensor, prompts: Sequence[Any] | None) -> Tensor:
        """v (n,) float64."""
        found = torch.stack([self._scored(law, t, j, prompts) for j in range(self.draws)])
        if self.lam is None:
            return found.mean(0)
        return ((self.lam * found).logsumexp(0) - math.log(self.draws)) / self.lam

    def _scored(self, law: Any, t: Tensor, draw: int, prompts: Sequence[Any] | None) -> Tensor:
        """r of one draw for each row, (n,) float64."""
        x0 = law.endpoints(level_normals(t, self._spec.noise_shape, draw))
        samples = x0 if self.reward.input == "state" else self.kernel.decode(x0)
        return self.reward(samples, prompts).to(x0.device)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the kernel makes of the prompts, and the prompts themselves for the reward."""
        return encoded(self.kernel, prompts)

    @property
    def scores(self) -> Reward:
        """The reward that the values are of."""
        return self.reward

    @property
    def proposes_for(self) -> Any:
        """The kernel p that the weights of the steps lead back to."""
        return optional(self.kernel, "proposes_for", self.kernel)

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """n in every evaluation at its levels."""
        levels = range(1, self._spec.num_steps + 1)
        own = [self.draws * (self.levels is None or level in self.levels) for level in levels]
        return (0, *(a + b for a, b in zip(self._spec.rewards_per_nfe[1:], own, strict=True)))

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _settings(self) -> str:
        return f"{self.reward.name!r} {self.reward.settings}, draws={self.draws}, lam={self.lam}, levels={self.levels}"
