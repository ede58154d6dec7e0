"""Two-phase sampling: a cheap draft of every candidate, a chance to be finished by what it shows, and Ẑ without bias.

A wave of N candidates i has log-weights u_i = λ d_i of the drafts, and w_i = exp(λ r_i) Π p/q of the finished samples.
K of them are finished (I_i = 1), i with probability π_i in [floor, 1]:

    Ẑ_k = (1/N) Σ T_i,   T_i = m(u_i) + I_i (w_i - m(u_i)) / π_i          the difference estimator
    Ẑ   = Σ α_k Ẑ_k / Σ α_k

With m = 0 it is Horvitz and Thompson's. With m close to E[w | u] it is two-level Monte Carlo: the mean of m over many
drafts, and a correction from the pairs.

Unbiased. Let F be all that was seen in waves before. m and π's shape depend on F and the wave's drafts, the choice on
them and on one uniform more, which chooses i with probability π_i > 0. Hence

    E[Ẑ_k | F, candidates] = (1/N) Σ m_i + π_i (w_i - m_i) / π_i = (1/N) Σ w_i,        E[Ẑ_k | F] = Z,

the candidates being draws of p that F knows nothing of. N may depend on F. α_k may not, for then E[Σ α_k Ẑ_k / Σ α_k]
would weigh Ẑ_{k-1} by what it was: here it follows from what the wave may spend, which is planned before anything is
drawn. So K is fixed by N, and the choice is systematic: π_i laid end to end, in order of u, a comb of distance one over
them. A wave spends what was planned, whatever it finds.

Variance. S² = Σ (T_i - T̄)² / (N (N - 1)). Terms are exchangeable, E[S²] = Var(Ẑ_k) - c with c the covariance of two of
them. Given the drafts finished weights are independent, of means μ_i = E[w | u_i] - m_i off the fit, so

    N (N - 1) c = E[ Var(Σ I_i μ_i / π_i | drafts) - Σ μ_i² (1 - π_i) / π_i ]

what a systematic choice leaves of the misfit, less what independent ones would. In order of u that is less than nothing
where μ/π is smooth, and nothing where m fits or all are finished: S² is right or too large.

Optimal π. One candidate costs c_d + c_f E[π]. N times the variances of Ẑ_k and of a weighted sum of draws are

    Var(w) + E[(1/π - 1) (w - m)²]   and   E[w²/π],     together A + E[s²/π],   s² = E[w² + (w - m)² | u]

up to Z². Their product with the price is least at π = min(1, h s) for some h (Neyman, 1938), here with a floor, which
bounds what a wrong s can cost by 1/floor (Hesterberg). h is found on the drafts seen, with A, m and s from the pairs of
earlier waves, weighed by 1/π: m(u) = b exp f(u), f the soft value of `treesearch.core.values`, b the regression of w on
exp f, cut to where E[m] is in [0, Ẑ]; s = κ exp f, κ from the pairs. Where no h beats finishing everything without
drafts by a tenth, there are no drafts.

Sources: Contribution to the Theory of Sampling Human Populations (Neyman, 1938), double sampling. A Generalization of
Sampling Without Replacement from a Finite Universe (Horvitz and Thompson, 1952). Model Assisted Survey Sampling
(Särndal, Swensson and Wretman, 1992), section 6.3, the difference estimator. Multilevel Monte Carlo Path Simulation
(Giles, 2008). Weighted average importance sampling and defensive mixture distributions (Hesterberg, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core import values
from treesearch.core.values import Value
from treesearch.core.weights import F64, log_mean, log_sum

Ids = NDArray[np.int64]

SLOPE = 0.5  # of log E[w | u] before there are pairs
STEPS = 60  # values of h that are tried, and halvings of an interval
SPAN = 12.0  # log of their range on either side
WORTH = 0.9  # of the loss without drafts, above which they are not made: pairs are few
FEWEST = 8  # finished samples that carry weight, below which nothing is learnt from pairs


class Pairs(NamedTuple):
    """Finished candidates.

    Args:
        u: log-weights of their drafts, (n,).
        log_w: their own.
        log_mass: log of what each stands for, 1/π up to a factor of its wave.
    """

    u: F64
    log_w: F64
    log_mass: F64


@dataclass(frozen=True)
class Fit:
    """What a draft says of the weight.

    Args:
        value: f.
        log_m: log of m / exp f; -inf for m = 0.
        log_s: log of s / exp f.
        log_rest: log A, what no π changes.
    """

    value: Value
    log_m: float
    log_s: float
    log_rest: float

    def m(self, u: F64) -> F64:
        """log m(u), (n,)."""
        return self._of(u) + self.log_m

    def s(self, u: F64) -> F64:
        """log s(u), (n,)."""
        return self._of(u) + self.log_s

    def _of(self, u: F64) -> F64:
        """f; a draft that is forbidden says that the weight is 0."""
        dead = u == -math.inf
        return np.where(dead, -math.inf, self.value.fitted(np.where(dead, 0.0, u)))


def fit(pairs: Pairs) -> Fit | None:
    """m, s and A from pairs; None where too few carry weight or weights do not differ."""
    u, log_w, log_mass = pairs
    known = (log_w > -math.inf) & (u > -math.inf)
    if known.sum() < FEWEST or log_w.min() == log_w.max():
        return None
    value = values.fit(u, log_w, log_w + log_mass, log_mass, SLOPE)
    mass = np.exp(log_mass - log_sum(log_mass))
    guess = np.where(u > -math.inf, value.fitted(np.where(u > -math.inf, u, 0.0)), -math.inf)
    unit = float(log_w.max()), float(guess.max())  # at large λ either may be nothing beside the other
    w, g = np.exp(log_w - unit[0]), np.exp(guess - unit[1])
    mean_w, mean_g = float(mass @ w), float(mass @ g)
    spread, var = float(mass @ (g - mean_g) ** 2), float(mass @ (w - mean_w) ** 2)
    slope = float(mass @ ((g - mean_g) * (w - mean_w))) / spread if spread > 0 else 0.0
    slope = min(max(slope, 0.0), mean_w / mean_g)
    left = float(mass @ (w - slope * g) ** 2)
    size = math.sqrt((float(mass @ w**2) + left) / float(mass @ g**2))
    with np.errstate(divide="ignore"):
        log_m, log_s, log_rest = np.log([slope, size, max(var - left, 0.0)])
    apart = unit[0] - unit[1]
    return Fit(value, float(log_m) + apart, float(log_s) + apart, float(log_rest) + 2 * unit[0])


def chances(log_s: F64, count: float, floor: float) -> F64:
    """π (n,) = h s within [floor, 1], of sum `count`; h by bisection.

    Raises:
        ValueError: no such h: `count` is outside floor n .. n.
    """
    n = len(log_s)
    if not floor * n <= count * (1 + 1e-9) <= n * (1 + 2e-9):
        raise ValueError(f"{count} of {n} finished, expected {floor:g} to 1 of them")
    top = float(log_s.max())
    if count >= n or top == -math.inf:
        return np.full(n, min(count / n, 1.0))
    shape = np.exp(log_s - top)
    low, high = math.log(floor), -float(np.log(np.maximum(shape, 1e-300)).min()) + 1e-9
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if within(shape, middle, floor).sum() < count else (low, middle)
    return within(shape, high, floor)


def within(shape: F64, log_h: float, floor: float) -> F64:
    """h s within [floor, 1]."""
    return np.clip(np.exp(np.minimum(log_h + np.log(np.maximum(shape, 1e-300)), 0.0)), floor, 1.0)


def systematic(pi: F64, u: F64, uniform: float) -> tuple[Ids, F64]:
    """Who is finished, in increasing order, and π (n,) as the comb has it: `pi` rounded to a whole sum.

    Args:
        pi: (n,), of nearly whole sum.
        u: order in which they are laid end to end.
        uniform: in [0, 1), the offset of the comb.
    """
    order = np.argsort(u, kind="stable")
    ends = np.cumsum(pi[order])
    count = max(1, round(float(ends[-1])))
    ends = np.minimum(ends * (count / ends[-1]), count)
    ends[-1] = count
    teeth = np.floor(ends - uniform) - np.floor(np.append(0.0, ends[:-1]) - uniform)
    exact = np.empty(len(pi))
    exact[order] = np.diff(ends, prepend=0.0)
    return np.sort(order[teeth > 0]), np.minimum(exact, 1.0)


def share(found: Fit, u: F64, floor: float, price: Callable[[float | None], float]) -> float | None:
    """Share of the candidates to finish, E[π] of the least variance for its price; None where drafts do not pay.

    Args:
        found: from earlier waves.
        u: drafts seen (n,).
        floor: least π.
        price: of a candidate that is finished with a given probability; None for one without a draft.
    """
    log_s = found.s(u)
    unit = 0.5 * log_mean(2 * log_s)  # so that the mean square is 1
    shape, rest = np.exp(log_s - unit), math.exp(min(found.log_rest - 2 * unit, 700.0))
    best, least = None, WORTH * price(None) * (rest + 1)
    for log_h in np.linspace(-SPAN, SPAN, 2 * STEPS + 1):
        pi = within(shape, log_h, floor)
        loss = price(float(pi.mean())) * (rest + float(np.mean(shape**2 / pi)))
        if loss < least:
            best, least = float(pi.mean()), loss
    return best


class Terms(NamedTuple):
    """T of a wave's candidates, in units of exp(log_unit).

    Args:
        log_unit: log of their unit.
        values: (N,).
    """

    log_unit: float
    values: F64

    @property
    def mean(self) -> float:
        """Ẑ_k in these units."""
        return float(self.values.mean())


def terms(log_m: F64, log_w: F64, pi: F64, finished: Ids) -> Terms:
    """T_i.

    Args:
        log_m: log m (N,).
        log_w: log-weights of the finished ones (K,).
        pi: chances (N,).
        finished: who they are (K,).
    """
    top = max(float(np.max(log_m, initial=-math.inf)), float(np.max(log_w, initial=-math.inf)))
    if top == -math.inf:
        return Terms(0.0, np.zeros(len(pi)))
    found = np.exp(log_m - top)
    found[finished] += (np.exp(log_w - top) - found[finished]) / pi[finished]
    return Terms(top, found)


class Estimate(NamedTuple):
    """Ẑ of several waves.

    Args:
        log_z: log Ẑ; NaN where Ẑ < 0, -inf where it is 0.
        apart: deviations of each wave's terms as shares of Ẑ, whose sum of squares is the relative variance.
        relative: Ẑ in units of the largest term's.
        error: its standard error in the same unit.
    """

    log_z: float
    apart: F64
    relative: float
    error: float


def combine(waves: list[Terms], shares: F64) -> Estimate:
    """Ẑ = Σ share_k Ẑ_k, with the deviations that its variance is the sum of squares of."""
    unit = max(wave.log_unit for wave in waves)
    weights = [s * math.exp(wave.log_unit - unit) for wave, s in zip(waves, shares, strict=True)]
    z = sum(weight * wave.mean for wave, weight in zip(waves, weights, strict=True))
    apart = np.concatenate([weight * _apart(wave.values) for wave, weight in zip(waves, weights, strict=True)])
    log_z = math.log(z) + unit if z > 0 else (-math.inf if z == 0 else math.nan)
    return Estimate(log_z, apart / z if z > 0 else apart, z, float(np.linalg.norm(apart)))


def _apart(values: F64) -> F64:
    """Deviations from the mean whose sum of squares is S²; of a lone term all of it."""
    n = len(values)
    return (values - values.mean()) / math.sqrt(n * (n - 1)) if n > 1 else values


def shares(sizes: NDArray[np.int64]) -> F64:
    """α_k / Σ α from the planned sizes of waves: differences of cumulated sizes to the power 3/2.

    Source: The square root rule for adaptive importance sampling (Owen and Zhou, 2020).
    """
    total = np.cumsum(sizes) ** 1.5
    return np.diff(total, prepend=0.0) / total[-1:]
