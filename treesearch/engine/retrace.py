"""States computed again: from a node's key and the state above it, where they were not stored or were lost."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from treesearch.budget import Cost
from treesearch.core.tree import NONE, ROOT
from treesearch.engine.flight import by_task, cat
from treesearch.engine.model import Model
from treesearch.engine.segments import Ids, Ledger, Leg, Nodes, leg
from treesearch.engine.states import StateStore, recovered


class Retracer:
    """Finds the states of nodes, and walks to those that are not stored.

    Args:
        model: walks.
        states: where the states of nodes are kept.
        cost: counts the walks.
    """

    def __init__(self, model: Model, states: StateStore, cost: Cost) -> None:
        self.model, self.states, self.cost = model, states, cost

    def fetch(self, trees: Nodes, task: Ids, nodes: Ids) -> Tensor:
        """States of nodes (n, *state), whose tasks stand in order; those that were lost count as never stored."""
        return recovered(lambda: self._gather(trees, task, nodes), [trees[i].slot for i, _ in by_task(task)])

    def _gather(self, trees: Nodes, task: Ids, nodes: Ids) -> Tensor:
        """States of nodes, recomputed along their path where they are not stored.

        Raises:
            LostStates: some that should be stored are not.
        """
        slot = np.concatenate([trees[i].slot[nodes[part]] for i, part in by_task(task)])
        if (slot != NONE).all():
            return self.states.get(slot)
        return cat([self._of_task(i, trees[i], nodes[part]) for i, part in by_task(task)])

    def _of_task(self, task: int, tree: Ledger, nodes: Ids) -> Tensor:
        """States of nodes of one task, recomputed where they are not stored."""
        missing, device = sorted(_missing(tree, nodes)), self.model.spec.device
        if not missing:
            return self.states.get(tree.slot[nodes]).to(device)
        found: dict[int, Tensor] = {}
        for node in missing:  # parents have smaller numbers, so they come first
            above = int(tree.parent[node])
            x = found.get(above)
            if x is None and above != ROOT:
                x = self.states.get(tree.slot[[above]])[0]
            found[node] = self.walk(task, tree, node, x)
        stored = {int(n): self.states.get(tree.slot[[n]])[0].to(device) for n in nodes if tree.slot[n] != NONE}
        return torch.stack([found[n] if n in found else stored[n] for n in map(int, nodes)])

    def path(self, task: int, tree: Ledger, node: int, above: int) -> Tensor:
        """The state of a node, computed again from the stored state of its ancestor `above` or (the root) the prior."""
        nodes = [node]
        while (parent := int(tree.parent[nodes[-1]])) != above:
            nodes.append(parent)
        x = None if above == ROOT else self.states.get(tree.slot[[above]])[0]
        for step in reversed(nodes):
            x = self.walk(task, tree, step, x)
        assert x is not None
        return x

    def walk(self, task: int, tree: Ledger, node: int, x: Tensor | None) -> Tensor:
        """Run the edge to a node again, from its parent's state or the prior; one row at a time."""
        return retrace(self.model, task, leg(tree, node, self.model.spec.num_steps), x, self.cost)


def retrace(model: Model, task: int, leg: Leg, x: Tensor | None, cost: Cost) -> Tensor:
    """The state at the end of a leg, from the state x at its beginning or, above level T, from the prior.

    Args:
        model: walks, one row at a time.
        task: whose conditioning the row has.
        leg: the way.
        x: one state (*state), None above level T.
        cost: counts the evaluations, as done again.
    """
    level, key = min(leg.level, model.spec.num_steps), np.array(leg.keys[-1:], np.uint64)
    if leg.level > model.spec.num_steps:
        row = model.prior(np.array([task]), model.lineage_noise(np.array(leg.keys, np.uint64))[None])[0]
    else:
        assert x is not None
        row = x[None].to(model.spec.device)
    for t in range(level, leg.end, -1):
        at = np.array([t])
        law, padding = model.evaluate(row, at, np.array([task]))
        model.charge(cost, at, np.array([True]), padding)
        row, _ = model.draw(law, key, at)
    return row[0]


def _missing(tree: Ledger, nodes: Ids) -> set[int]:
    """Nodes without a stored state on the paths from their nearest stored ancestors."""
    missing: set[int] = set()
    for node in map(int, nodes):
        while node != ROOT and tree.slot[node] == NONE and node not in missing:
            missing.add(node)
            node = int(tree.parent[node])
    return missing
