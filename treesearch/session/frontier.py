"""Which states are kept: of the nodes above t = 0 those that the search can still start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treesearch.core.tree import NONE
from treesearch.engine.states import StateStore
from treesearch.methods.base import Search
from treesearch.session.wave import Wave


class Frontier:
    """Forgets the states that the searches cannot start from any more (keep_states="frontier")."""

    def __init__(self, searches: Sequence[Search], states: StateStore) -> None:
        self.searches, self.states = searches, states
        self._inner: dict[int, NDArray[np.int64]] = {}  # by task: nodes above t = 0 whose states are kept

    def drop(self, wave: Wave) -> None:
        """After a wave. Only nodes that were kept so far and those of this wave are looked at; states that have yet to
        come home wait."""
        for task, _ in wave.work:
            tree, frontier = self.searches[task].tree, self.searches[task].frontier()
            if frontier is None:
                continue
            start, stop = wave.bounds[task]
            new = np.arange(start, stop)[tree.t[start:stop] > 0]
            if task not in self._inner:
                self._inner[task] = np.flatnonzero((tree.t[:start] > 0) & (tree.slot[:start] != NONE))
            nodes = np.concatenate([self._inner[task], new])
            kept, home = np.isin(nodes, frontier), tree.slot[nodes] != NONE
            stale = nodes[~kept & home]
            self.states.drop(tree.slot[stale])
            tree.slot[stale] = NONE
            self._inner[task] = nodes[kept | ~home]
