"""Several modalities on one chain: what enters it accumulates step by step.

    z_t = √α_t (z_{t-1} + w_t E) + √(1 - α_t) ε,   z_0 = 0,   E the modalities x_i, encoded and put together
    z_t | E ~ N(A_t E, (1 - ᾱ_t) I),   A_t = Σ_{s≤t} √(ᾱ_t/ᾱ_{s-1}) w_s,   ᾱ_0 = 1

A step carries √(ᾱ_t/ᾱ_{t-1}) of z_{t-1}; the rest of A_t E enters as E. With w_1 = 1 and the others 0 this is DDPM on
E. The chain ends in Ê itself (α_0 = 1, σ_0 = 0). All of it is exact; that the chain may begin at N(0, I) needs
A_T ≈ 0, which free weights do not give, and that Ê is learnable needs A_t/σ_t to fall: both are checked.

Source: Diffusion Models For Multi-Modal Generative Modeling (Chen et al., 2024), section 3. Written from its formulas;
A_t in closed form is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import EPS, Schedule, Spacing, respace

REACHES_PRIOR = 0.01  # of A_T: the cosine and linear schedules of DDPM, at 1,000 steps, end at .0016 and .0064


def first_only(steps: int) -> Tensor:
    """w_1 = 1 and the others 0, (K,): the weights of DDPM."""
    return torch.eye(1, steps, dtype=torch.float64, device="cpu")[0]


def accumulated(alphas_cumprod: Tensor, weights: Tensor) -> Tensor:
    """A_1..A_K (K,) float64 from ᾱ_1..ᾱ_K and w_1..w_K."""
    bars = alphas_cumprod.double()
    before = torch.cat([bars.new_ones(1), bars[:-1]])
    return bars.sqrt() * (weights.double() / before.sqrt()).cumsum(0)


def multi_task(
    alphas_cumprod: Tensor, num_steps: int, *, weights: Tensor | None = None, spacing: Spacing = "trailing"
) -> Schedule:
    """The grid of a chain that is told Ê.

    Args:
        alphas_cumprod: ᾱ of the K training steps, (K,), above 0.
        num_steps: T.
        weights: w (K,); DDPM's by default.
        spacing: which of the K steps the chain visits, see `respace`.

    Raises:
        ValueError: weights of another length, or by which A_T stays above 0 or A/σ rises.
    """
    bars = alphas_cumprod.double().cpu()
    weights = first_only(len(bars)) if weights is None else weights.double().cpu()
    if weights.shape != bars.shape or not weights.isfinite().all():
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected {len(bars)} finite numbers, one a step")
    kept, sigma = accumulated(bars, weights), (1 - bars).sqrt()
    _refuse(kept, sigma)
    visited = respace(len(bars), num_steps, spacing)
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    bar = torch.cat([one, bars[visited]])
    return Schedule(
        visited,
        torch.cat([one, kept[visited]]),
        torch.cat([0 * one, sigma[visited]]),
        "sample",
        carry=(bar[1:] / bar[:-1]).sqrt(),
    )


def _refuse(kept: Tensor, sigma: Tensor) -> None:
    if abs(float(kept[-1])) > REACHES_PRIOR:
        raise ValueError(
            f"A_T is {float(kept[-1]):.2g}, expected at most {REACHES_PRIOR}: z_T would still show E, of which the "
            "prior N(0, I) knows nothing; weights must enter early and end near 0"
        )
    rises = (kept[1:] * sigma[:-1] - kept[:-1] * sigma[1:] > EPS).nonzero()
    if len(rises):
        raise ValueError(
            f"A/σ rises at step {int(rises[0]) + 2}: the weight there adds more of E than the step forgets, and a "
            "noisier state would know more; weights must fall faster"
        )
