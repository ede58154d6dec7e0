"""Cycles: a chain that goes back up before it goes on, as one Gaussian a step.

    x_T -> ... -> x_{low+1} -> (x_low -> x_high) -> x_{high-1} -> ... -> x_{low+1} -> x_low -> ... -> x_0

    p(x_high | x_{low+1}) = N(c m, c² s² + v²),   c = α_high/α_low,  v² = σ_high² - c² σ_low²

m and s are those of the step to x_low, which is not seen: noising it up again is Gaussian too, so that a cycle is a
re-indexed chain of T + times (high - low) steps with one noise and one evaluation each, and every search walks it as
any chain. Entries that are held at a value (`Clamp`) are told to the others once more with each cycle. Where the
kernel's steps are exact a cycle leaves the law of x_0 as it is; elsewhere it is another law, that of this longer chain.
Around an offset μ it is x - μ that c scales.

Sources: RePaint (Lugmayr et al., 2022), algorithm 1, resampling. Cyclic One-Way Diffusion (Wang et al., 2024), section
3.2, cycles between two levels. Restart Sampling (Xu et al., 2023), algorithm 1.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.rewards.numeric import is_whole


@final
@dataclass(frozen=True)
class Cycle(Wrapper):
    """A kernel that passes the levels between two some times more.

    Args:
        kernel: on a `treesearch.backends.chains.diffusion.Chain`; its steps must be `Gaussian`.
        low, high: levels of the kernel, 0 <= low < high <= T: each cycle goes from low up to high.
        times: how often; 0 is the kernel itself.

    Raises:
        TypeError: a kernel without such a chain, or one whose states hold a memory, which a climb makes wrong.
        ValueError: levels out of order, or a number of cycles that is none.
    """

    _: KW_ONLY
    low: int
    high: int
    times: int = 1

    withheld = frozenset({"chain", "renoise"})  # of another number of levels
    undrafted = "levels of a cycle are not those of one chain"

    def __post_init__(self) -> None:
        steps, name = self._spec.num_steps, type(self.kernel).__name__
        if not isinstance(optional(self.kernel, "chain"), Chain):
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
        if self._spec.noise_shape != self._spec.state_shape:
            raise TypeError(f"states of {name} hold more than x_t, and what they remember is wrong after a climb: use "
                            "a kernel without memory")  # fmt: skip
        if self.kernel.chain.schedule.carry is not None:
            raise TypeError("this process cannot be noised from a state alone: its steps need x_0")
        whole = is_whole(self.low, 0, steps) and is_whole(self.high, 0, steps)
        if not whole or self.low >= self.high:
            raise ValueError(
                f"low and high are {self.low!r} and {self.high!r}, expected 0 <= low < high <= T = {steps}"
            )
        if not is_whole(self.times, 0):
            raise ValueError(f"times is {self.times!r}, expected a number of cycles, 0 or more")

    @property
    def num_steps(self) -> int:
        return len(self._levels) - 1

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the kernel, and in every step that goes up."""
        return tuple(bool(s) or up for s, up in zip(self._by_level("stochastic"), self._ups.tolist(), strict=True))

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Network rows of an evaluation at each t."""
        return self._by_level("rows_per_nfe")

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        """Backward passes of an evaluation at each t."""
        return self._by_level("backward_per_nfe")

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return self._by_level("rewards_per_nfe")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The step from x_t, and up from where it leads in the steps that go up.

        Raises:
            TypeError: no Gaussian step.
        """
        law = self.kernel.transition(x, self._table.to(t.device)[t], cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"cycles need a kernel of Gaussian steps, got {type(law).__name__}")
        up = self._ups.to(t.device)[t]
        if not up.any():
            return law
        offset = optional(self.kernel, "offset")
        return self._noised(law, expand(up, x), None if offset is None else offset(x, cond))

    def diagnose(self, t: Tensor) -> str:
        """What the kernel says of the levels that it knows these as."""
        hint = optional(self.kernel, "diagnose")
        return "" if hint is None else hint(self._table[t.cpu()])

    def _noised(self, law: Gaussian, up: Tensor, offset: Tensor | None) -> Gaussian:
        """The law with its rows under `up` (n, 1, ...) taken from low to high."""
        scale, added = (table.to(law.mean) for table in self._climb)
        rest = 0.0 if offset is None else (1 - scale) * offset  # μ + c (m - μ)
        base = None if law.base_mean is None else torch.where(up, scale * law.base_mean + rest, law.base_mean)
        std = torch.where(up, ((scale * law.std) ** 2 + added**2).sqrt(), law.std)
        return replace(law, mean=torch.where(up, scale * law.mean + rest, law.mean), std=std, base_mean=base)

    def _by_level(self, name: str) -> tuple[Any, ...]:
        each = getattr(self._spec, name)
        return tuple(each[level] for level in self._levels)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    @cached_property
    def _levels(self) -> list[int]:
        """Levels of the kernel, [t] for x_t of this one."""
        below = list(range(self.low + 1))
        between = list(range(self.low + 1, self.high + 1))
        return [*below, *between * (self.times + 1), *range(self.high + 1, self._spec.num_steps + 1)]

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self._levels, device="cpu")

    @cached_property
    def _ups(self) -> Tensor:
        """Whether the step from x_t goes up, (T + 1,) bool."""
        return torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), self._table[:-1] >= self._table[1:]])

    @cached_property
    def _climb(self) -> tuple[Tensor, Tensor]:
        """c and v, of one number or by entry (*state)."""
        of = self.kernel.chain.schedule
        scale = of.alpha[self.high] / of.alpha[self.low]
        return scale, (of.sigma[self.high] ** 2 - (scale * of.sigma[self.low]) ** 2).clamp_min(0).sqrt()

    def _settings(self) -> str:
        return f"low={self.low}, high={self.high}, times={self.times}"
