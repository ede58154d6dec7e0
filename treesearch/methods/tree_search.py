"""TreeSearch: finds the best sample by expected improvement under a nested random-effects model of the reward.

A node at depth l has the value V(x) = E[y(x_0) | x], y a monotone function of the reward, and the model says

    V(child at depth l) = V(x) + δ,   δ ~ N(0, τ_l²) independent,   V(leaf) = y

so τ_l² is the variance that is resolved between two branching levels. When a wave is told:

    y             normal scores of the rewards: rank within p, estimated from the tree
    τ_1²..τ_L²    restricted likelihood from the tree so far, whenever it has grown by a tenth
    m(x), v(x)    mean and variance of V(x) given all rewards: one sweep up the tree, one down
    V'            value of a new child of x ~ N(m(x), v(x) + τ²)
    index(x)      E[(V' - V* - margin)⁺] / (1 + n P(V' > V* + margin)) / (t NFE of a rollout from level t + overhead·T)

and the next wave expands the nodes of largest index. V* is m of the incumbent's own ancestor at the new child's level,
not the incumbent's reward: what refinement gained below that ancestor can be gained below a better child as well. The
n children that x has did not get there, though the model had expected n P of them to: the rate at which it is right
is shrunk by what was seen, (1 + 0) / (1 + n P). A node with k rollouts of this wave in flight counts as if they had
returned what was expected: n grows by k, m stays, v shrinks to v / (1 + k v / Σ τ² below). The share `fresh` of the NFE
goes to rollouts from the prior, whatever the model says.

What holds: after B NFE the tree contains at least ⌊fresh·B / T⌋ independent rollouts, the first ones of best-of-N
with the same seed, so its best is never below best-of-N's at that share of the budget, however wrong the model. The
model decides where to look, never what is returned. Nothing is proven about the index; docs/tree_search.md has what was
measured. Greedy: samples are not draws of π, no Z is estimated. Log p/q of proposals are not looked at.

Source: expected improvement: Efficient Global Optimization of Expensive Black-Box Functions (Jones, Schonlau & Welch,
1998), eq. 15. Variance components: Maximum Likelihood Approaches to Variance Component Estimation and to Related
Problems (Harville, 1977), by the fixed point of Bayesian Interpolation (MacKay, 1992). Rollouts in flight: Kriging Is
Well-Suited to Parallelize Optimization (Ginsbourger, Le Riche & Carraro, 2010), the "kriging believer". The stage-wise
target V*, the shrunk rate (the posterior mean of a Gamma(1, 1) factor) and the scale of the rewards are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core import backup
from treesearch.core.compiled import compiled
from treesearch.core.nested_effects import Law, Posterior, fit, index_of, indices, masses, posterior, scores
from treesearch.core.noise import child_key
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.methods.base import Greedy, Ids, Problem, Readout, Search, Status, Unit
from treesearch.methods.settings import as_levels, check_whole, node_levels
from treesearch.rewards.numeric import is_number

JONES = Paper(
    "article",
    "jones1998efficient",
    "Efficient Global Optimization of Expensive Black-Box Functions",
    "Jones, Donald R. and Schonlau, Matthias and Welch, William J.",
    "Journal of Global Optimization",
    1998,
)
GINSBOURGER = Paper(
    "incollection",
    "ginsbourger2010kriging",
    "Kriging Is Well-Suited to Parallelize Optimization",
    "Ginsbourger, David and Le Riche, Rodolphe and Carraro, Laurent",
    "Computational Intelligence in Expensive Optimization Problems",
    2010,
)

START = 16  # fresh rollouts before anything else
GROWTH = 1.1  # of the tree between two fits
PRIOR_SHARE = 0.2  # of the variance, resolved by x_T as far as the prior knows; the rest by NFE
MARGIN = 0.1  # improvement that does not count, in standard deviations


@dataclass(frozen=True, kw_only=True)
class TreeSearch(Greedy):
    """Expected improvement on a tree: the best sample for the fewest NFE.

    Args:
        branch_at: levels t that become nodes; None for ten equally spaced and, below T / 10, each .6 of the one above.
        wave: rollouts chosen at once; the result depends on it.
        fresh: least share of the NFE that goes to rollouts from the prior, 0..1; 1 is best-of-N.
        overhead: what a rollout costs beside its NFE, in units of T: small values spend more reward calls.
    """

    name = "tree_search"
    papers = (JONES, GINSBOURGER)

    branch_at: tuple[int, ...] | None = None
    wave: int = 16
    fresh: float = 0.25
    overhead: float = 0.1

    def __post_init__(self) -> None:
        check_whole(wave=self.wave)
        if not is_number(self.fresh, 0, 1):
            raise ValueError(f"fresh is {self.fresh!r}, expected 0..1")
        if not (is_number(self.overhead, 0) and self.overhead < math.inf):
            raise ValueError(f"overhead is {self.overhead!r}, expected a number >= 0")
        object.__setattr__(self, "branch_at", as_levels("branch_at", self.branch_at))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """Branching levels for a kernel, descending.

        Raises:
            ValueError: a level out of range, or one below which every step is deterministic.
        """
        given = self.branch_at
        if given is None:
            given = [t for t in _default_levels(spec.num_steps) if spec.branchable(t)] or None
        return node_levels(given, spec)

    def unit(self, spec: Spec) -> Unit:
        self.levels(spec)
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> NestedSearch:
        return NestedSearch(self, problem)


def _default_levels(num_steps: int) -> list[int]:
    levels = {max(1, round(num_steps * k / 10)) for k in range(1, 11)}
    step = 0.06 * num_steps
    while step >= 1:
        levels.add(round(step))
        step *= 0.6
    return sorted(levels | {1}, reverse=True)


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
        left = self.share.less(self.nfe, self.rollouts, self.rollouts)
        wave = min(self.method.wave, left.reward_calls, left.iterations)
        sources, depths = self._choose(max(0, wave), left.nfe)
        if not len(sources):
            self.status = Status.BUDGET
        return self._expand(sources, depths)

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

    def _expand(self, sources: list[int], depths: list[int]) -> Segments:
        """New children of the sources and their way down, one segment each."""
        tree, at = self.tree, len(self.tree)
        born: dict[int, int] = {}
        first, last, parent, level, key = [], [], [], [], []
        for source, depth in zip(sources, depths, strict=True):
            ordinal = born.get(source, int(tree.children[source]))
            born[source] = ordinal + 1
            fresh = child_key(tree.key[source], int(tree.t[source]), ordinal, source == ROOT)
            n = len(self.levels) - 1 - depth
            first.append(at)
            parent += [source, *range(at, at + n - 1)]
            level += self.levels[depth + 1 :].tolist()
            key += [fresh] * n
            at += n
            last.append(at - 1)
        tree.append(np.array(parent, np.int64), np.array(level, np.int64), np.array(key, np.uint64))
        ends = np.array(last, np.int64)
        _visit(ends, tree.parent, tree.visits)
        self.rollouts += len(ends)
        return Segments(np.array(sources, np.int64), np.array(first, np.int64), ends)

    def tell(self, segments: Segments) -> None:
        self._learn()

    def _learn(self) -> None:
        """Scale the rewards, fit the model where that is due, and carry values to all nodes."""
        tree, leaves = self.tree, self.tree.leaves
        depth, y = self.depth_of[tree.t], np.full(len(tree), np.nan)
        mass = masses(tree.parent, tree.children)
        y[leaves] = scores(tree.reward[leaves], mass[leaves], int(tree.children[ROOT]))
        self.model = None
        tree.value[:] = tree.reward
        if not np.ptp(y[leaves]) > 0:
            return
        prior = self._split()
        if self.tau2 is None or len(tree) >= GROWTH * self.fitted:
            self.tau2 = fit(tree.parent, depth, y, prior if self.tau2 is None else self.tau2, prior)
            self.fitted = len(tree)
        self.model = posterior(tree.parent, depth, y, self.tau2)
        inner = tree.t > 0
        tree.value[inner] = self.model.mean[inner]

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
