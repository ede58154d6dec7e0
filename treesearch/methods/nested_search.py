"""The search of `treesearch.methods.tree_search`, whose docstring has the formulas: one tree, wave by wave."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core import backup
from treesearch.core.compiled import compiled
from treesearch.core.nested_effects import (
    Law,
    Posterior,
    fit,
    index_of,
    indices,
    masses,
    posterior,
    rewards_at,
    scores,
)
from treesearch.core.noise import child_key
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.methods.base import Ids, Problem, Readout, Search, Spent, Status

if TYPE_CHECKING:
    from treesearch.methods.tree_search import TreeSearch

START = 16  # fresh rollouts before anything else
GROWTH = 1.1  # of the tree between two fits
PRIOR_SHARE = 0.2  # of the variance, resolved by x_T as far as the prior knows; the rest by NFE
MARGIN = 0.1  # improvement that does not count, in standard deviations


@compiled
def _visit(ends: Ids, parent: NDArray[Any], visits: NDArray[Any]) -> None:
    """Count an iteration at each end and all above it."""
    for end in ends:
        node = end
        while node >= 0:
            visits[node] += 1
            node = parent[node]


class NestedSearch(Search):
    """One tree: choose a wave, learn from its rewards."""

    def __init__(self, method: TreeSearch, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.nfe = self.rollouts = self.fresh_nfe = self.fitted = 0
        self.levels = np.array([problem.num_steps + 1, *method.levels(problem.spec), 0])
        self.depth_of = np.full(problem.num_steps + 2, -1)
        self.depth_of[self.levels] = np.arange(len(self.levels))
        self.cost = np.minimum(self.levels[:-1], problem.num_steps)  # NFE of a child, by the depth of its parent
        self.price = self.cost + method.overhead * problem.num_steps
        self.tau2: F64 | None = None
        self.model: Posterior | None = None

    def ask(self, capacity: int) -> Segments:
        del capacity  # the result depends on the wave, never on the batch size
        left = self.left
        wave = min(self.method.wave, left.reward_calls, left.iterations, left.in_time(self.problem.num_steps, 1))
        sources, depths = self._choose(max(0, wave), left.nfe)
        if not len(sources):
            self.status = Status.BUDGET
        self.rollouts += len(sources)
        return self._expand(sources, depths)

    @property
    def spent(self) -> Spent:
        return Spent(self.nfe, self.rollouts, self.rollouts)

    def _choose(self, wave: int, nfe: int) -> tuple[list[int], list[int]]:
        """Nodes to expand and their depths: the largest indices, fresh ones when they are due; stops where NFE end."""
        pool = self._pool(wave)
        sources: list[int] = []
        depths: list[int] = []
        while len(sources) < wave:
            node, depth = pool.pop() if pool and not self._fresh_is_due() else (ROOT, 0)
            if self.cost[depth] > nfe:
                self.status = Status.BUDGET
                break
            nfe -= self.cost[depth]
            self.nfe += int(self.cost[depth])
            self.fresh_nfe += int(self.cost[depth]) * (node == ROOT)
            sources.append(node)
            depths.append(depth)
        return sources, depths

    def _fresh_is_due(self) -> bool:
        few = self.fresh_nfe < START * self.problem.num_steps
        return few or self.fresh_nfe <= self.method.fresh * self.nfe

    def _pool(self, wave: int) -> Pool | None:
        """The best candidates; None where the rewards tell nothing."""
        if self.model is None or self.tau2 is None or not wave:
            return None
        depth, tau2 = self.depth_of[self.tree.t], self.tau2
        below = np.append(np.cumsum(tau2[::-1])[::-1][1:], 0.0)
        target = self.model.mean[self._incumbent()] + MARGIN * math.sqrt(tau2.sum())
        law = Law(tau2, below, target, self.price)
        index = indices(depth, self.tree.children, self.model.mean, self.model.var, law)
        kept = np.argpartition(-index, min(wave, len(index)) - 1)[:wave]
        kept = np.sort(kept[index[kept] > 0])
        return Pool(
            kept, depth[kept], self.tree.children[kept], index[kept], self.model.mean[kept], self.model.var[kept], law
        )

    def _incumbent(self) -> Ids:
        """The path from the root to the best leaf."""
        leaves = self.tree.leaves
        line = [int(leaves[np.argmax(self.tree.reward[leaves])])]
        while line[-1] != ROOT:
            line.append(int(self.tree.parent[line[-1]]))
        return np.array(line[::-1])

    def _expand(self, sources: list[int], depths: list[int], *, whole: bool = True) -> Segments:
        """New children of the sources and, for whole rollouts, their way down, one segment each."""
        tree, at = self.tree, len(self.tree)
        born: dict[int, int] = {}
        first, last, parent, level, key = [], [], [], [], []
        for source, depth in zip(sources, depths, strict=True):
            ordinal = born.get(source, int(tree.children[source]))
            born[source] = ordinal + 1
            fresh = child_key(tree.key[source], int(tree.t[source]), ordinal, source == ROOT)
            n = len(self.levels) - 1 - depth if whole else 1
            first.append(at)
            parent += [source, *range(at, at + n - 1)]
            level += self.levels[depth + 1 : depth + 1 + n].tolist()
            key += [fresh] * n
            at += n
            last.append(at - 1)
        tree.append(np.array(parent, np.int64), np.array(level, np.int64), np.array(key, np.uint64))
        ends = np.array(last, np.int64)
        _visit(ends, tree.parent, tree.visits)
        return Segments(np.array(sources, np.int64), np.array(first, np.int64), ends)

    def tell(self, segments: Segments) -> None:
        self._learn()

    def _learn(self) -> None:
        """Scale the rewards, fit the model where that is due, and carry values, as rewards, to all nodes."""
        tree, leaves = self.tree, self.tree.leaves
        depth, y = self.depth_of[tree.t], np.full(len(tree), np.nan)
        mass = masses(tree.parent, tree.children)
        y[leaves] = scores(tree.reward[leaves], mass[leaves], int(tree.children[ROOT]))
        self.model = None
        tree.value[:] = np.where(tree.t == 0, tree.reward, np.nan)
        if not len(leaves) or not np.ptp(y[leaves]) > 0:
            return
        prior = self._split()
        if self.tau2 is None or len(tree) >= GROWTH * self.fitted:
            self.tau2 = fit(tree.parent, depth, y, prior if self.tau2 is None else self.tau2, prior)
            self.fitted = len(tree)
        self.model = self._posterior(depth, y, mass)
        inner = tree.t > 0
        tree.value[inner] = rewards_at(self.model.mean[inner], y[leaves], tree.reward[leaves])

    def _posterior(self, depth: Ids, y: F64, mass: F64) -> Posterior:
        """Values of all nodes, whose probabilities are `mass`."""
        del mass
        assert self.tau2 is not None
        return posterior(self.tree.parent, depth, y, self.tau2)

    def _split(self) -> F64:
        """Share of the variance by depth that is expected before there are data: by NFE."""
        nfe = -np.diff(self.levels[1:]) / self.problem.num_steps
        return np.array([0.0, PRIOR_SHARE, *(1 - PRIOR_SHARE) * nfe])

    def state(self) -> dict[str, Any]:
        tau2 = None if self.tau2 is None else self.tau2.tolist()
        names = ("nfe", "rollouts", "fresh_nfe", "fitted")
        return {name: getattr(self, name) for name in names} | {"tau2": tau2}

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        self.tree.check_levels(self.levels)
        if state["tau2"] is not None and len(state["tau2"]) != len(self.levels):
            raise ValueError(f"tau2 has {len(state['tau2'])} values for {len(self.levels)} levels")
        for name, value in state.items():
            setattr(self, name, value)
        self.tau2 = None if self.tau2 is None else np.array(self.tau2)
        backup.recount(self.tree, ends)
        self._learn()

    def readout(self) -> Readout:
        leaves = self.tree.leaves
        extra: dict[str, Any] = {"rollouts": self.rollouts, "fresh": len(self.tree.children_of(ROOT))}
        if self.tau2 is not None:
            extra["resolved"] = {int(t): float(v) for t, v in zip(self.levels[1:], self.tau2[1:], strict=True)}
        return Readout.greedy(leaves, **extra)


class Pool:
    """The candidates of a wave; taking one lowers its index."""

    def __init__(self, node: Ids, depth: Ids, tried: NDArray[Any], index: F64, mean: F64, var: F64, law: Law) -> None:
        self.node, self.depth, self.tried, self.index = node, depth, tried, index
        self.mean, self.var, self.law = mean, var, law
        self.flying = np.zeros(len(node))

    def __bool__(self) -> bool:
        return len(self.node) > 0

    def pop(self) -> tuple[int, int]:
        """The node of the largest index, and its depth."""
        i = int(np.argmax(self.index))
        self.flying[i] += 1
        self.index[i] = index_of(self.depth[i], self.tried[i], self.flying[i], self.mean[i], self.var[i], self.law)
        return int(self.node[i]), int(self.depth[i])
