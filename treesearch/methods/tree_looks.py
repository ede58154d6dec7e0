"""TreeSearch with endpoints: paths that are looked at level by level, and gone on with where that is promising.

A *look* walks to a new child of a node at the next branching level and evaluates there: the reward of its endpoint is
scored, the transition kept, and going on costs no second evaluation. It costs the gap between two levels and a reward
call. How far looks are to be believed is learnt by level from the nodes with samples below them
(`treesearch.core.looks`). Two things take turns:

A *cascade* walks n paths from x_T to samples side by side, and at every branching level shares out their children
among its nodes, one by one by the index of a look, the target being the best of its own nodes:

    n = `wave` at first, later as many as the rollouts that the search has cost so far
    m of them are whole rollouts, which keep the share `fresh` of the NFE
    x_T: more are looked at than go on, for FIRST of the NFE
    every level: n - m looks at children of its nodes, in the order of their indices

It is a beam whose widths follow from what looks are worth: few nodes with many children each where they are exact, many
with one each where they tell little. What is good at one level is found before the next is walked: refining it later
would cost the whole way down again.

In the *waves* between, every path goes one level further:

    ways down    those on their way to a sample, to the end
    new ones     of largest index, of the two kinds

    index of a way down    as in `treesearch.methods.tree_search`
    index of a look        the same, of what a look at the child can be hoped to show

Where looks tell nothing, their index is nothing, and what is left of the waves is TreeSearch with more reward calls.

The search begins with a cascade; a new one begins when cascades have had less than `CASCADES` of the NFE. The share
`fresh` of the NFE goes to whole rollouts from the prior, as without looks: the tree holds as many independent rollouts.
Before the budget ends nothing more is looked at in waves, and the last cascade is as wide as the budget pays for. Cost
and reward calls of a way down are entered when it begins, so that a budget is met exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core import looks
from treesearch.core.looks import Looks, Prices, above_samples, allotted, look_index, look_indices, with_own
from treesearch.core.nested_effects import Law, Posterior, index_of, indices, masses, posterior
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.methods.base import Ids, Problem, Readout, Spent, Status
from treesearch.methods.nested_search import MARGIN, NestedSearch

if TYPE_CHECKING:
    from treesearch.methods.tree_search import TreeSearch

CASCADES = 0.5  # share of the NFE
FIRST = 0.06  # share of a cascade's NFE for looks at more x_T than go on
MOST = 8.0  # of those, by path
NARROWEST, WIDEST = 4, 256  # paths of a cascade
FEWEST = 4  # ways at a time while there are few samples
ENDING = 2  # rollouts' worth of the budget in which nothing more is looked at
KEPT = 4096  # transitions that are kept between cascades: those of the nodes of largest index


class LookingSearch(NestedSearch):
    """One tree: look further or go down, learn from both."""

    looks: Looks | None = None

    def __init__(self, method: TreeSearch, problem: Problem) -> None:
        super().__init__(method, problem)
        self.gap = self.cost - np.minimum(self.levels[1:], problem.num_steps)  # NFE to the next level
        self.price_of_look = 1 + self.gap + method.overhead * problem.num_steps
        self.calls = self.cascade_nfe = self.width = 0  # width: looks at a level of the cascade
        self.cohort: list[int] = []  # nodes of the cascade at the level that it has come to
        self.walking: list[int] = []  # ends of paths on their way down to a sample

    def ask(self, capacity: int) -> Segments:
        del capacity
        self._kept, before = self._held, self.nfe
        chosen = list(self._in_cascade()) or list(self._cascade())
        cascading = bool(chosen)
        self.cascade_nfe += self.nfe - before
        chosen = chosen or list(self._choices(self.method.wave - len(self.walking)))
        sources = [*self.walking, *(node for node, _ in chosen)]
        down = [*(True for _ in self.walking), *(whole for _, whole in chosen)]
        if not sources:
            self.status = Status.BUDGET
        depths = self.depth_of[self.tree.t[np.array(sources, np.int64)]]
        segments = self._expand(sources, depths.tolist(), whole=False)
        above = self.tree.t[segments.last] > 0
        self.walking = segments.last[above & np.array(down, np.bool_)].tolist()
        level = self.tree.t[segments.last]  # all others are further down
        self.cohort = segments.last[above & (level == level.max(initial=0))].tolist() if cascading else []
        segments.hold, segments.keep = above, self._kept
        return segments

    @property
    def spent(self) -> Spent:
        return Spent(self.nfe, self.calls, self.rollouts)

    def _cascade(self) -> Iterator[tuple[int, bool]]:
        """The x_T of a new cascade, and whether they are those of whole rollouts, where one is due."""
        if self.cascade_nfe > CASCADES * self.nfe:
            return
        steps, below, first = self.problem.num_steps, len(self.levels) - 1, int(self.gap[0]) + 1
        more = min(FIRST * steps / first, MOST)  # looks at x_T beside, by path
        left = self.left
        paths = left.units(steps + math.ceil(more * first), below + math.ceil(more), 2 * below)
        paths = min(max(self.method.wave, self.nfe // steps), WIDEST, paths)
        cost = paths * steps + int(more * paths) * first
        share = self.method.fresh * (self.nfe + (cost if left.nfe - cost >= steps else left.nfe))
        self.width = paths - min(max(int(share - self.fresh_nfe) // steps, 0), paths)
        if paths < NARROWEST or not self.width:
            return
        seen = self.width + int(more * paths)
        yield from self._paid([(ROOT, True)] * (paths - self.width) + [(ROOT, False)] * seen)

    def _in_cascade(self) -> Iterator[tuple[int, bool]]:
        """Nodes of the cascade that get a child; in order of creation where nothing is known of them."""
        if not self.cohort:
            return
        nodes = np.array(self.cohort)
        depth = int(self.depth_of[self.tree.t[nodes[0]]])
        flying = np.isin(nodes, self.walking)
        if self.model is None or self.tau2 is None or self.looks is None:
            taken = np.flatnonzero(~flying)[: self.width]
        else:
            mean, var, prices = (
                self.model.mean[nodes],
                self.model.var[nodes],
                Prices(self.looks.noise, self.price_of_look),
            )
            law = self._law(self.tau2, self.tau2)
            taken = allotted(depth, flying.astype(float), mean, var, law, prices, self.width)
        leaves = depth == len(self.levels) - 2
        yield from self._paid([(node, leaves) for node in nodes[taken].tolist()])

    def _paid(self, chosen: list[tuple[int, bool]]) -> Iterator[tuple[int, bool]]:
        """Those that the budget has."""
        for node, whole in chosen:
            if not self._pay(node, whole=whole):
                return
            yield node, whole

    def _law(self, tau2: F64, target: F64) -> Law:
        return Law(tau2, np.append(np.cumsum(tau2[::-1])[::-1][1:], 0.0), target, self.price)

    def _choices(self, room: int) -> Iterator[tuple[int, bool]]:
        """Nodes that get a child, and whether it goes on down to a sample; stops where the budget ends.

        They are few while little is known, and none while the first rollouts are on their way.
        """
        samples = len(self.tree.leaves)
        few = max(FEWEST, samples // 2) if samples or len(self.tree) == 1 else 0
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
        if not self.left.units(max(nfe, 1), calls):
            return False
        self.nfe, self.calls, self.rollouts = self.nfe + nfe, self.calls + calls, self.rollouts + 1
        self.fresh_nfe += nfe * (node == ROOT and whole)
        return True

    def _candidates(self, wave: int) -> Pool | None:
        """What could be done; None where the rewards tell nothing."""
        if self.model is None or self.tau2 is None or self.looks is None or wave < 1:
            return None
        depth, tau2, model = self.depth_of[self.tree.t], self.tau2, self.model
        target = model.mean[self._incumbent()] + MARGIN * math.sqrt(tau2.sum())
        law, prices = self._law(tau2, target), Prices(self.looks.noise, self.price_of_look)
        down = indices(depth, self.tree.children, model.mean, model.var, law)
        look = look_indices(depth, self.tree.children, model.mean, model.var, law, prices)
        left = self.left
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
        if len(self.tree.leaves) or self.cohort:
            self._learn()

    def _learn(self) -> None:
        """As without looks; from looks alone in the first cascade."""
        tree = self.tree
        if len(tree.leaves):
            super()._learn()
            return
        self.tau2, self.model = self._split(), None
        known = Posterior(np.zeros(len(tree)), np.full(len(tree), np.nan), self.tau2, self.tau2)
        depth, mass = self.depth_of[tree.t], masses(tree.parent, tree.children)
        self.looks = self._read(depth, mass, known)
        if (deepest := self.looks.seen.at(tree.children == 0)).precision.any():
            self.model = posterior(tree.parent, depth, np.full(len(tree), np.nan), self.tau2, deepest)

    def _read(self, depth: Ids, mass: F64, known: Posterior) -> Looks:
        """What looks say, given what is known from samples: var NaN at nodes with none below."""
        tree = self.tree
        assert self.tau2 is not None
        endpoints = np.where(tree.t > 0, tree.reward, np.nan)
        return looks.read(depth, endpoints, mass, int(tree.children[ROOT]), self.tau2, known)

    def _posterior(self, depth: Ids, y: F64, mass: F64) -> Posterior:
        tree = self.tree
        assert self.tau2 is not None
        known = posterior(tree.parent, depth, y, self.tau2)
        taught = np.where(above_samples(tree.parent, ~np.isnan(y)), known.var, np.nan)
        self.looks = self._read(depth, mass, known._replace(var=taught))
        deepest = self.looks.seen.at(tree.children == 0)
        found = posterior(tree.parent, depth, y, self.tau2, deepest)
        return with_own(found, self.looks.seen.at(tree.children > 0))

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        nodes = {name: [node for group in state[name] for node, _ in group] for name in ("walking", "cohort")}
        for name, of in nodes.items():
            if of and not (max(of) < len(self.tree) and (self.tree.t[of] > 0).all()):
                raise ValueError(f"{name}: paths on their way end at nodes that are not there")
        super().restore(state | nodes, np.concatenate([ends, self._held]))

    def state(self) -> dict[str, Any]:
        nodes = {"walking": self.walking, "cohort": self.cohort}
        numbers = {name: getattr(self, name) for name in ("calls", "cascade_nfe", "width")}
        groups = {name: [[[node, 1] for node in of]] * bool(of) for name, of in nodes.items()}
        return super().state() | numbers | groups

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
