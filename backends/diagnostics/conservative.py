"""Whether a field is a gradient: a score is one, s = ∇ log p, and its Jacobian J is symmetric; a network's need not be.

    asymmetry     √(E|(J - Jᵀ)z|² / E|Jz|²) -> |J - Jᵀ|_F / |J|_F      z ~ N(0, I), Hutchinson's estimate
    sub-Jacobian  the same of J's rows and columns on a few entries, in full
    loop          ∮ s·dl along a closed curve, 0 for a gradient; in units of Σ |s·dl|
    gauge         s + K s with Kᵀ = -K is no gradient and yet leaves p as it is, for ∇·(p K ∇ log p) = 0

Of an exact denoiser the endpoint x̂_0 = (x_t + σ² s) / α is a gradient as well: its Jacobian is (α/σ²) Cov[x_0 | x_t].
That one is looked at, for in s and ε̂ the identity drowns what the network learnt at high noise. Weights of a search are
transition densities and never ask for ∇ log p, so that asymmetry biases none of them; what it says is how far the
gradient of a guide, Jᵀ∇r, is from the J∇r of a model that is a score.

J z comes from two vector-Jacobian products, u -> Jᵀu and its own: forward-mode derivatives are missing for attention,
whose plain form is asked for here because the fused ones have no second derivative. Exact up to rounding; the estimate
over z has the error that is given beside it.

Sources: Are We Really Learning the Score Function? Reinterpreting Diffusion Models Through Wasserstein Gradient Flow
Matching (2025), its two tests (integral and differential); the formulas here are our own derivation. A Stochastic
Estimator of the Trace of the Influence Matrix (Hutchinson, 1990).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Kernel, expand, optional

Field = Callable[[Tensor], Tensor]
"""Rows (n, *state) to rows of the same shape, each by itself."""


class NoGradient(ValueError):
    """A field whose values do not depend on its input in a way that torch can differentiate."""


class Ratio(NamedTuple):
    """An estimate and its standard error."""

    value: float
    se: float


class Circulation(NamedTuple):
    """A line integral along a closed curve.

    Args:
        integral: ∮ s·dl.
        total: Σ |s·dl|.
    """

    integral: float
    total: float

    @property
    def share(self) -> float:
        """∮ s·dl / Σ |s·dl|, 0 where the field is 0."""
        return self.integral / self.total if self.total else 0.0


def _differentiable(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a leaf and the field's values on it, with their graph.

    Raises:
        NoGradient: there is none.
    """
    x = x.detach().clone().requires_grad_()
    y = field(x)
    if not y.requires_grad:
        raise NoGradient("no gradient reaches the input")
    return x, y


