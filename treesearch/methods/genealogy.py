"""How sure a search is of its Ẑ: what is independent in it, and what its steering may have lost.

The independent parts of a search are the draws of x_T. Let c_e be the share of Ẑ that descends from draw e of a
population of K, c̄ their mean there, and d = √(K/(K-1)) (c - c̄) over all populations. Where there are at least as many
populations of a size as particles in one, their shares are the terms instead, so that nothing is asked of a small K.

    V = Σ d² - m/K Σ share²   relative variance of Ẑ after m multinomial resamplings of K (Lee and Whiteley, 2018, eq.
                    9, to first order; at least Σ d²/4). Schemes of lower variance lose fewer lineages than they are
                    allowed for; with m = 0 in their place V is an over-estimate as a rule (measured on the Gaussian
                    chain, K = 100, resampling at every level: 1.6 times the variance for systematic, 3.1 residual).
                    Where nothing was resampled it is that of independent weights.
    ν = 2 / (Σ d⁴/V² - 1/n)            degrees of freedom of V: few totals say little about their spread (Satterthwaite)
    γ = Σ d³ / V^{3/2}                 skewness: where a long tail was hardly met, Ẑ is low and V small together

    low  = log Ẑ - t_ν √V
    high = log Ẑ + max(t_ν √V, log(1 + h √V)),   h = 3/γ (1 - ³√(1 - γ (t_ν + γ/6)))          (Hall, 1992)

In the interval V, ν and γ suppose one more term like the largest of d: a tail shows itself late, and the next draw may
be of it. The standard error that is reported does not.

Steering. A search that prunes by ψ samples p exp(ψ), and what it should have sampled is p exp(λ V). Along the lineages
that survive, λ r(x_0) is regressed on ψ; the slope b says how much of ψ was true, and

    lost = (1 - min(b, 1)) sd(ψ)     over the population as it was before it was pruned, in nats

is the spread of the log-weights that would undo the rest. Where ψ promised what did not come, good samples were
pruned before anyone saw what they were worth: no spread among the survivors shows that. Whatever moves draws counts:
potentials, twists, and a guide's log q/p.

Sources: Variance estimation in the particle filter (Lee and Whiteley, 2018). On the removal of skewness by
transformation (Hall, 1992). An approximate distribution of estimates of variance components (Satterthwaite, 1946). The
measure of steering and all limits are this project's; docs/certificate.md has what they were made on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.citations import Paper
from treesearch.core import pareto
from treesearch.core.weights import F64, ess, log_sum, normalise
from treesearch.methods.claims import Interval, Standing, t95

LEE_WHITELEY = Paper(
    "article",
    "lee2018variance",
    "Variance estimation in the particle filter",
    "Lee, Anthony and Whiteley, Nick",
    "Biometrika",
    2018,
)

Ids = NDArray[np.int64]

FEWEST = 10  # lineages that carry weight, below which there is no interval
ENOUGH = 10.0  # effective lineages, below which an interval is not relied on
HEAVIEST = 1.0  # Pareto k̂ from which on the totals have no mean
LEAST_LEFT = 0.25  # of Σ d² after the correction for multinomial resampling, which is right on average only
MOST_LOST = 0.2  # nats of steering
ROUNDING = 1e-12
GENEALOGY = "genealogy of the particles (Lee and Whiteley, 2018)"
INDEPENDENT = "independent weights"


@dataclass
class Genealogy:
    """Where the members of one population come from, and what pruned it.

    Args:
        eve: the draw of the first level each descends from, (K,).
        psi: ψ at each level that resampled, (K,), of those whose lineage is alive.
        spread: standard deviation of ψ over the population before it did.
        multinomial: how many of these resamplings were by independent draws.
    """

    eve: Ids
    psi: dict[int, F64] = field(default_factory=dict)
    spread: dict[int, float] = field(default_factory=dict)
    multinomial: int = 0

    @classmethod
    def of(cls, k: int) -> Genealogy:
        """K draws, nothing pruned yet."""
        return cls(np.arange(k))

    def resample(self, level: int, ancestors: Ids, psi: F64, weights: F64) -> None:
        """Follow the ancestors (K,) that were chosen by `weights` for a target that ψ (K,) tilts."""
        self.spread[level] = _spread(psi, weights)
        self.psi = {t: row[ancestors] for t, row in (self.psi | {level: psi}).items()}
        self.eve = self.eve[ancestors]


class Part(NamedTuple):
    """One population of an estimate Ẑ = Σ exp(log_w) over all parts.

    Args:
        log_w: (K,).
        u: λ r(x_0), (K,).
        open: log-weights since the last resampling, (K,).
        past: its genealogy.
        limit: how much its steering may have lost.
    """

    log_w: F64
    u: F64
    open: F64
    past: Genealogy
    limit: float = MOST_LOST


def independent(log_w: F64, u: F64 | None = None) -> Part:
    """Samples with weights of their own (n,); without λ r (n,) nothing is known of what moved them."""
    return Part(log_w - math.log(len(log_w)), log_w if u is None else u, log_w, Genealogy.of(len(log_w)))


def interval(parts: Sequence[Part], doubt: str = "", *, alike: bool = False) -> Interval:
    """The interval of log Ẑ, Ẑ > 0, and whether to rely on it.

    Args:
        parts: independent of each other.
        doubt: a reason not to, whatever the parts show.
        alike: the parts are draws of one law, each with an Ẑ of its own weighed by its size.
    """
    log_z = log_sum(np.concatenate([part.log_w for part in parts]))
    shares = [np.bincount(p.past.eve, np.exp(p.log_w - log_z), len(p.log_w)) for p in parts]
    every = np.concatenate(shares)
    source = GENEALOGY if any(p.past.psi for p in parts) else INDEPENDENT
    if alike and len(parts) >= max(map(len, shares)):
        apart, chance = _apart(np.array([float(share.sum()) for share in shares])), 0.0
    else:
        apart = np.concatenate([_apart(share.astype(np.float64)) for share in shares])
        chance = sum(p.past.multinomial * float(s.sum()) ** 2 / len(s) for p, s in zip(parts, shares, strict=True))
    with np.errstate(divide="ignore"):
        totals = np.log(every)
    return stated(source, log_z, apart, totals, chance, lambda found: doubt or found or _misled(parts))


def stated(
    source: str,
    log_z: float,
    apart: F64,
    totals: F64,
    chance: float = 0.0,
    doubted: Callable[[str], str] = lambda found: found,
) -> Interval:
    """The interval of log Ẑ from what is independent in it.

    Args:
        source: where it comes from.
        log_z: log Ẑ.
        apart: deviations d (n,).
        totals: log of the shares of Ẑ that lineages carry, (n,).
        chance: the part of Σ d² that multinomial resampling alone explains.
        doubted: why not to rely on it, from what the totals say against it.
    """
    alive = int(np.count_nonzero(totals > -math.inf))
    if alive < FEWEST:
        reason = f"no standard error: {alive} lineages carry weight, fewer than {FEWEST}; spend more, or lower lam"
        return Interval(source=source, standing=Standing.NONE, reason=reason)
    se, dof, low, high = bounds(log_z, apart, chance)
    k = pareto.k_hat(totals)
    reason = doubted(_thin(totals, k))
    standing = Standing.UNRELIABLE if reason else Standing.OK
    return Interval(source=source, se=se, dof=dof, low=low, high=high, standing=standing, reason=reason, k_hat=k)


def bounds(log_z: float, apart: F64, chance: float = 0.0) -> tuple[float, float, float, float]:
    """Relative standard error of Ẑ, the degrees of freedom of its interval, and the bounds.

    Args:
        log_z: log Ẑ.
        apart: deviations d (n,).
        chance: the part of Σ d² that multinomial resampling alone explains.
    """
    se = _error(apart, chance)
    apart = np.append(apart, apart.max())  # for the interval alone: the standard error is reported as it is
    square, wide = float(apart @ apart), _error(apart, chance)
    if square <= ROUNDING:
        return se, math.inf, log_z - wide, log_z + wide
    scaled = apart / math.sqrt(square)
    dof = 2 / max(float(np.sum(scaled**4)) - 1 / len(apart), ROUNDING)
    t, skew = t95(dof), float(np.sum(scaled**3))
    return se, dof, log_z - t * wide, log_z + max(t * wide, math.log1p(_upwards(t, skew) * wide))


def _error(apart: F64, chance: float) -> float:
    """√V."""
    square = float(apart @ apart)
    return math.sqrt(max(square - chance, LEAST_LEFT * square))


def _apart(shares: F64) -> F64:
    """Deviations from the mean whose sum of squares is right on average."""
    return (shares - shares.mean()) * math.sqrt(len(shares) / max(1, len(shares) - 1))


def _upwards(t: float, skew: float) -> float:
    """h: standard errors from Ẑ up to the bound."""
    if skew <= ROUNDING:
        return t
    return 3 / skew * (1 - math.cbrt(1 - skew * (t + skew / 6)))


def _thin(totals: F64, k: float | None) -> str:
    """Why totals of independent lineages are too few or too uneven; empty where they are not."""
    effective = ess(totals)
    if effective < ENOUGH:
        return f"{effective:.1f} effective lineages, fewer than {ENOUGH:g}: regions without any are missed by Ẑ and se"
    if k is None:
        return f"{len(totals)} lineages, fewer than {pareto.LEAST}: the tail of the weights cannot be judged"
    if k > HEAVIEST:
        return f"Pareto k̂ = {k:.2f} > {HEAVIEST:g}: too heavy a tail of the weights for {len(totals)} lineages"
    return ""


def _misled(parts: Sequence[Part]) -> str:
    """Why what steered the samples may have pruned the target; empty where it did not."""
    found, limit = lost(parts), min(part.limit for part in parts)
    if found <= limit:
        return ""
    return (
        f"steering promised rewards that did not come ({found:.2f} nats > {limit:g}): good samples were pruned before "
        "anything showed their worth; use TreeSampling, or steer less (tempering, a smaller lam of the guide)"
    )


def lost(parts: Sequence[Part]) -> float:
    """Nats of steering that were not true: the most over what moved the samples and over levels that resampled."""
    u = np.concatenate([part.u for part in parts])
    weights = normalise(np.concatenate([part.log_w for part in parts]))
    with np.errstate(invalid="ignore"):  # -inf - -inf of a forbidden sample: not looked at
        moved = np.concatenate([part.u - part.open for part in parts])  # log of the sampling density over p
    found = _lost(u, moved, weights, _spread(moved, np.ones(len(moved))))
    for level in set().union(*(part.past.psi for part in parts)):
        pruned = [part for part in parts if level in part.past.psi]
        rows = np.repeat([level in part.past.psi for part in parts], [len(part.u) for part in parts])
        psi = np.concatenate([part.past.psi[level] for part in pruned])
        spread = float(np.mean([part.past.spread[level] for part in pruned]))
        share = math.sqrt(len(psi) / len(u))  # the others lost nothing there
        found = max(found, share * _lost(u[rows], psi, weights[rows], spread))
    return found


def _lost(u: F64, psi: F64, weights: F64, spread: float) -> float:
    """(1 - min(b, 1)) times the spread; all of it where nothing that carries weight is left to tell b."""
    if spread <= ROUNDING:
        return 0.0
    known = (weights > 0) & np.isfinite(psi)
    w, x, y = weights[known], psi[known], u[known]
    across, along = _spread(x, w), _spread(y, w)
    if across <= ROUNDING * spread or along == 0:
        return spread
    root = np.sqrt(w / w.sum())
    correlation = float((root * (x - root**2 @ x) / across) @ (root * (y - root**2 @ y) / along))
    return (1 - min(correlation * along / across, 1.0)) * spread


def _spread(x: F64, weights: F64) -> float:
    """Weighted standard deviation over what is finite; its squares cannot overflow."""
    known = np.isfinite(x) & (weights > 0)
    if not known.any():
        return 0.0
    w = weights[known] / weights[known].sum()
    apart = x[known] - w @ x[known]
    unit = float(np.abs(apart).max())
    return unit * math.sqrt(float(w @ (apart / unit) ** 2)) if unit > 0 else 0.0
