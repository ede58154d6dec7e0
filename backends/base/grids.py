"""Sub-grids of a chain: the levels at which a draft evaluates the network."""

from __future__ import annotations

import math

from treesearch.rewards.numeric import is_whole


def subgrid(num_steps: int, evaluations: int) -> tuple[int, ...]:
    """Levels of a draft from T, descending, 0 last: as many as evaluations, equally spaced.

    Raises:
        ValueError: fewer than 2 evaluations, or more than the chain has.
    """
    if not is_whole(evaluations, 2, num_steps):
        raise ValueError(
            f"a draft of {evaluations!r} evaluations, expected 2..T = {num_steps}: one alone is the endpoint, which "
            "methods score without a draft"
        )
    return tuple(-(-num_steps * k // evaluations) for k in range(evaluations, -1, -1))


def prices(num_steps: int, evaluations: int, ratio: float) -> tuple[int, ...]:
    """NFE that a draft from each level 0..T is charged: its evaluations times what one costs, rounded up."""
    inner = subgrid(num_steps, evaluations)[1:-1]
    counts = [0, *(1 + sum(level < t for level in inner) for t in range(1, num_steps + 1))]
    return tuple(math.ceil(round(ratio * count, 6)) for count in counts)
