"""States that know a label: one of a table, in one more row of the state, drawn anew at some levels.

    state      (x_t, w), w in the last row of the state
    t ∈ levels and the prior:   w ~ uniform over the table, from one noise entry;   else w stays

What a label does to a step is the subclass's: `GuidanceScales`, `interventions.Actions`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Spec, Transition, Wrapper, bare, describe, expand, uniform
from treesearch.rewards.numeric import is_whole


@dataclass(frozen=True)
class LabelledStep:
    """The law of (x_s, w).

    Args:
        law: of x_s, at the label of the state.
        label: w of the state (n,).
        fresh: whether w is drawn anew (n,).
        table: to draw from (S,).
    """

    law: Any
    label: Tensor
    fresh: Tensor
    table: Tensor

    @property
    def endpoint(self) -> Tensor:
        return pack(self.law.endpoint, self.label)

    @property
    def rewards(self) -> Tensor | None:
        """r of the endpoints, where a guide computed it."""
        return getattr(self.law, "rewards", None)

    def sample(self, noise: Tensor) -> Tensor:
        w = torch.where(self.fresh, draw(self.table, noise), self.label)
        return pack(self._at(w).sample(noise[:, :-1]), w)

    def log_prob(self, x: Tensor) -> Tensor:
        rest, w = unpack(x)
        there = torch.where(self.fresh, (w[:, None] == self.table).any(1), w == self.label)
        log_w = -math.log(len(self.table)) * self.fresh.double()
        return self._at(w).log_prob(rest) + log_w.masked_fill(~there, -math.inf)

    def log_weight(self, x: Tensor) -> Tensor:
        rest, w = unpack(x)
        return self._at(w).log_weight(rest)

    def take(self, rows: Tensor) -> Self:
        return replace(self, law=self.law.take(rows), label=self.label[rows], fresh=self.fresh[rows])

    def _at(self, w: Tensor) -> Transition:
        """The law of x_s where w (n,) is drawn in this very step."""
        return self.law


@dataclass(frozen=True)
class Labelled(Wrapper, ABC):
    """A kernel whose states carry a label; subclasses have a field `levels`, at which it is drawn."""

    undrafted: ClassVar[str] = "steps draw labels, which a leap would pass"

    @property
    @abstractmethod
    def table(self) -> tuple[float, ...]:
        """What labels there are, each once."""

    @property
    def state_shape(self) -> tuple[int, ...]:
        return _taller(self._spec.state_shape)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return _taller(self._spec.noise_shape)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the base kernel, and where a label is drawn."""
        draws = len(self.table) > 1
        return tuple(s or (draws and (t == 0 or bool(self._draws[t]))) for t, s in enumerate(self._spec.stochastic))

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        x = self.kernel.prior(noise[:, :-1], cond)
        return pack(x, draw(self._values(x), noise))

    def decode(self, x0: Tensor) -> Any:
        """Samples without their labels."""
        return self.kernel.decode(x0[:, :-1])

    def labels(self, x: Tensor) -> Tensor:
        """Labels (n,) of states (n, ...)."""
        return unpack(x)[1]

    def bare(self, x: Tensor) -> Tensor:
        """What rewards of states see."""
        return bare(self.kernel, x[:, :-1])

    def _passed(self, name: str, value: Any) -> Any:
        return self._lifted(name, value) if name in LIFTED and value is not None else value

    def _lifted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """An optional method of the kernel, for states with labels."""

        def renoise(x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
            return pack(method(x[:, :-1], t_from, t_to, noise[:, :-1]), draw(self._values(x), noise))

        def labelled(x: Tensor) -> Tensor:
            return pack(x, self._values(x)[:1].expand(len(x)))

        def encode_samples(samples: Any) -> Tensor:
            return labelled(method(samples))

        def state_of(image: Any) -> Tensor:
            return labelled(method(image)[None])[0]

        def held(x: Tensor, cond: Cond) -> Tensor:
            at = method(x[:, :-1], cond).expand(x[:, :-1].shape)
            return torch.cat([at, torch.zeros_like(x[:, -1:], dtype=torch.bool)], 1)

        def stripped(x: Tensor, *rest: Any) -> Any:
            return method(x[:, :-1], *rest)

        def clamp(x: Tensor, cond: Cond) -> Tensor:
            return torch.cat([method(x[:, :-1], cond), x[:, -1:]], 1)

        lifted = {f.__name__: f for f in (renoise, encode_samples, state_of, clamp, held)}
        return lifted.get(name, stripped)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    @cached_property
    def _draws(self) -> Tensor:
        """Whether a label is drawn in the step from t, (T + 1,)."""
        levels: tuple[int, ...] = self.levels  # type: ignore[attr-defined]
        return torch.tensor([t in levels for t in range(self._spec.num_steps + 1)], device="cpu")

    def _fresh(self, t: Tensor) -> Tensor:
        return self._draws.to(t.device)[t]

    def _values(self, like: Tensor) -> Tensor:
        return torch.tensor(self.table, dtype=like.dtype, device=like.device)

    def _check_levels(self) -> None:
        levels: Any = self.levels  # type: ignore[attr-defined]
        if not isinstance(levels, (tuple, list)):
            raise TypeError(f"levels are {levels!r}, expected several in a tuple, such as (15, 5)")
        if bad := [t for t in levels if not is_whole(t, 1, self._spec.num_steps)]:
            raise ValueError(f"levels {bad} are outside 1..T = {self._spec.num_steps}, or no whole numbers")
        object.__setattr__(self, "levels", tuple(levels))


LIFTED = ("renoise", "encode_samples", "state_of", "clamp", "held", "preview", "prior_log_weight", "offset")


def pack(x: Tensor, w: Tensor) -> Tensor:
    """(n, L, ...) and w (n,) -> (n, L + 1, ...), w all along the last row."""
    row = expand(w.to(x.dtype), x).expand(len(x), 1, *x.shape[2:])
    return torch.cat([x, row], 1)


def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    """The state without its last row, and w (n,)."""
    return x[:, :-1], x[:, -1].reshape(len(x), -1)[:, 0]


def draw(table: Tensor, noise: Tensor) -> Tensor:
    """One of a table for each row, from the first entry of the noise's last row."""
    u = uniform(noise[:, -1].reshape(len(noise), -1)[:, 0])
    return table[(u * len(table)).long().clamp_max(len(table) - 1).to(table.device)]


def _taller(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0] + 1, *shape[1:])
