"""Shortest paths from the data to noise: each frequency has its own schedule, along a geodesic of Gaussians.

Data are taken as N(0, Σ_0), diagonal in a basis of frequencies f. Between N(0, Σ_0) and N(0, I) the geodesic of the
Fisher metric is

    Σ_τ = Σ_0^(1-τ),   τ in [0, 1]                                   of length √(½ Σ_f log² Σ_0(f))
    ᾱ_τ = (1 - Σ_0^(1-τ)) / (1 - Σ_0),   → 1 - τ where Σ_0 → 1       so that ᾱ_τ Σ_0 + 1 - ᾱ_τ = Σ_τ
    x_τ = √ᾱ_τ x_0 + √(1 - ᾱ_τ) ε                                    in the basis

Σ_0 the same everywhere is a scalar schedule. ᾱ = 0 at τ = 1, where ε does not give x_0: the network predicts v or the
sample. The identity and the length are exact for Gaussian data; that the path is a good one for others is an idea.
The basis here is the orthonormal cosine transform of an image, whose coordinates are real and as many as its pixels.

Source: Image generation with shortest path diffusion (Das et al., 2023), sections 3 and 4. Written from its formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treesearch.backends.chains.schedules import Prediction, Schedule
from treesearch.rewards.numeric import is_whole

NEAR_ONE = 1e-8  # |log Σ_0| below which ᾱ is its limit


def levels(spectrum: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(ᾱ_τ, 1 - ᾱ_τ), both without cancellation.

    Args:
        spectrum: Σ_0 (*state), above 0.
        tau: τ (n,) in [0, 1].

    Returns:
        Two tensors (n, *state), float64.
    """
    log = spectrum.double().log()[None]
    tau = tau.double().reshape(-1, *(1,) * spectrum.ndim)
    flat = log.abs() < NEAR_ONE
    whole = torch.where(flat, 1.0, torch.expm1(log))
    kept = torch.where(flat, 1 - tau, torch.expm1((1 - tau) * log) / whole)
    lost = torch.where(flat, tau, ((1 - tau) * log).exp() * torch.expm1(tau * log) / whole)
    return kept, lost


def shortest_path(spectrum: Tensor, num_steps: int, prediction: Prediction = "v") -> Schedule:
    """T equal steps of the geodesic; the network is told 1000 τ.

    Args:
        spectrum: Σ_0 (*state): the variance of each entry of the state.
        num_steps: T.
        prediction: what the network returns, of entries in the basis; not ε.

    Raises:
        ValueError: a spectrum that is not above 0 and finite, num_steps below 1, or ε or a flow's velocity.
    """
    if not is_whole(num_steps):
        raise ValueError(f"num_steps is {num_steps!r}, expected at least 1")
    if prediction == "flow":
        raise ValueError("a flow's velocity is of paths with α + σ = 1, which this one is not: predict v or the sample")
    if not (spectrum.isfinite() & (spectrum > 0)).all():
        raise ValueError("spectrum has entries that are not above 0 and finite: variances of the data by frequency")
    tau = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device="cpu")
    kept, lost = levels(spectrum.detach().cpu(), tau)
    return Schedule((1000 * tau[1:]).float(), kept.sqrt(), lost.sqrt(), prediction)


def power_law(shape: tuple[int, int], c1: float = 1.59, c2: float = 0.0086, m: float = 2.0) -> Tensor:
    """Σ_0(f) = c1 / |c2 + |f||^m of the Fourier basis, f in cycles an image; the defaults are the paper's of CIFAR."""
    rows, columns = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device="cpu") for n in shape)
    return c1 / (c2 + (rows[:, None] ** 2 + columns[None] ** 2).sqrt()).abs() ** m


def fisher_length(variances: Tensor) -> float:
    """Length of the path through zero-mean Gaussians, geodesics between neighbours: Σ_t √(½ Σ_f (Δ log Σ_t)²).

    Args:
        variances: (T + 1, *state).
    """
    steps = variances.double().log().diff(dim=0).flatten(1)
    return float((0.5 * steps.square().sum(1)).sqrt().sum())
