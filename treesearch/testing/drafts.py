"""The law of kernels that drafts are made of: with the endpoint given, their steps are those of their chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.backends.base import Gaussian, Kernel, Spec, describe, expand, optional
from treesearch.testing.chains import bare_chain, conditioning
from treesearch.testing.compare import require, same
from treesearch.testing.kernels import rounding


def check_drafts(kernel: Kernel, prompts: Sequence[Any] | None = None, *, rows: int = 8) -> None:
    """Drafts hold the endpoint over several steps of `kernel.chain`, which must be the kernel's own.

        mean = α_s x̂_0 + √(σ_s² - s̃²) (x_t - α_t x̂_0)/σ_t,   std = s̃           of p, where a guide moves the mean

    Entries that the kernel holds, and those whose endpoint a chain clips while it keeps ε̂, may differ.

    Args:
        kernel: the kernel.
        prompts: conditioning to try it with, of the first task.
        rows: states at each level.

    Raises:
        CheckFailed: it has no drafts, or they would be of another law.
    """
    spec = describe(kernel, identify=False)
    require(spec.drafts, "the kernel has no `chain` that drafts can leap along, of states that are x_t alone")
    cond = conditioning(kernel, prompts, np.zeros(rows, np.int64))
    for i, x in enumerate(bare_chain(kernel, rows, prompts=prompts)[:-1]):
        _check_step(kernel, spec, x, spec.num_steps - i, cond)


def _check_step(kernel: Any, spec: Spec, x: Tensor, level: int, cond: dict[str, Any]) -> None:
    t = torch.full((len(x),), level, device=x.device)
    law, chain = kernel.transition(x, t, cond), kernel.chain
    require(isinstance(law, Gaussian), f"t = {level}: drafts take Gaussian steps, got {type(law).__name__}")
    offset, held = (optional(kernel, name) for name in ("offset", "held"))
    m = torch.zeros_like(x) if offset is None else offset(x, cond)
    alpha, sigma, alpha_s, kept, std = (
        chain.at(name, t, x) for name in ("alpha", "sigma", "alpha_s", "direction", "std")
    )
    end, free = law.endpoint - m, torch.ones_like(x, dtype=torch.bool)
    if held is not None:
        free = free & ~held(x, cond)
    if chain.clip_sample is not None and chain.step == "ddim":
        free = free & (law.endpoint.abs() < chain.clip_sample)
    want = m + alpha_s * end + kept / sigma * (x - m - alpha * end)
    mean = law.mean if law.base_mean is None else law.base_mean
    room = rounding(kernel).times(spec.num_steps / float(chain.alpha[level].clamp(min=1e-2).min()))
    same(f"mean at t = {level}, beside the chain's with that endpoint", *_where(free, mean, want), room)
    same(f"std at t = {level}, beside the chain's", *_where(free, law.std.expand_as(x), expand(std, x)), room)


def _where(free: Tensor, got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Both, 0 in entries that may differ."""
    return torch.where(free, got, 0.0), torch.where(free, want, 0.0)
