"""Samples of a tree's nodes: their states as they are stored, computed again where they are not, and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Kernel, Spec
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.engine.asking import decode, without_graph
from treesearch.engine.states import StateStore, recovered
from treesearch.session.interfaces import Runner


@dataclass(frozen=True)
class Fetch:
    """Decodes nodes of one tree, in batches; states that were lost are computed again.

    Args:
        task: number of the tree.
        trees: all of them.
        batch_size: nodes decoded together.
    """

    task: int
    trees: Sequence[Tree]
    kernel: Kernel
    spec: Spec
    engine: Runner
    states: StateStore
    batch_size: int

    @without_graph()
    def raw(self, nodes: NDArray[np.int64]) -> Tensor:
        """States (n, *state) of nodes, as they are, on the CPU."""
        return recovered(lambda: self._stored(nodes), [tree.slot for tree in self.trees]).cpu()

    @without_graph()
    def __call__(self, nodes: NDArray[np.int64]) -> Any:
        size, parts = self.batch_size, []
        for at in range(0, max(len(nodes), 1), size):
            some = nodes[at : at + size]
            x = recovered(lambda some=some: self._stored(some), [tree.slot for tree in self.trees])
            parts.append(decode(self.kernel, x.to(self.spec.device)))
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [item for part in parts for item in part]

    def _stored(self, nodes: NDArray[np.int64]) -> Tensor:
        """States of nodes; those that are not stored are computed again from their keys.

        Raises:
            LostStates: some that should be stored are not.
        """
        tree = self.trees[self.task]
        kept = tree.slot[nodes] != NONE
        found = self.states.get(tree.slot[nodes[kept]])
        if kept.all():
            return found
        out = found.new_empty((len(nodes), *self.spec.state_shape))
        out[torch.from_numpy(kept)] = found
        for i in np.flatnonzero(~kept):
            above = int(tree.parent[nodes[i]])
            while above != ROOT and tree.slot[above] == NONE:
                above = int(tree.parent[above])
            out[int(i)] = self.engine.path(self.task, int(nodes[i]), above).to(out.device)
        return out
