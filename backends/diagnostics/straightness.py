"""How straight the deterministic paths of a Gaussian chain are: what a single jump from x_t would miss.

    ε̂ = (x_t - α_t x̂_0(x_t)) / σ_t,   x_s = α_s x̂_0 + σ_s ε̂                 DDIM, η = 0, from x_T down to x_0
    gap_t = E|x̂_0(x_t) - x_0|² / E|x_0 - E x_0|²                               x_0 the end of the path of x_t

A path is of first order where ε̂, and with it x̂_0, stays the same along it: then one step gives what many give (DDIM is
exact at any number of steps, though x_t may run in a curve). gap_t = 0 says that for the rest of the way from t; 1 says
that the jump misses as much as the mean of all samples would. For a flow, whose x_t is (1 - t) x_0 + t ε, it is the
straightness of Liu et al. at level t, ∫ E|(x_1 - x_0) - v|² dt, in units of the variance of x_0.

Around an offset μ the path is that of x_t - μ.

What it is not: the error of a jump in a chain that draws noise (η > 0), which has that noise on top of it.

Sources: Denoising Diffusion Implicit Models (Song et al., 2021), eq. 12. Rectified Diffusion: Straightness Is Not Your
Need in Rectified Flow (Wang et al., 2025), first-order paths. Flow Straight and Fast (Liu et al., 2023), section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Kernel, expand, optional


def path(kernel: Kernel, x: Tensor, cond: Cond = None) -> tuple[dict[int, Tensor], Tensor]:
    """Endpoints x̂_0(x_t) (n, *state) by t along the deterministic paths from x_T = x, and where they end.

    One network evaluation a row and level.

    Raises:
        ValueError: a kernel without a Gaussian chain.
    """
    if (chain := optional(kernel, "chain")) is None:
        raise ValueError("straightness is of deterministic paths: a kernel without a Gaussian chain has none")
    ends: dict[int, Tensor] = {}
    offset = optional(kernel, "offset")
    for t in range(kernel.num_steps, 0, -1):
        level = torch.full((len(x),), t, device=x.device)
        end, mu = kernel.transition(x, level, cond).endpoint, 0.0 if offset is None else offset(x, cond)
        alpha, sigma, above = (chain.at(name, level, x) for name in ("alpha", "sigma", "alpha_s"))
        below = expand(chain.schedule.sigma.to(x.device)[level - 1].to(x.dtype), x)
        y0 = end - mu
        ends[t], x = end, mu + above * y0 + below * (x - mu - alpha * y0) / sigma
    return ends, x


def gaps(ends: Mapping[int, Tensor], x0: Tensor) -> dict[int, Tensor]:
    """Each path's part of gap_t (n,) by t; their mean is gap_t. Zeros where all paths end in one point."""
    spread = ((x0 - x0.mean(0)) ** 2).flatten(1).sum(1).sum() / max(len(x0) - 1, 1)
    missed = {t: ((end - x0) ** 2).flatten(1).sum(1).double() for t, end in ends.items()}
    return {t: each / spread if float(spread) > 0 else torch.zeros_like(each) for t, each in missed.items()}
