"""Sub-grids of a chain: the levels that a draft leaps between, spaced alike whatever the schedule.

    τ_t = n_t^{4/3}/(n_t^{4/3} + 2^{4/3}),   n = σ/α              0 for data, 1 for noise, 1/2 where n = 2
    levels nearest to τ_T k/m,   k = m, ..., 1;   and 0

So log n has the quantiles of a logistic law around log 2, of scale 3/4: few evaluations go where x̂_0 is the mean of the
data or hardly moves, and most where a sample is decided. The two numbers are fitted to no kernel alone
(`experiments.drafts`); n is in units of data of spread about 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from treesearch.rewards.numeric import is_whole

CENTRE, POWER = 2.0, 4 / 3
DIGITS = 6  # of τ, which runs record


def time_of(alpha: float, sigma: float) -> float:
    """τ of a level."""
    signal, noise = (CENTRE * alpha) ** POWER, sigma**POWER
    return round(noise / (noise + signal), DIGITS)


def subgrid(times: Sequence[float], evaluations: int) -> tuple[int, ...]:
    """Levels of a draft from T, descending, 0 last: as many as evaluations.

    Args:
        times: τ of levels 0..T, which rises.
        evaluations: m.

    Raises:
        ValueError: fewer than 2 evaluations, or more than the chain has.
    """
    steps = len(times) - 1
    if not is_whole(evaluations, 2, steps):
        raise ValueError(
            f"a draft of {evaluations!r} evaluations, expected 2..T = {steps}: one alone is the endpoint, which "
            "methods score without a draft"
        )
    found = [steps]
    for k in range(evaluations - 1, 0, -1):
        wanted = times[-1] * k / evaluations
        nearest = min(range(steps, 0, -1), key=lambda t: abs(times[t] - wanted))
        found.append(max(k, min(nearest, found[-1] - 1)))
    return (*found, 0)


def prices(times: Sequence[float], evaluations: int, ratio: float, *, held: bool = False) -> tuple[int, ...]:
    """NFE that a draft from each level 0..T is charged: its evaluations times what one costs, rounded up.

    Args:
        times, evaluations: as for `subgrid`.
        ratio: what one costs.
        held: whether the first of them has been made.
    """
    inner = subgrid(times, evaluations)[1:-1]
    counts = [0, *(1 + sum(level < t for level in inner) for t in range(1, len(times)))]
    return tuple(math.ceil(round(ratio * max(0, count - held), 6)) for count in counts)
