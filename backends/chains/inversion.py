"""Inversion: the noisy states from which a chain's deterministic steps lead to a given sample.

    f(x) = α_s x̂_0(x, t) + σ_s ε̂(x, t)                                  the step at η = 0; s = t - 1, from x_0 up to x_T
    x <- x + α_t/α_s (x_s - f(x))                                       from x = x_s: DDIM inversion
    x <- x + (x_s - f(x))                                               of a flow, α + σ = 1: x_s + (σ_t - σ_s) v(x_s)
    x <- x + (α_t² + σ_t²)/(α_s α_t + σ_s σ_t) (x_s - f(x))             again: a fixed point, whose step leads to x_s

The first is α_t/α_s (x_s - σ_s ε̂) + σ_t ε̂ with the ε̂ of the state below, the second Euler's step of the reversed flow
with the v of the state below; what the round trip misses falls as steps shrink. On a flow the second misses less than
the first would: at 28 steps a fifth to three fifths of it, on Gaussian data and on small random networks of SD3 and
FLUX. At α_t = 0, where a flow begins, the third takes their place: exact there, where x̂_0 is one for all x, and for
data of unit variance. Each further evaluation multiplies the miss by a factor, below 1 on Gaussian data of unit
variance or less.

Whatever η the kernel has, its path is that of η = 0. Where x̂_0 is clipped, ε̂ is the network's own, as far as a step
holds it: a step with all of its noise new holds none of it, and ε̂ is then (x - α_t x̂_0)/σ_t of the clipped x̂_0.

Sources: Denoising Diffusion Implicit Models (Song et al., 2021), section 4.3, encoding. Flow Matching for Generative
Modeling (Lipman et al., 2023), the flow and its reverse. AIDI: Effective Real Image Editing with Accelerated Iterative
Diffusion Inversion (Pan et al., 2023), the fixed point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Kernel, describe, expand, optional
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
        ValueError: states of another shape, no whole number of iterations, or a step from pure noise to clean states.
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
    path = [x0.to(spec.device, spec.dtype)]
    with torch.no_grad():
        for t in range(1, spec.num_steps + 1):
            path.append(above(kernel, path[-1], t, cond, iterations))
    return torch.stack(path)


def walk(kernel: Kernel, x: Tensor, level: int, *, cond: Cond = None) -> Tensor:
    """x_0 (n, *state) of the steps at η = 0 from states x (n, *state) at a level: what a path leads back to.

    Args:
        kernel: as for `invert`; `level` evaluations a row.
        x: states at the level.
        level: t of these, 1..T.
        cond: conditioning of the n rows.
    """
    with torch.no_grad():
        for t in range(level, 0, -1):
            x = still(kernel, x, torch.full((len(x),), t, device=x.device), cond).to(x.dtype)
    return x


def above(kernel: Any, x_s: Tensor, t: int, cond: Cond, iterations: int = 1) -> Tensor:
    """x_t (n, *state) whose step leads to x_s, as far as these evaluations find it."""
    rows, x = torch.full((len(x_s),), t, device=x_s.device), x_s
    for gain in _gains(kernel.chain, t, iterations):
        x = (x + gain.to(x) * (x_s - still(kernel, x, rows, cond))).to(x.dtype)
    return x


def _gains(chain: Chain, t: int, iterations: int) -> list[Tensor]:
    """What each miss of the step from t is multiplied by."""
    (alpha_s, alpha), (sigma_s, sigma) = (v[t - 1 : t + 1] for v in (chain.schedule.alpha, chain.schedule.sigma))
    if ((alpha == 0) & (sigma_s == 0)).any():
        raise ValueError(f"the step from x_{t} leads from pure noise to clean states: no path tells what was there")
    again = (alpha**2 + sigma**2) / (alpha_s * alpha + sigma_s * sigma)
    flow = (torch.stack([alpha + sigma, alpha_s + sigma_s]) - 1).abs().amax(0) < 1e-6
    first = torch.where(flow, 1.0, alpha / alpha_s)
    return [torch.where(alpha > 0, first, again), *[again] * (iterations - 1)]


def still(kernel: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """f(x) of states x (n, *state) at level t (n,)."""
    law = kernel.transition(x, t, cond)
    if not isinstance(law, Gaussian):
        raise TypeError(f"steps of {type(kernel).__name__} are {type(law).__name__}, no Gaussians of x_t: invert the "
                        "kernel inside, and put it around what comes of it")  # fmt: skip
    return still_of(kernel.chain, law, x, t)


def still_of(chain: Chain, law: Gaussian, x: Tensor, t: Tensor) -> Tensor:
    """f(x) by the law of the step from x."""
    endpoint, eps = predicted(chain, law, x, t)
    sigma_s = expand(chain.schedule.sigma.to(endpoint)[t - 1], x)
    return chain.at("alpha_s", t, x) * endpoint + sigma_s * eps


def predicted(chain: Chain, law: Gaussian, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x̂_0 and ε̂ (n, *state) behind a step of the chain from x at level t (n,)."""
    at = {name: chain.at(name, t, x) for name in ("alpha", "sigma", "alpha_s", "direction")}
    end = law.endpoint
    eps = (x - at["alpha"] * end) / at["sigma"]
    if chain.clip_sample is not None and chain.step == "ddim":
        mean = law.mean if law.base_mean is None else law.base_mean
        told = (end.abs() >= end.new_tensor(chain.clip_sample)) & (at["direction"] > 0)
        eps = torch.where(told, (mean - at["alpha_s"] * end) / at["direction"], eps)
    return end, eps
