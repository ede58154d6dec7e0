"""States come home: they stay where they were made until there is a spare moment, or somebody needs them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from treesearch.core.tree import Tree
from treesearch.distributed import bundling
from treesearch.distributed.bundles import as_tensor
from treesearch.distributed.leases import FETCH_SECONDS
from treesearch.distributed.stats import Figures
from treesearch.engine.segments import Ids
from treesearch.engine.states import StateStore
from treesearch.interrupts import interrupts_deferred

log = logging.getLogger("treesearch")


class Landing:
    """States of rows that have arrived, on their way into the store.

    Args:
        trees, states, dtype: of the search.
        figures: count the bytes.
        path: computes the state of a node of a task again, from a stored ancestor or the prior.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        states: StateStore,
        dtype: torch.dtype,
        figures: Figures,
        path: Callable[[int, int, int], torch.Tensor],
    ) -> None:
        self.trees, self.states, self.dtype, self.figures, self.path = trees, states, dtype, figures, path
        self._queue: deque[tuple[Any, Ids, Ids]] = deque()  # references to states, and the (task, node) of each

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, ref: Any, task: Ids, node: Ids) -> None:
        """Take the states of a bundle: where they are, and whose they are, (k,)."""
        if len(node):
            self._queue.append((ref, task, node))

    @interrupts_deferred()
    def settle(self) -> None:
        """Bring home all of them."""
        while self._queue:
            self.land()

    def land(self) -> None:
        """Bring home those of one bundle."""
        ref, owner, nodes = self._queue.popleft()
        try:
            states: Any = ray.get(ref, timeout=FETCH_SECONDS)
        except (RayError, GetTimeoutError) as error:
            log.warning("states of %d nodes were lost (%s): computed again", len(nodes), type(error).__name__)
            self._compute_again(owner, nodes)
            return
        self.figures.bytes_in += states.nbytes
        slots = self.states.put(as_tensor(states, self.dtype))
        for i in np.unique(owner):
            self.trees[i].slot[nodes[owner == i]] = slots[owner == i]

    def _compute_again(self, owner: Ids, nodes: Ids) -> None:
        """States whose rewards are known and that were lost with a machine."""
        for task, node in sorted(zip(owner.tolist(), nodes.tolist(), strict=True)):
            tree = self.trees[task]
            tree.slot[node] = self.states.put(self.path(task, node, bundling.nearest(tree, node))[None])[0]