def _pulled(y: Tensor, x: Tensor, u: Tensor, *, again: bool = False) -> Tensor:
    """Jᵀu; zeros where y does not depend on x."""
    (found,) = torch.autograd.grad(y, x, u, create_graph=again, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


def products(field: Field, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """J z and Jᵀz at rows x (n, *state), for z of the same shape.

    Raises:
        NoGradient: the field cannot be differentiated.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x, y = _differentiable(field, x)
        u = torch.zeros_like(y, requires_grad=True)
        back = _pulled(y, x, u, again=True)
        forward = _pulled(back, u, z) if back.requires_grad else torch.zeros_like(x)
        return forward.detach(), _pulled(y, x, z).detach()


def asymmetry(field: Field, x: Tensor, z: Tensor) -> Ratio:
    """√(Σ|(J - Jᵀ)z|² / Σ|Jz|²) over rows x (n, *state) and probes z (n, *state), with its error over rows.

    0 is a gradient field, √2 the most that independent entries of J would give. Entries of z that are 0 leave those of
    J out: on such a sub-Jacobian, give z with the same zeros in every row.
    """
    forward, back = (torch.where(z == 0, 0.0, p).double().flatten(1) for p in products(field, x, z))
    apart, size = ((forward - back) ** 2).sum(1), (forward**2).sum(1)
    if not float(size.sum()) > 0:
        return Ratio(0.0, 0.0)
    squared = float(apart.sum() / size.sum())
    spread = float((apart - squared * size).std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    value = math.sqrt(squared)
    return Ratio(value, spread / float(size.mean()) / (2 * value) if value > 0 else 0.0)


def jacobian(field: Field, x: Tensor, entries: Sequence[int]) -> Tensor:
    """J (n, k, k) of rows x on k entries of the flattened state, entry by entry.

    Raises:
        NoGradient: the field cannot be differentiated.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, y = _differentiable(field, x)
        at = torch.as_tensor(entries, device=x.device)
        rows = []
        for entry in entries:
            u = torch.zeros_like(y)
            u.flatten(1)[:, entry] = 1
            rows.append(_pulled(y, x, u).flatten(1)[:, at])
    return torch.stack(rows, 1).detach()


def antisymmetry(matrix: Tensor) -> float:
    """|J - Jᵀ|_F / |J|_F of matrices (n, k, k), norms over all of them; 0 where they are 0."""
    size = float(matrix.norm())
    return float((matrix - matrix.mT).norm()) / size if size else 0.0


def loop(field: Field, centre: Tensor, along: Tensor, across: Tensor, radius: float, points: int = 256) -> Circulation:
    """∮ s·dl along centre + radius (cos θ · along + sin θ · across), all (*state,).

    By the trapezoidal rule, whose error falls faster than any power of 1/points for a smooth field; none for a linear
    one. There ∮ = πR² (J21 - J12) in the plane of two orthonormal directions, by Stokes.
    """
    angle = 2 * math.pi * torch.arange(points, dtype=torch.float64, device=centre.device) / points
    cos, sin = (expand(v.to(centre.dtype), centre[None]) for v in (angle.cos(), angle.sin()))
    at = centre + radius * (cos * along + sin * across)
    step = 2 * math.pi / points * radius * (cos * across - sin * along)
    with torch.no_grad():
        work = (field(at).double() * step.double()).flatten(1).sum(1)
    return Circulation(float(work.sum()), float(work.abs().sum()))


def gauged(score: Field, k: Tensor) -> Field:
    """s + K s for vector states (n, D): another field for the same law.

    Args:
        score: s.
        k: K (D, D), antisymmetric.

    Raises:
        ValueError: it is not.
    """
    if k.ndim != 2 or not torch.equal(k, -k.mT):
        raise ValueError("k is not antisymmetric, expected a matrix with Kᵀ = -K: take (A - Aᵀ) / 2 of yours")
    return lambda x: (s := score(x)) + s @ k.mT.to(s)


def endpoint_field(kernel: Kernel, t: int, cond: Cond = None) -> Field:
    """The endpoint x̂_0(x_t) that a kernel predicts at level t, without the limit that its chain may put on it.

    A limit would make J unsymmetric by itself, in the rows that it cuts. What it cut is read off the law's mean,
    α_s x̂_0 + √(σ_s² - s̃²) ε̂, whose ε̂ it does not touch: x̂_0 = (x_t - σ_t ε̂) / α_t. Where the mean holds no ε̂ (t = 1,
    renoising) the limit stays.
    """

    def field(x: Tensor) -> Tensor:
        level = torch.full((len(x),), t, device=x.device)
        law, chain = kernel.transition(x, level, cond), optional(kernel, "chain")
        mean = getattr(law, "base_mean", None)
        mean = getattr(law, "mean", None) if mean is None else mean
        if chain is None or chain.clip_sample is None or chain.step != "ddim" or mean is None:
            return law.endpoint
        alpha, sigma, above, way = (chain.at(name, level, x) for name in _TABLES)
        eps = (mean - above * law.endpoint) / torch.where(way > 0, way, 1.0)
        inside = (law.endpoint.detach().abs() < chain.clip_sample) | (way == 0)
        return torch.where(inside, law.endpoint, (x - sigma * eps) / alpha)

    return field


_TABLES = ("alpha", "sigma", "alpha_s", "direction")
