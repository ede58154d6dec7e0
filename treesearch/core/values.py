"""Soft values from endpoint rewards, fitted to samples that are already there.

At level t a state's endpoint has the reward r̂ = r(x̂_0(x_t)), and u = λ r̂ says something about λ V_t, but less the
noisier the state is: V_t(x) = (1/λ) log E[exp(λ r(x_0)) | x_t = x] follows u with a slope from 0 (all noise) to 1 (no
noise left). A fit is

    λ V̂_t(x) = f(u) + constant,   f non-decreasing, piecewise linear, slope at most 1
    twist     ψ_t(x) = log(δ + (1 - δ) exp(λ V̂_t(x)) / E_p[exp(λ V̂_t)])

from particles with u_i, y_i = λ r(x_0^i) of their descendants, and weights. Weights tempered to an effective size e
stand between p and π, where the fit has to serve. Under them, with prior slope κ_t = (1 - t/T)² of variance .5²:

    line       slope = (κ_t/.5² + ρ b) / (1/.5² + ρ),  b = Cov(u, y)/Var(u),  ρ = e Var(u) / Var(y - b u)
    bends      means of y - line in min(8, e/10) bins of equal weight, shrunk together (positive-part James-Stein)
    order      isotonic regression, then steps cut to slope 1; beyond the outer bins the slope is κ_t

Conditional means of y under tempered weights stand for log-mean-exps, which have the same slope where the spread of y
around f does not depend on u, and a far smaller error: the heavy tail of exp(y) never enters. The constant does not
matter to a population; δ = .1 does: a twist then never prunes a state by more than the factor δ below the average,
which a wrong fit must not cost (defensive importance sampling). Whatever ψ is, a population that is weighed by its
differences has an unbiased Ẑ, as long as ψ is fitted to the past alone.

Sources: Weighted average importance sampling and defensive mixture distributions (Hesterberg, 1995), for δ. Data
analysis using Stein's estimator (Efron and Morris, 1975). Isotonic regression: Statistical Inference under Order
Restrictions (Barlow et al., 1972). Twists fitted to past populations: The Iterated Auxiliary Particle Filter
(Guarniero, Johansen and Lee, 2017), here one-dimensional. The rest, and the constants, are this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from treesearch.core.weights import F64, ess, log_sum, normalise, temper

FLOOR = 0.1  # δ
SLOPE_SD = 0.5
BINS, EACH = 8, 10.0  # most bins, and effective particles in each
LEAST, SHARE = 32.0, (0.1, 0.9)  # effective size that tempering keeps: at least, and as shares of all particles


def prior_slope(t: int, num_steps: int) -> float:
    """κ_t = (1 - t/T)²."""
    return (1 - t / num_steps) ** 2


@dataclass(frozen=True)
class Value:
    """λ V̂ of one level as a function of u = λ r̂.

    Args:
        knots, heights: points of f, increasing and non-decreasing.
        outside: slope beyond them.
        floor: δ; 0 for none.
    """

    knots: F64
    heights: F64
    outside: float
    floor: float = FLOOR

    @classmethod
    def guess(cls, slope: float) -> Value:
        """A line through 0 without a floor, where nothing is known yet."""
        return cls(np.zeros(1), np.zeros(1), slope, 0.0)

    def fitted(self, u: F64) -> F64:
        """f (n,)."""
        inside = np.interp(u, self.knots, self.heights)
        return inside + self.outside * (u - np.clip(u, self.knots[0], self.knots[-1]))

    def twist(self, u: F64) -> F64:
        """ψ (n,), for heights on the scale of `fit`: E_p[exp f] = 1."""
        f = self.fitted(u)
        return f if self.floor == 0 else np.logaddexp(math.log(self.floor), f + math.log1p(-self.floor))

    @property
    def slope(self) -> float:
        """Mean slope between the outer knots, that beyond them where there is one knot."""
        rise, run = self.heights[-1] - self.heights[0], self.knots[-1] - self.knots[0]
        return float(rise / run) if run > 0 else self.outside


def tempered(log_w: F64) -> tuple[F64, float]:
    """Weights ∝ w^a, a in [0, 1] the largest that keeps the effective size, and that size."""
    alive = log_w > -math.inf
    target = min(max(LEAST, SHARE[0] * len(log_w)), SHARE[1] * int(alive.sum()))
    power = temper(lambda a: a * log_w[alive], 0.0, 1.0, target)
    weights = np.zeros(len(log_w))
    weights[alive] = normalise(power * log_w[alive])
    return weights, ess(power * log_w[alive])


def fit(u: F64, y: F64, log_w: F64, log_p: F64, slope: float) -> Value:
    """A level's value.

    Args:
        u: λ r̂ of particles, (n,); -inf where the endpoint says nothing.
        y: λ r of what became of them, (n,).
        log_w, log_p: their log-weights for π and for p, (n,).
        slope: κ of the level.
    """
    known = (u > -math.inf) & np.isfinite(y)
    if known.sum() < 2 or (log_w[known] > -math.inf).sum() < 2:
        return Value.guess(slope)
    u, y, log_w, log_p = u[known], y[known], log_w[known], log_p[known]
    w, effective = tempered(log_w)
    centre = float(w @ u), float(w @ y)
    du, dy = u - centre[0], y - centre[1]
    unit = max(1.0, _norm(du, w), _norm(dy, w))  # rewards beyond 1e154 have no squares
    line, rest = _line(du / unit, dy / unit, w, effective, slope)
    knots, bends = _bends(u, rest, w, effective)
    if len(knots) < 2:
        value = Value(np.array([centre[0]]), np.zeros(1), line)
    else:
        value = Value(knots, _ordered(knots, line * (knots - centre[0]) + unit * bends), slope)
    level = log_sum(log_p + value.fitted(u)) - log_sum(log_p)
    return Value(value.knots, value.heights - level, value.outside)


def _norm(x: F64, w: F64) -> float:
    """√(Σ w x²) without squares that overflow."""
    top = float(np.abs(x).max())
    return top * math.sqrt(float(w @ (x / top) ** 2)) if top > 0 else 0.0


def _line(du: F64, dy: F64, w: F64, effective: float, slope: float) -> tuple[float, F64]:
    """Slope in [0, 1] between the data's and the prior's, and what the line leaves over."""
    root = np.sqrt(w)
    u, y = root * du, root * dy
    spread = float(u @ u)
    if spread <= 1e-12 * max(1.0, float(y @ y)):
        return slope, dy - slope * du
    own = float(u @ y) / spread
    left = max(float(np.sum((y - own * u) ** 2)), 1e-6 * float(y @ y), 1e-12)
    data, prior = effective * spread / left, SLOPE_SD**-2
    line = min(max((data * own + prior * slope) / (data + prior), 0.0), 1.0)
    return line, dy - line * du


def _bends(u: F64, rest: F64, w: F64, effective: float) -> tuple[F64, F64]:
    """Weighted mean of u in each bin of equal weight, and the shrunk mean of what the line leaves over."""
    count = int(min(BINS, effective / EACH))
    if count < 2:
        return np.empty(0), np.empty(0)
    order = np.argsort(u, kind="stable")
    at = np.minimum((np.cumsum(w[order]) * count).astype(np.int64), count - 1)
    mass = np.bincount(at, w[order], count)
    full = mass > 1e-9
    knots = np.bincount(at, (w * u)[order], count)[full] / mass[full]
    bends = np.bincount(at, (w * rest)[order], count)[full] / mass[full]
    apart = np.append(True, np.diff(knots) > 1e-9 * (1 + np.abs(knots[1:])))
    knots, bends = knots[apart], bends[apart]
    noise = float(np.sum((w * rest) ** 2)) * len(knots)  # variance of a bin's mean
    size = float(bends @ bends)
    return knots, bends * max(0.0, 1.0 - len(bends) * noise / size) if size > 0 else bends


def _ordered(knots: F64, heights: F64) -> F64:
    """Non-decreasing and of slope at most 1."""
    rises = np.minimum(np.diff(isotonic(heights)), np.diff(knots))
    return np.concatenate([[0.0], np.cumsum(rises)])


def isotonic(y: F64) -> F64:
    """The closest non-decreasing sequence: pool adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in y:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
