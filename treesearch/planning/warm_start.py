"""A warm start: the chain of a kernel from plans that are already there, for any method.

    x_t = α_t τ_0^(j) + σ_t ε,  j uniform among the plans          `kernel.renoise(x, 0, t, noise)`

then x_t -> ... -> x_0 by the kernel's own steps. This is another law than p, which results say.

Source: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), section 5.4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Spec, Wrapper, describe, optional, uniform
from treesearch.methods.base import Method
from treesearch.results.result import SearchResult

WARM = "warm start: these are no draws of p, nor is there a Z of p"


@final
@dataclass(frozen=True, eq=False)
class WarmStart(Wrapper):
    """A kernel whose prior is a set of plans, noised up to a level: a chain of `level` steps.

    Args:
        kernel: has `renoise(x, t_from, t_to, noise)`, and `clamp(x, cond)` if it has known entries.
        plans: states x_0, (tasks, K, *state).
        level: t, steps left after the noise.

    Raises:
        ValueError: a level outside 1..T, or plans of another shape.
    """

    plans: Tensor
    level: int

    departs = WARM
    withheld = frozenset({"prior_log_weight"})  # the prior here is no proposal for the kernel's own

    def __post_init__(self) -> None:
        spec = self._spec
        if not 1 <= self.level <= spec.num_steps:
            raise ValueError(f"level is {self.level}, expected 1..T = {spec.num_steps} (denoising steps left)")
        if self.plans.ndim != len(spec.state_shape) + 2 or tuple(self.plans.shape[2:]) != spec.state_shape:
            want = ("tasks", "K", *spec.state_shape)
            raise ValueError(f"plans have shape {tuple(self.plans.shape)}, expected {want}")
        object.__setattr__(self, "plans", self.plans.detach().to(spec.device))

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    @property
    def num_steps(self) -> int:
        return self.level

    @property
    def stochastic(self) -> tuple[bool, ...]:
        return (True, *self._spec.stochastic[1 : self.level + 1])

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        return self._spec.backward_per_nfe[: self.level + 1]

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        return self._spec.rewards_per_nfe[: self.level + 1]

    def _passed(self, name: str, value: Any) -> Any:
        return value.on(value.schedule.last(self.level)) if name == "chain" else value

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        """x_t of a plan. Which one, the first noise entry says: the first observation is known and needs none."""
        count = self.plans.shape[1]
        pick = (uniform(noise.flatten(1)[:, 0]) * count).long().clamp_max(count - 1).to(self.plans.device)
        task = torch.zeros_like(pick) if cond is None else cond["task"].to(self.plans.device)
        levels = torch.full_like(task, self.level)
        x = self.kernel.renoise(self.plans[task, pick], torch.zeros_like(levels), levels, noise.to(self.plans))
        clamp = optional(self.kernel, "clamp")
        return x if clamp is None else clamp(x, cond)


def shifted(plans: Tensor, steps: int) -> Tensor:
    """Plans (..., H, C) that begin `steps` rows later and end with copies of their last row.

    Raises:
        ValueError: no row would be left.
    """
    length = plans.shape[-2]
    if not 0 <= steps < length:
        raise ValueError(f"steps is {steps}, expected less than the plan's {length} rows")
    rows = (torch.arange(length, device=plans.device) + steps).clamp_max(length - 1)
    return plans[..., rows, :]


def lowered(method: Method, level: int) -> Method:
    """The method for a chain of fewer steps: levels above are left out of `branch_at` and `schedule`."""
    changes: dict[str, Any] = {}
    for name in ("branch_at", "schedule"):
        given = getattr(method, name, None)
        if isinstance(given, tuple):
            changes[name] = tuple(t for t in given if t <= level) or None
    return replace(method, **changes) if changes else method  # type: ignore[type-var]


def flagged(result: SearchResult) -> SearchResult:
    """A result of a warm start without an estimate of Z: its weights are relative to another law than p."""
    for task in result.tasks:
        task.readout = replace(task.readout, log_z=None, log_z_se=None, interval=None)
    return result
