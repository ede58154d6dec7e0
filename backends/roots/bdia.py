"""BDIA: a solver whose steps can be undone, so that a picture has an exact path and a leaf has its ancestors.

    D(x_t → u) = α_u x̂_0(x_t) + σ_u ε̂(x_t)                            DDIM's map, from one evaluation at x_t
    x_s     = D(x_t → s) + γ (x_{t+1} - D(x_t → t+1))                  the step, s = t - 1; first D alone
    x_{t+1} = (x_s - D(x_t → s))/γ + D(x_t → t+1)                      its inverse, by the same evaluation at x_t

A state is a pair, x_t and what it remembers of x_{t+1}; at T that is (x_s - D)/γ, 0 for a chain that begins there. A
picture's pair is (x_0, x_1), x_1 by one step of DDIM inversion: what that misses is no error of the round trip.

The inverse is exact in algebra. In numbers rounding grows by 1/γ a step, and at γ < 1 drowns the state over many:
`undo` and `inverted` warn where they would. Sampling is stable at any γ. `double=True` keeps pairs in float64 around a
network of its own precision: what it sees of x_t is rounded alike both ways, but for an entry in a hundred million that
lies where roundings part. A network that is no function of its row, as of other rows in the batch, undoes another step.

With noise the step has the kernel's mean in place of D(x_t → s), and

    x_{t+1} + κ s̃_{t+1} z_{t+1},   α_{t+1} x̂_0 + κ σ_t ε̂     κ = σ_{t+1}/√(σ_t² - s̃_{t+1}²)

in place of x_{t+1} and D(x_t → t+1): noise kicks both members of a pair, as far as x̂_0 stays, for else they would not
be neighbours on one path. `undo` is exact given the noise, which a search draws from keys: no ancestor of a leaf has to
be kept. The kicks are ours; the paper has no noise.

Source: Exact Diffusion Inversion via Bidirectional Integration Approximation (Zhang et al., 2024), eqs. 17-20.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, describe, expand, optional
from treesearch.backends.chains.inversion import above, predicted
from treesearch.backends.chains.packed import Packed
from treesearch.rewards.numeric import is_number, is_whole


class Tables(NamedTuple):
    """By level, (T + 1,) or (T + 1, *state)."""

    gamma: Tensor  # γ; 0 where the step before had no noise but fresh
    alpha: Tensor  # α_{t+1}, 0 at T
    sigma: Tensor  # κ σ_t, 0 at T
    kick: Tensor  # κ of the step from t, 0 where that has no noise
    kicked: Tensor  # κ of the step that led to x_t, as `kick`, 0 at T


@final
@dataclass(frozen=True, eq=False)
class Bdia(Packed):
    """A kernel whose steps can be undone: states (2, *state), x_t and x_{t+1} - κ (mean of the step that led to x_t).

    Args:
        kernel: on a `Chain` around 0.
        gamma: γ in (0, 1].
        double: pairs in float64, whatever the network's precision.

    Raises:
        TypeError: a kernel without such a chain.
        ValueError: γ out of range, or steps that renoise in full, after which nothing of x_t is left.
    """

    gamma: float = 1.0
    double: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if optional(self.kernel, "offset") is not None:
            raise TypeError(f"{type(self.kernel).__name__} has a chain around an offset: BDIA's maps are around 0")
        if not is_number(self.gamma, 0, 1) or not self.gamma:
            raise ValueError(f"gamma is {self.gamma!r}, expected 0..1 and above 0: 1 is undone best")
        if self.kernel.chain.step == "renoise":
            raise ValueError("steps that renoise in full leave nothing of x_t to undo: use step='ddim'")

    @property
    def memory(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else self._spec.dtype

    def bare(self, x: Tensor) -> Tensor:
        return super().bare(x).to(self._spec.dtype)

    def decode(self, x0: Tensor) -> Any:
        return super().decode(x0.to(self._spec.dtype))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        now, kept = x.unbind(1)
        (law, back), at = self._evaluated(now, t, cond), self._rows(t, now)
        push = at.gamma * (kept + at.kicked * now - back)
        known = expand((kept != 0).flatten(1).any(1), kept)
        mean = torch.where(known, law.mean + push, law.mean)
        return self._law(law, mean, now - at.kick * mean)

    def before(self, x: Tensor, t: Tensor, cond: Cond = None, noise: Tensor | None = None) -> Tensor:
        """Pairs at levels t (n,) whose steps, with their noise (n, *state), led to pairs x at t - 1.

        Raises:
            ValueError: a step that drew noise, and none is given; or one before which nothing is left to undo.
        """
        (now, kept), std = x.unbind(1), self.kernel.chain.at("std", t, x[:, 0])
        if noise is None and (std > 0).any():
            raise ValueError(
                f"steps from levels {sorted(set(t.tolist()))} drew noise: give it, noise={{t: (n, *state)}}"
            )
        mean, at = now if noise is None else now - std * noise.to(now), self._rows(t, now)
        if (at.gamma == 0).any():
            raise ValueError(
                f"nothing is left of what was before levels {sorted(set(t.tolist()))}: all noise was fresh"
            )
        x_t = kept + at.kick * mean
        law, back = self._evaluated(x_t, t, cond)
        above_t = (mean - law.mean) / at.gamma + back
        return torch.stack([x_t, above_t - at.kicked * x_t], 1)

    def _evaluated(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Gaussian, Tensor]:
        """The kernel's step from x, and where the step that led to x came from, in the precision of pairs.

        Both are functions of what the network sees of x: rounding then drops out of the recursion, instead of growing.
        """
        seen = x.to(self._spec.dtype)
        law, at = self._step(seen, t, cond), self._rows(t, seen)
        endpoint, eps = predicted(self.kernel.chain, law, seen, t)
        base = None if law.base_mean is None else law.base_mean.to(x)
        law = replace(law, mean=law.mean.to(x), std=law.std.to(x), endpoint=law.endpoint.to(x), base_mean=base)
        return law, (at.alpha * endpoint + at.sigma * eps).to(x)

    def _rows(self, t: Tensor, like: Tensor) -> Tables:
        """Entries of the tables for rows at levels t (n,)."""
        return Tables(*(expand(table.to(like)[t], like) for table in self._tables))

    def _fresh(self, x: Tensor) -> Tensor:
        return super()._fresh(x).to(self.dtype)

    @cached_property
    def _tables(self) -> Tables:
        chain = self.kernel.chain
        left = chain.direction > 0  # √(σ_s² - s̃²), of ε̂ after the step from t
        carry = torch.where(left, chain.sigma / torch.where(left, chain.direction, 1.0), 0.0)
        kick = torch.where(chain.std > 0, carry, 0.0)
        return Tables(
            gamma=self.gamma * _above(left.double(), 1.0),
            alpha=_above(torch.where(left, chain.alpha, 0.0)),
            sigma=_above(carry) * chain.sigma,
            kick=kick,
            kicked=_above(kick),
        )


def undo(
    kernel: Bdia, x: Tensor, *, to: int, at: int = 0, cond: Cond = None, noise: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Walk from pairs back to those of their ancestors, one evaluation a level: pairs (n, 2, *state) at level `to`.

    Args:
        kernel: that made them.
        x: pairs (n, 2, *state) at level `at`, such as leaves.
        to: t of the ancestors.
        at: t of x.
        cond: conditioning of the rows, as their steps had it.
        noise: by level t, what the steps from t drew (n, *state), where they drew any.

    Raises:
        TypeError: no `Bdia`.
        ValueError: states of another shape, levels out of range, noise that is missing or of another shape.
    """
    spec = _checked(kernel, x, lambda kernel: kernel.state_shape)
    if not (is_whole(at, 0, spec.num_steps) and is_whole(to, at, spec.num_steps)):
        raise ValueError(f"levels are at={at!r}, to={to!r}, expected 0 <= at <= to <= T = {spec.num_steps}")
    if odd := [t for t, z in (noise or {}).items() if z.shape != x[:, 0].shape]:
        raise ValueError(
            f"noise of level {odd[0]} has another shape than states: expected (n, *{spec.state_shape[1:]})"
        )
    _warn(kernel, to - at)
    x = x.to(spec.device, spec.dtype)
    with torch.no_grad():
        for t in range(at + 1, to + 1):
            x = kernel.before(x, torch.full((len(x),), t, device=x.device), cond, (noise or {}).get(t))
    return x


