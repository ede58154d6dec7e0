"""TreeSearch with drafts: new children are drafted first, and finished where that is promising.

A candidate is one of

    plain     a new child of x and its way down, as in `treesearch.methods.tree_search`
    draft     a new child c of x and a draft from it on the noise that its first child will take
    finish    that first child of c, and its way down: the path that was drafted

with the indices of `treesearch.core.drafted`; a wave is of drafts, or of ways down. How well drafts predict is learnt
by level from those that were finished; where they do not, the index of a draft falls below that of a plain child, and
what is left is TreeSearch. The first `OPENING` rollouts are drafted and all finished. The share `fresh` of the NFE goes
to plain rollouts from the prior. Before the budget ends nothing more is drafted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from treesearch.core.drafted import draft_index, finish_index, read_drafts
from treesearch.core.looks import Looks
from treesearch.core.nested_effects import Law, Posterior, index_of, posterior
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.methods.base import Ids, Problem, Readout, Status
from treesearch.methods.nested_search import MARGIN, NestedSearch

if TYPE_CHECKING:
    from treesearch.methods.tree_search import TreeSearch

OPENING = 16  # rollouts before anything else, drafted and finished
ENDING = 2  # rollouts' worth of the budget in which nothing more is drafted


class DraftingSearch(NestedSearch):
    """One tree: draft, finish or go down, learn from all."""

    drafts: Looks | None = None

    def __init__(self, method: TreeSearch, problem: Problem) -> None:
        super().__init__(method, problem)
        assert method.draft is not None
        self.evaluations = method.draft
        walk = self.cost - np.minimum(self.levels[1:], problem.num_steps)
        self.cost_of_draft = walk + np.array(problem.spec.draft_prices(method.draft))[self.levels[1:]]
        self.price_of_draft = self.cost_of_draft + method.overhead * problem.num_steps

    def ask(self, capacity: int) -> Segments:
        del capacity
        left, steps = self.left, self.problem.num_steps
        wave = max(0, min(self.method.wave, left.reward_calls, left.iterations, left.in_time(steps, 1)))
        drafting = left.units(ENDING * self.problem.num_steps, ENDING, ENDING) > 0
        sources, draft = self._opening(wave, drafting=drafting) or self._wave(wave, drafting=drafting)
        sources = self._paid(sources, left.nfe, draft=draft)
        if not sources:
            self.status = Status.BUDGET
        self.rollouts += len(sources)
        depths = self.depth_of[self.tree.t[np.array(sources, np.int64)]]
        segments = self._expand(sources, depths.tolist(), whole=not draft)
        segments.draft, segments.paid = self.evaluations * draft, False
        return segments

    @property
    def _open(self) -> Ids:
        """Drafts that are not finished."""
        tree = self.tree
        return np.flatnonzero((tree.t > 0) & ~np.isnan(tree.reward) & (tree.children == 0))

    def _opening(self, wave: int, *, drafting: bool) -> tuple[list[int], bool] | None:
        """The first rollouts: all are drafted, then all are finished."""
        if len(self.tree) == 1 and drafting:
            return [ROOT] * min(wave, OPENING), True
        return None if len(self.tree.leaves) else (self._open[:wave].tolist() or [ROOT] * min(wave, OPENING), False)

    def _wave(self, wave: int, *, drafting: bool) -> tuple[list[int], bool]:
        """Sources, and whether their children are drafted."""
        pool = self._candidates(wave, drafting=drafting)
        if pool is None or self._fresh_is_due():
            return [ROOT] * min(wave, OPENING), False
        draft, sources = pool.drafts_next, list[int]()
        while len(sources) < wave and pool and pool.drafts_next == draft:
            sources.append(pool.pop())
        return sources, draft

    def _fresh_is_due(self) -> bool:
        return self.fresh_nfe <= self.method.fresh * self.nfe

    def _paid(self, sources: list[int], nfe: int, *, draft: bool) -> list[int]:
        """Those that the budget pays for."""
        for i, source in enumerate(sources):
            depth = int(self.depth_of[self.tree.t[source]])
            price = int((self.cost_of_draft if draft else self.cost)[depth])
            if price > nfe:
                return sources[:i]
            nfe -= price
            self.nfe += price
            self.fresh_nfe += price * (source == ROOT and not draft)
        return sources

    def _candidates(self, wave: int, *, drafting: bool) -> Pool | None:
        """What could be done; None where the rewards tell nothing."""
        if self.model is None or self.tau2 is None or self.drafts is None or not wave:
            return None
        tree, tau2 = self.tree, self.tau2
        below = np.append(np.cumsum(tau2[::-1])[::-1][1:], 0.0)
        target = self.model.mean[self._incumbent()] + MARGIN * math.sqrt(tau2.sum())
        law = Law(tau2, below, target, self.price)
        inner = np.flatnonzero((tree.t > 0) & ((tree.children > 0) | ~np.isnan(tree.reward)))
        return Pool(self, inner, law, drafting=drafting)

    def _posterior(self, depth: Ids, y: F64, mass: F64) -> Posterior:
        tree = self.tree
        assert self.tau2 is not None
        rewards = np.where(tree.t > 0, tree.reward, np.nan)
        at = np.flatnonzero(~np.isnan(rewards) & (tree.children > 0))
        ends, finished = at.copy(), np.full(len(tree), np.nan)
        while (tree.t[ends] > 0).any():
            ends = np.where(tree.t[ends] > 0, tree.kids[tree.start[ends]], ends)
        finished[at] = y[ends]
        mean = float(posterior(tree.parent, depth, y, self.tau2).mean[ROOT])
        self.drafts = read_drafts(depth, rewards, mass, int(tree.children[ROOT]), self.tau2, mean, finished)
        return posterior(tree.parent, depth, y, self.tau2, self.drafts.seen.at(tree.children == 0))

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        drafted = np.flatnonzero((self.tree.t > 0) & ~np.isnan(self.tree.reward))
        super().restore(state, np.concatenate([ends, drafted]))

    def readout(self) -> Readout:
        readout, tree = super().readout(), self.tree
        readout.extra["drafts"] = int(((tree.t > 0) & ~np.isnan(tree.reward)).sum())
        if self.drafts is not None:
            inner = zip(self.levels[1:-1], self.drafts.c[1:-1], strict=True)
            readout.extra["correlation"] = {int(t): float(c) for t, c in inner}
        return readout


class Pool:
    """Indices of ways down and of drafts at every node; taking one lowers both."""

    def __init__(self, search: DraftingSearch, node: Ids, law: Law, *, drafting: bool) -> None:
        tree, model, drafts = search.tree, search.model, search.drafts
        assert model is not None
        assert drafts is not None
        self.node, self.law, self.drafting = node, law, drafting
        self.depth, self.tried = search.depth_of[tree.t[node]], tree.children[node]
        self.mean, self.var = model.mean[node], model.var[node]
        self.seen_value, self.seen_precision = drafts.seen.value[node], drafts.seen.precision[node]
        self.noise, self.price = drafts.noise, search.price_of_draft
        self.flying = np.zeros(len(node))
        self.down, self.draft = (np.array(v) for v in zip(*(self._indices(i) for i in range(len(node))), strict=True))

    def _indices(self, i: int) -> tuple[float, float]:
        depth, tried = int(self.depth[i]), float(self.tried[i])
        if tried == 0:
            if self.flying[i]:
                return -1.0, -1.0
            known = (self.mean[i], self.var[i], self.seen_value[i], self.seen_precision[i])
            return finish_index(depth, *known, self.law, self.noise), -1.0
        known = (depth, tried, self.flying[i], self.mean[i], self.var[i], self.law)
        deep = depth + 2 < len(self.law.tau2) and self.drafting
        return index_of(*known), draft_index(*known, self.noise, self.price) if deep else -1.0

    def __bool__(self) -> bool:
        return bool(max(self.down.max(), self.draft.max()) > 0)

    @property
    def drafts_next(self) -> bool:
        """Whether the largest index is a draft's."""
        return bool(self.draft.max() > self.down.max())

    def pop(self) -> int:
        """The node of the largest index."""
        i = int(np.argmax(self.draft if self.drafts_next else self.down))
        self.flying[i] += 1
        self.down[i], self.draft[i] = self._indices(i)
        return int(self.node[i])
