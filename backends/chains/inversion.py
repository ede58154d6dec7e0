"""Inversion: the noisy states from which a chain's deterministic steps lead to a given sample.

    x_t = α_t/α_s (x_s - σ_s ε̂) + σ_t ε̂,   ε̂ = (x - α_t x̂_0(x, t))/σ_t,   s = t - 1, from x_0 up to x_T
    x = x_s once: DDIM inversion; x = the x_t so found, again: a fixed point, whose DDIM step leads back to x_s

Whatever η the kernel has, its path is that of η = 0. One evaluation a level takes ε̂ from the state below it, and what
the round trip misses falls as steps shrink; each further one multiplies it by a factor, below 1 on Gaussian data.

Sources: Denoising Diffusion Implicit Models (Song et al., 2021), section 4.3, encoding. AIDI: Effective Real Image
Editing with Accelerated Iterative Diffusion Inversion (Pan et al., 2023), the fixed point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Kernel, describe, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.rewards.numeric import is_whole


def invert(kernel: Kernel, x0: Tensor, *, cond: Cond = None, iterations: int = 1) -> Tensor:
    """x_0..x_T (T + 1, n, *state) on the deterministic path that ends in x_0.

    Args:
        kernel: on a `Chain`; T · iterations evaluations a row.
        x0: states (n, *state).
        cond: conditioning of the n rows, as `encode` gives it.
        iterations: evaluations a level.

    Raises:
        TypeError: a kernel without such a chain, around an offset, or whose states hold more than x_t.
        ValueError: states of another shape, or no whole number of iterations.
    """
    spec, name = describe(kernel, identify=False), type(kernel).__name__
    chain: Any = optional(kernel, "chain")
    if not isinstance(chain, Chain) or optional(kernel, "offset") is not None:
        raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain around 0: no path to invert")
    if spec.noise_shape != spec.state_shape:
        raise TypeError(f"states of {name} hold more than x_t: invert the kernel inside")
    if tuple(x0.shape[1:]) != spec.state_shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, expected rows of states, (n, *{spec.state_shape})")
    if not is_whole(iterations):
        raise ValueError(f"iterations is {iterations!r}, expected 1 or more")
    schedule = chain.schedule
    path = [x0.to(spec.device, spec.dtype)]
    with torch.no_grad():
        for t in range(1, spec.num_steps + 1):
            (alpha_s, alpha), (sigma_s, sigma) = schedule.alpha[t - 1 : t + 1], schedule.sigma[t - 1 : t + 1]
            alpha_s, alpha, sigma_s, sigma = (v.to(path[0]) for v in (alpha_s, alpha, sigma_s, sigma))
            below, x = path[-1], path[-1]
            for _ in range(iterations):
                end = kernel.transition(x, torch.full((len(x),), t, device=spec.device), cond).endpoint
                eps = (x - alpha * end) / sigma
                x = alpha / alpha_s * (below - sigma_s * eps) + sigma * eps
            path.append(x)
    return torch.stack(path)
