"""What a network may predict, each from each other, and the drift of the flow and of every SDE with the same marginals.

    x_t = α x_0 + σ ε,   q = a x_0 + b ε       "sample" (1, 0)   "epsilon" (0, 1)   "score" (0, -1/σ)   "v" (-σ, α)
                                               "flow" (α', σ'), the velocity u of the probability-flow ODE
    q' = c x_0 + d ε = ((c b - d a) x_t + (α d - σ c) q) / (α b - σ a)

x_t and q are two equations for x_0 and ε, solved as such: α² + σ² = 1 is not needed, and a quantity is itself exactly.
The forward SDE is dx = f x dt + g dw with f = α'/α and g² = (σ²)' - 2 f σ². Backwards in time, for any η,

    dx = (f x - (1 + η²)/2 g² ∇log p_t) dt + η g dw̄

has the marginals p_t: η = 0 is the flow, whose drift is u, and η = 1 the reverse SDE. `chains.diffusion.Chain` with the
same η is a discretisation of it, of order one.

Source: The Principles of Diffusion Models (Lai et al., 2025), on conversions between predictions and on the family of
reverse SDEs; Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), eq. 6 and
app. D.1; Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 6.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

Quantity = Literal["epsilon", "sample", "score", "v", "flow"]
QUANTITIES: tuple[Quantity, ...] = ("epsilon", "sample", "score", "v", "flow")
Rates = tuple[Tensor | float, Tensor | float]
STRAIGHT: Rates = (-1.0, 1.0)
"""(α', σ') of α = 1 - σ in the time σ, the one of `Schedule.flow`."""


def convert(
    output: Tensor, from_: Quantity, to: Quantity, x: Tensor, alpha: Tensor, sigma: Tensor, rates: Rates = STRAIGHT
) -> Tensor:
    """The quantity `to` that goes with x and with `output`, which is the quantity `from_`.

    Args:
        output: (n, *state), as a network returns it.
        from_, to: what it is, and what is asked for.
        x: x_t (n, *state).
        alpha, sigma: α and σ of x_t, which broadcast against x.
        rates: (α', σ') in the time of the velocity; read for "flow" alone.

    Raises:
        ValueError: an unknown quantity, or a level where x_t and the quantity do not determine x_0 and ε.
    """
    (a, b), (c, d) = (_form(name, alpha, sigma, rates) for name in (from_, to))
    determinant = alpha * b - sigma * a
    if not (determinant.isfinite() & (determinant != 0)).all():
        raise ValueError(f"x and its {from_!r} do not give x_0 and ε where alpha or sigma is 0: convert other levels")
    return (alpha * d - sigma * c) / determinant * output + (c * b - d * a) / determinant * x


def _form(quantity: str, alpha: Tensor, sigma: Tensor, rates: Rates) -> tuple[Any, Any]:
    """(a, b) of a x_0 + b ε."""
    if quantity not in QUANTITIES:
        raise ValueError(f"unknown quantity {quantity!r}: choose {', '.join(QUANTITIES)}")
    if quantity == "score":
        return 0.0, -1 / sigma
    return {"sample": (1.0, 0.0), "epsilon": (0.0, 1.0), "v": (-sigma, alpha), "flow": rates}[quantity]


def forward_sde(alpha: Tensor, sigma: Tensor, rates: Rates) -> tuple[Tensor, Tensor]:
    """f and g² of dx = f x dt + g dw, from α, σ and their derivatives."""
    f = rates[0] / alpha
    return f, 2 * sigma * (rates[1] - f * sigma)


def reverse_drift(x: Tensor, score: Tensor, f: Tensor, g2: Tensor, eta: float) -> Tensor:
    """f x - (1 + η²)/2 g² ∇log p_t, beside noise η g: dx/dt where t falls."""
    return f * x - 0.5 * (1 + eta**2) * g2 * score
