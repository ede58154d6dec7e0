"""Intervals of log Z, where an honest one exists.

    log Ẑ ± t·se, t the quantile .975 of Student's law        95 % interval, and whether to rely on it

Intervals come from what is independent in a search, the draws of x_T and all that descends from each
(`treesearch.methods.genealogy`): a standard error, degrees of freedom of its own, and an upper bound that allows for a
tail that was hardly met. "ok" asks for ten effective lineages, totals with a mean, and steering whose promises came
true; docs/certificate.md has what that is worth on beds with a known log Z. Other methods state an `Interval`; without
one there is none, and the reason is given.

Source: Monte Carlo theory, methods and examples (Owen, 2013), chapter 9, for self-normalised estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treesearch.methods import genealogy
from treesearch.methods.base import Readout
from treesearch.methods.claims import Claims, Interval, Standing, t95

SKEWED = 0.3  # relative standard error of Ẑ above which an interval of log Z that knows no more is no good


@dataclass(frozen=True)
class LogZ:
    """log E_p[exp(λ r)]: estimate and 95 % interval.

    Args:
        value: log Ẑ, None where there is none.
        se: relative standard error of Ẑ.
        low, high: of the interval, None without one; low may be -inf.
        standing: how far to rely on the interval.
        source: where the interval comes from.
        reason: of every standing but ok.
        k_hat: Pareto k̂ of the totals of lineages.
    """

    value: float | None = None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    standing: Standing = Standing.NONE
    source: str = ""
    reason: str = ""
    k_hat: float | None = None


def log_z(readout: Readout, claims: Claims) -> LogZ:
    """Estimate and interval of log Z from a read-out."""
    value = readout.log_z
    if readout.interval is not None:
        return _stated(value, readout.interval)
    if value is None:
        return LogZ(reason=claims.no_interval if len(readout.leaves) else "no samples yet")
    if value == -math.inf:
        return LogZ(value=value, reason="all weights are zero: no sample says anything about Z")
    if claims.iid:
        return _stated(value, genealogy.interval([genealogy.independent(readout.log_weights)]))
    if readout.log_z_se is not None:
        return _stated(value, Interval(source="standard error of the method", se=readout.log_z_se))
    return LogZ(value=value, reason=claims.no_interval)


def _stated(value: float | None, known: Interval) -> LogZ:
    """The interval of a search that knows its own."""
    low, high, standing, reason = known.low, known.high, known.standing, known.reason
    if known.se is not None and value is not None and low is None and high is None:
        half = t95(known.dof) * known.se
        low, high = value - half, value + half
        if standing == Standing.OK and known.se > SKEWED:
            standing, reason = Standing.UNRELIABLE, _skewed(known.se)
    return LogZ(value, known.se, low, high, standing, known.source, reason, known.k_hat)


def _skewed(se: float) -> str:
    return f"relative standard error {se:.2f} > {SKEWED:g}: the law of log Ẑ is skewed and its error likely larger"
