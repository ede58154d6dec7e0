"""Guidance scales as actions: the strength of a guide is drawn anew at some levels, so that a tree search chooses it.

    state      (x_t, w), w in the last row of the state
    t ∈ levels and the prior:   w ~ uniform over `scales`, from one noise entry;   else w stays
    q(x_s | x_t, w) = N(mean_p + w (mean_q - mean_p), std²)              mean_q that of the guided kernel

With `levels` those at which a search branches, siblings differ in the scale of the segment that leads to them, and UCT
over them (`MCTS`, or `DiffusionTreeSearch` with soft values) is a search over guidance schedules. 0 among the scales is
the base kernel. Steps carry log p/q at their own w, which p draws uniformly too: methods that weigh keep the target.

Source: Monte Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), section 3, guidance levels as
meta-actions. There a node has one child a scale and subplans are denoised one after the other; here scales are drawn,
so that a child's may repeat, and whole plans are denoised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Guided, Spec, Wrapper, describe, expand, optional, uniform
from treesearch.rewards.numeric import is_number


@dataclass(frozen=True)
class ScaledStep:
    """The law of (x_s, w).

    Args:
        law: of the guided kernel, with the mean of p where it is guided.
        scale: w of the state (n,).
        fresh: whether w is drawn anew (n,).
        scales: to draw from (S,).
    """

    law: Gaussian
    scale: Tensor
    fresh: Tensor
    scales: Tensor

    @property
    def endpoint(self) -> Tensor:
        return pack(self.law.endpoint, self.scale)

    @property
    def rewards(self) -> Tensor | None:
        """r of the endpoints, where the guide computed it."""
        return self.law.rewards

    def sample(self, noise: Tensor) -> Tensor:
        w = torch.where(self.fresh, draw(self.scales, noise), self.scale)
        return pack(self._at(w).sample(noise[:, :-1]), w)

    def log_prob(self, x: Tensor) -> Tensor:
        rest, w = unpack(x)
        drawn = torch.where((w[:, None] == self.scales).any(1), -math.log(len(self.scales)), -math.inf)
        kept = torch.where(w == self.scale, 0.0, -math.inf)
        return self._at(w).log_prob(rest) + torch.where(self.fresh, drawn, kept)

    def log_weight(self, x: Tensor) -> Tensor:
        rest, w = unpack(x)
        return self._at(w).log_weight(rest)

    def take(self, rows: Tensor) -> ScaledStep:
        return ScaledStep(self.law.take(rows), self.scale[rows], self.fresh[rows], self.scales)

    def _at(self, w: Tensor) -> Gaussian:
        """The law of x_s at scales w (n,)."""
        if self.law.base_mean is None:
            return self.law
        base = self.law.base_mean
        return replace(self.law, mean=base + expand(w, base) * (self.law.mean - base))


@final
@dataclass(frozen=True)
class GuidanceScales(Wrapper):
    """A guided kernel whose states know their guidance scale.

    Args:
        kernel: guided, and its steps carry log p/q: `TDS`, `DAS`, `DPS`, `Diffuser(at="mean")` or `Guided`.
        scales: factors of its shift, distinct, finite and >= 0.
        levels: t at which a new scale is drawn, as a rule `branch_at` of the search.

    Raises:
        TypeError: a kernel without a guide.
        ValueError: scales or levels out of range.
    """

    scales: tuple[float, ...]
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if optional(self.kernel, "scores") is None and not isinstance(self.kernel, Guided):
            raise TypeError(f"{type(self.kernel).__name__} has no guide to scale: wrap TDS(kernel, reward) or the like")
        if not isinstance(self.scales, tuple) or not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales are {self.scales}, expected one or more, each once")
        if not all(is_number(w, 0) and w < math.inf for w in self.scales):
            raise ValueError(f"scales are {self.scales}, expected finite numbers >= 0")
        if bad := [t for t in self.levels if not 1 <= t <= self._spec.num_steps]:
            raise ValueError(f"levels {bad} are outside 1..T = {self._spec.num_steps}")

    @property
    def state_shape(self) -> tuple[int, ...]:
        return _taller(self._spec.state_shape)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return _taller(self._spec.noise_shape)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the base kernel, and where a scale is drawn."""
        draws = len(self.scales) > 1
        return tuple(s or (draws and (t == 0 or t in self.levels)) for t, s in enumerate(self._spec.stochastic))

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        x = self.kernel.prior(noise[:, :-1], cond)
        return pack(x, draw(self._table(x), noise))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> ScaledStep:
        """The law of (x_s, w).

        Raises:
            TypeError: the guide's steps do not carry log p/q.
        """
        rest, w = unpack(x)
        law = self.kernel.transition(rest, t, cond)
        guided = any(self._spec.rewards_per_nfe[level] for level in t.tolist())
        if not isinstance(law, Gaussian) or (guided and law.base_mean is None):
            raise TypeError(
                f"{type(self.kernel).__name__} moves its steps without log p/q: there is no shift to scale; guide by "
                'TDS, DAS, DPS or Diffuser(at="mean")'
            )
        return ScaledStep(law, w, self._draws.to(t.device)[t], self._table(x))

    def decode(self, x0: Tensor) -> Any:
        """Samples without their scales."""
        return self.kernel.decode(x0[:, :-1])

    def _passed(self, name: str, value: Any) -> Any:
        return self._lifted(name, value) if name in LIFTED and value is not None else value

    def _lifted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """An optional method of the kernel, for states with scales."""

        def renoise(x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
            return pack(method(x[:, :-1], t_from, t_to, noise[:, :-1]), draw(self._table(x), noise))

        def encode_samples(samples: Any) -> Tensor:
            x = method(samples)
            return pack(x, self._table(x)[:1].expand(len(x)))

        def held(x: Tensor, cond: Cond) -> Tensor:
            at = method(x[:, :-1], cond).expand(x[:, :-1].shape)
            return torch.cat([at, torch.zeros_like(x[:, -1:], dtype=torch.bool)], 1)

        def stripped(x: Tensor, *rest: Any) -> Any:
            return method(x[:, :-1], *rest)

        def clamp(x: Tensor, cond: Cond) -> Tensor:
            return torch.cat([method(x[:, :-1], cond), x[:, -1:]], 1)

        return {"renoise": renoise, "encode_samples": encode_samples, "clamp": clamp, "held": held}.get(name, stripped)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    @cached_property
    def _draws(self) -> Tensor:
        """Whether a scale is drawn in the step from t, (T + 1,)."""
        return torch.tensor([t in self.levels for t in range(self._spec.num_steps + 1)], device="cpu")

    def _table(self, like: Tensor) -> Tensor:
        return torch.tensor(self.scales, dtype=like.dtype, device=like.device)


LIFTED = ("renoise", "encode_samples", "clamp", "held", "preview", "prior_log_weight")


def pack(x: Tensor, w: Tensor) -> Tensor:
    """(n, L, ...) and w (n,) -> (n, L + 1, ...), w all along the last row."""
    row = expand(w.to(x.dtype), x).expand(len(x), 1, *x.shape[2:])
    return torch.cat([x, row], 1)


def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    """The state without its last row, and w (n,)."""
    return x[:, :-1], x[:, -1].reshape(len(x), -1)[:, 0]


def draw(scales: Tensor, noise: Tensor) -> Tensor:
    """One of the scales for each row, from the first entry of the noise's last row."""
    u = uniform(noise[:, -1].reshape(len(noise), -1)[:, 0])
    return scales[(u * len(scales)).long().clamp_max(len(scales) - 1).to(scales.device)]


def _taller(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0] + 1, *shape[1:])