def inverted(kernel: Bdia, x0: Tensor, *, cond: Cond = None, iterations: int = 1) -> Tensor:
    """The path of pairs that ends in given states, (T + 1, n, 2, *state), for `Rooted`; T + iterations evaluations.

    Args:
        kernel: without noise. One that has some begins at such a path too, at a level L above which it has none.
        x0: clean states (n, *state).
        cond: conditioning of the n rows, as `invert` takes it.
        iterations: evaluations for x_1, see `chains.inversion`.

    Raises:
        TypeError: no `Bdia`.
        ValueError: a kernel with noise, or states of another shape.
    """
    spec = _checked(kernel, x0, lambda kernel: kernel.state_shape[1:])
    inside: Any = kernel.kernel
    if inside.chain.stochastic[1:].any():
        raise ValueError("the chain has noise, and a picture no path through it: invert the kernel at eta=0.0")
    _warn(kernel, spec.num_steps)
    x0 = x0.to(spec.device, spec.dtype)
    with torch.no_grad():
        x1 = above(inside, x0.to(describe(inside, identify=False).dtype), 1, cond, iterations)
        path = [torch.stack([x0, x1.to(x0)], 1)]
        for t in range(1, spec.num_steps + 1):
            path.append(kernel.before(path[-1], torch.full((len(x0),), t, device=x0.device), cond))
    return torch.stack(path)


def _checked(kernel: Any, x: Tensor, shape: Callable[[Bdia], tuple[int, ...]]) -> Spec:
    if not isinstance(kernel, Bdia):
        raise TypeError(f"{type(kernel).__name__} is no Bdia: only its steps can be undone, bdia(KERNEL)")
    if tuple(x.shape[1:]) != shape(kernel):
        raise ValueError(f"states have shape {tuple(x.shape)}, expected (n, *{shape(kernel)})")
    given: Any = kernel
    return describe(given, identify=False)


def _warn(kernel: Bdia, steps: int) -> None:
    """Say where rounding would drown the state: γ^{-steps} roundings of a tenth and more."""
    grown, room = -steps * math.log(kernel.gamma), math.log(0.2 / torch.finfo(kernel.dtype).eps)
    if grown > room:
        name = str(kernel.dtype).removeprefix("torch.")
        warnings.warn(
            f"undoing {steps} steps at gamma={kernel.gamma:g} multiplies rounding by e^{grown:.0f}, of which {name} "
            f"bears e^{room:.0f}: use a larger gamma, fewer steps or double=True",
            stacklevel=3,
        )


def _above(table: Tensor, last: float = 0.0) -> Tensor:
    """Entries of t + 1 at t."""
    return torch.cat([table[1:], torch.full_like(table[:1], last)])
