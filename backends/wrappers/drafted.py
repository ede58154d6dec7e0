"""Drafts by another network: a student, a distilled adapter, a smaller or quantised model beside the one searched.

    x̂_0 of a draft  =  endpoint of `other` at (x_t, t)

A draft leaps down the chain of the kernel, with the noise of its path (`backends.chains.coarse`), and asks the other
network where the path leads. The kernel's law is untouched. The two share states, T, prior and noise levels, so that a
state of one is a state of the other; conditioning is encoded by the kernel, and handed to both. A guide or a clamp goes
around both, `TDS(Drafted(kernel, other), ...)`, and then drafts are guided or clamped too; a guide around the kernel
alone guides what is finished, and no draft.

Caches of blocks that compare a call with the one before (diffusers' first-block and TaylorSeer caches) have no place
here: they take a batch for one trajectory, and rows of a search stand at mixed levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from treesearch.backends.base import Cond, Gaussian, Kernel, Spec, Wrapper, describe, optional
from treesearch.backends.wrappers.inpainting import clamps, hold_the_same
from treesearch.rewards.numeric import is_positive

SAME = ("num_steps", "state_shape", "noise_shape", "dtype")


@dataclass(frozen=True, eq=False)
class Drafted(Wrapper):
    """A kernel whose drafts take the endpoints of another.

    Args:
        kernel: what is searched.
        other: drafts.
        ratio: cost of one of its evaluations, in evaluations of the kernel; None counts the floating-point operations
            of both, once, which takes kernels that need no prompts.

    Raises:
        ValueError: kernels of other states, T, prior or noise levels, or of steps that drafts cannot leap along; a
            guide that drafts, or a clamp within; a ratio that is no positive number.
        TypeError: no kernel.
    """

    other: Any
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not is_positive(self.ratio):
            raise ValueError(f"ratio is {self.ratio!r}, expected a positive number, or None to count")
        _refuse(self.kernel, self.other)

    @property
    def drafter(self) -> Any:
        """The other kernel, its steps those of this one's chain."""
        return _Onto(self.other, self.kernel.chain)

    @cached_property
    def _counted(self) -> float:
        return operations(self.other) / operations(self.kernel)

    @property
    def draft_ratio(self) -> float:
        return self._counted if self.ratio is None else self.ratio

    def to(self, device: str | torch.device) -> Self:
        move = optional(self.other, "to")
        return replace(super().to(device), other=self.other if move is None else move(device))

    def _settings(self) -> str | None:
        other = optional(self.other, "fingerprint")
        return None if other is None else f"{other}, {self.ratio}"


@dataclass(frozen=True, eq=False)
class _Onto(Wrapper):
    """Endpoints of a kernel on the steps of a chain, whatever steps it has itself: a student renoises, say."""

    chain: Any

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        endpoint, offset = self._endpoint(x, t, cond), optional(self.kernel, "offset")
        m = torch.zeros_like(x) if offset is None else offset(x, cond)
        eps = (x - m - self.chain.at("alpha", t, x) * (endpoint - m)) / self.chain.at("sigma", t, x)
        return self.chain.law(x, t, (endpoint - m, eps), None if offset is None else m)

    def _endpoint(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Raises:
        ValueError: it is told less than it needs.
        """
        try:
            return self.kernel.transition(x, t, cond).endpoint
        except KeyError as error:
            raise ValueError(
                f"what drafts needs {error} in its conditioning, which the kernel that is searched encodes, without: "
                "search the kernel of more guidance, and draft by that of less"
            ) from error


def operations(kernel: Kernel) -> int:
    """Floating-point operations of one evaluation, as torch counts them; 1 where it counts none.

    Raises:
        ValueError: a kernel that cannot be asked without prompts.
    """
    spec = describe(kernel, identify=False)
    counter = FlopCounterMode(display=False)
    level = torch.full((1,), spec.num_steps, device=spec.device)
    try:
        x = kernel.prior(torch.zeros(1, *spec.noise_shape, device=spec.device))
        with torch.no_grad(), counter:
            kernel.transition(x, level)
    except Exception as error:
        raise ValueError(
            f"what a draft costs cannot be counted without prompts ({type(error).__name__}: {error}): say ratio="
        ) from error
    return max(1, counter.get_total_flops())


def _refuse(kernel: Kernel, other: Kernel) -> None:
    mine, theirs = describe(kernel, identify=False), describe(other, identify=False)
    _refuse_others(mine, theirs)
    for each in (mine, theirs):
        if not each.drafts:
            raise ValueError(f"drafts cannot leap along the steps of this kernel: {each.undrafted}")
    if any(theirs.rewards_per_nfe) or any(theirs.backward_per_nfe):
        raise ValueError("a guide drafts for the kernel: put it around both, guide(Drafted(kernel, other), ...)")
    if clamps(kernel) or not hold_the_same(kernel, other):
        raise ValueError("known entries would be known to one of the two, or drawn anew: put the clamp around both, "
                         "Clamp(Drafted(kernel, other), ...)")  # fmt: skip
    ours, grid = kernel.chain.schedule, other.chain.schedule  # type: ignore[attr-defined]
    for name in ("alpha", "sigma"):
        pair = [getattr(of, name).double().cpu() for of in (ours, grid)]
        if pair[0].shape != pair[1].shape or not torch.allclose(*pair, rtol=1e-5, atol=1e-7):
            raise ValueError(f"drafts by a kernel of other noise levels ({name} by t): its states are not this one's")


def _refuse_others(mine: Spec, theirs: Spec) -> None:
    """Raises:
    ValueError: kernels of other states or T.
    """
    for name in SAME:
        have, want = getattr(theirs, name), getattr(mine, name)
        if have != want:
            advice = f": make it with num_steps={want}" if name == "num_steps" else ""
            raise ValueError(f"drafts by a kernel of another {name}: {have}, expected {want}, as of the kernel that is "
                             f"searched{advice}")  # fmt: skip
