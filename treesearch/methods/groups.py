"""Groups of populations or descents that run side by side, as a run folder keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def packed(groups: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Sizes by group as [size, how many of it] of neighbours alike."""
    return [[[size, len(list(same))] for size, same in groupby(sizes)] for sizes in groups]


def unpacked(group: Sequence[Sequence[int]]) -> list[int]:
    """The sizes of one group again."""
    return [size for size, count in group for _ in range(count)]
