"""TreeSearch with endpoints: paths that are looked at level by level, and gone on with where that is promising.

A *look* walks to a new child of a node at the next branching level and evaluates there: the reward of its endpoint is
scored, the transition kept, and going on costs no second evaluation. In a wave every path goes one level further:

    ways down    those on their way to a sample, to the end
    new ones     of largest index, of the two kinds

    index of a way down    as in `treesearch.methods.tree_search`
    index of a look        the same, of what a look at the child can be hoped to show, see `treesearch.core.looks`

A look costs the gap between two levels and a reward call, so that many children of a node, or many x_T, are seen for
the price of one sample. How far looks are to be believed is learnt by level from the nodes with samples below them;
where they tell nothing, their index is nothing, and what is left is TreeSearch with more reward calls.

`OPENING` rollouts come first. The share `fresh` of the NFE goes to whole rollouts from the prior, as without looks: the
tree holds as many independent rollouts. Before the budget ends nothing more is looked at. Cost and reward calls of a
way down are entered when it begins, so that a budget is met exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core.looks import (
    Looks,
    Prices,
    above_samples,
    look_index,
    look_indices,
    read,
    with_own,
)
from treesearch.core.nested_effects import Law, Posterior, index_of, indices, posterior
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.methods.base import Ids, Problem, Readout, Status
from treesearch.methods.nested_search import MARGIN, NestedSearch

if TYPE_CHECKING:
    from treesearch.methods.tree_search import TreeSearch

OPENING = 4  # fresh rollouts before anything else
ENDING = 2  # rollouts' worth of the budget in which nothing more is looked at
KEPT = 4096  # transitions that are kept: those of the nodes of largest index


class LookingSearch(NestedSearch):
    """One tree: look further or go down, learn from both."""

    looks: Looks | None = None

    def __init__(self, method: TreeSearch, problem: Problem) -> None:
        super().__init__(method, problem)
        self.gap = self.cost - np.minimum(self.levels[1:], problem.num_steps)  # NFE to the next level
        self.price_of_look = 1 + self.gap + method.overhead * problem.num_steps
        self.calls = 0
        self.walking: list[int] = []  # ends of paths on their way down to a sample

    def ask(self, capacity: int) -> Segments:
        del capacity
        sources, down = self.walking, [True] * len(self.walking)
        for node, whole in self._choices(self.method.wave - len(sources)):
            sources, down = [*sources, node], [*down, whole]
        if not sources:
            self.status = Status.BUDGET
        depths = self.depth_of[self.tree.t[np.array(sources, np.int64)]]
        segments = self._expand(sources, depths.tolist(), whole=False)
        above = self.tree.t[segments.last] > 0
        self.walking = segments.last[above & np.array(down, np.bool_)].tolist()
        segments.hold, segments.keep = above, self._kept
        return segments

    def _choices(self, room: int) -> Iterator[tuple[int, bool]]:
        """Nodes that get a child, and whether it goes on down to a sample; stops where the budget ends.

        They are few while little is known, and none while the first rollouts are on their way.
        """
        samples = len(self.tree.leaves)
        few = max(OPENING, samples // 2) if samples or len(self.tree) == 1 else 0
        pool = self._candidates(wave := min(room, few))
        for _ in range(wave):
            node, whole = pool.pop() if pool and not self._fresh_is_due() else (ROOT, True)
            if not self._pay(node, whole=whole):
                return
            yield node, whole

    def _fresh_is_due(self) -> bool:
        return self.fresh_nfe <= self.method.fresh * self.nfe

    def _pay(self, node: int, *, whole: bool) -> bool:
        """Enter the cost of a child and, for whole ways, of those below it, if the budget has it."""
        depth = int(self.depth_of[self.tree.t[node]])
        nfe = int(self.cost[depth] if whole else self.gap[depth] + 1) - (
            node != ROOT
        )  # evaluated when it was looked at
        calls = len(self.levels) - 1 - depth if whole else 1
        if not self.share.less(self.nfe, self.calls, self.rollouts).units(max(nfe, 1), calls):
            return False
        self.nfe, self.calls, self.rollouts = self.nfe + nfe, self.calls + calls, self.rollouts + 1
        self.fresh_nfe += nfe * (node == ROOT and whole)
        return True

    def _candidates(self, wave: int) -> Pool | None:
        """What could be done; None where the rewards tell nothing."""
        self._kept = self._held
        if self.model is None or self.tau2 is None or self.looks is None or wave < 1:
            return None
        depth, tau2, model = self.depth_of[self.tree.t], self.tau2, self.model
        below = np.append(np.cumsum(tau2[::-1])[::-1][1:], 0.0)
        target = model.mean[self._incumbent()] + MARGIN * math.sqrt(tau2.sum())
        law, prices = Law(tau2, below, target, self.price), Prices(self.looks.noise, self.price_of_look)
        down = indices(depth, self.tree.children, model.mean, model.var, law)
        look = look_indices(depth, self.tree.children, model.mean, model.var, law, prices)
        left = self.share.less(self.nfe, self.calls, self.rollouts)
        if not left.units(ENDING * self.problem.num_steps, ENDING * len(self.levels), ENDING):
            look[:] = -1.0
        down[self.walking] = look[self.walking] = -1.0
        either = np.maximum(down, look)
        self._kept = np.sort(self._kept[np.argsort(-either[self._kept], kind="stable")[:KEPT]])
        kept = np.sort(np.argpartition(-either, min(wave, len(either)) - 1)[:wave])
        kept = kept[either[kept] > 0]
        known = (kept, depth[kept], self.tree.children[kept], model.mean[kept], model.var[kept])
        return Pool(*known, down[kept], look[kept], law, prices)

    @property
    def _held(self) -> Ids:
        """Nodes that were looked at."""
        return np.flatnonzero((self.tree.t > 0) & ~np.isnan(self.tree.reward))

    def tell(self, segments: Segments) -> None:
        if len(self.tree.leaves):
            self._learn()

    def _posterior(self, depth: Ids, y: F64, mass: F64) -> Posterior:
        tree = self.tree
        assert self.tau2 is not None
        known = posterior(tree.parent, depth, y, self.tau2)
        endpoints = np.where(tree.t > 0, tree.reward, np.nan)
        taught = known._replace(var=np.where(above_samples(tree.parent, ~np.isnan(y)), known.var, np.nan))
        self.looks = read(depth, endpoints, mass, int(tree.children[ROOT]), self.tau2, taught)
        deepest = self.looks.seen.at(tree.children == 0)
        found = posterior(tree.parent, depth, y, self.tau2, deepest)
        return with_own(found, self.looks.seen.at(tree.children > 0))

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        walking = [node for group in state["walking"] for node, _ in group]
        if walking and not (max(walking) < len(self.tree) and (self.tree.t[walking] > 0).all()):
            raise ValueError("paths on their way end at nodes that are not there")
        super().restore(state | {"walking": walking}, np.concatenate([ends, self._held]))

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "calls": self.calls,
            "walking": [[[node, 1] for node in self.walking]] * bool(self.walking),
        }

    @property
    def committed(self) -> int:
        return self.nfe if self.walking else 0

    @property
    def busy(self) -> bool:
        """Without samples so far."""
        return len(self.tree) > 1 and not len(self.tree.leaves)

    def readout(self) -> Readout:
        readout = super().readout()
        readout.extra["looks"] = len(self._held)
        if self.looks is not None:
            inner = zip(self.levels[1:-1], self.looks.c[1:-1], strict=True)
            readout.extra["reliability"] = {int(t): float(c) for t, c in inner}
        return readout


class Pool:
    """The candidates of a wave, each a way down or a look; taking one lowers both of its indices."""

    def __init__(
        self,
        node: Ids,
        depth: Ids,
        tried: NDArray[Any],
        mean: F64,
        var: F64,
        down: F64,
        look: F64,
        law: Law,
        prices: Prices,
    ) -> None:
        self.node, self.depth, self.tried, self.mean, self.var = node, depth, tried, mean, var
        self.down, self.look, self.law, self.prices = down, look, law, prices
        self.flying = np.zeros(len(node))

    def __bool__(self) -> bool:
        return len(self.node) > 0

    def pop(self) -> tuple[int, bool]:
        """The node of the largest index, and whether it is that of a way down."""
        whole = bool(self.down.max() >= self.look.max())
        i = int(np.argmax(self.down if whole else self.look))
        self.flying[i] += 1
        of = (self.depth[i], self.tried[i], self.flying[i], self.mean[i], self.var[i], self.law)
        self.down[i] = index_of(*of)
        self.look[i] = look_index(*of, self.prices) if self.look[i] >= 0 else -1.0
        return int(self.node[i]), whole
