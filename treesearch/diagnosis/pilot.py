"""The pilot: K chains, and at each level of each of them one more continuation with noise of its own.

    x_T -> x_l1 -> x_l2 -> ... -> x_0        the chain, best-of-N's own rollout; endpoints are scored at every level
             \\-> x_0'  \\-> x_0''             a continuation from each level

Given x_l, the leaves of all continuations from l and below it and the chain's own leaf are draws of one law: what they
have in common is decided at l. A level's evaluation serves the chain, its continuation and its endpoint, so that a
chain costs T + Σ (l - 1) NFE, with levels a factor `RATIO` apart about 3.5 T. It runs as a method does: batches,
prompts, guides and checks of kernel and reward are those of a search. The levels above the last are populations of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from treesearch.backends.base import Spec
from treesearch.core.noise import child_keys
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64, scaled
from treesearch.engine.segments import Segments
from treesearch.errors import BudgetError, StoreError
from treesearch.methods.base import NO_NODES, Greedy, Ids, Problem, Readout, Search, Status, Unit
from treesearch.methods.settings import number

RATIO = 0.7  # of neighbouring levels
LOWEST = 50  # the lowest level is at least T / LOWEST
LEAST = 8  # chains


def levels_of(spec: Spec) -> tuple[int, ...]:
    """T and, each `RATIO` of the one above, the levels below it, down to the last that can branch.

    Of a kernel whose steps are all deterministic every such level.
    """
    found, level, lowest = [spec.num_steps], spec.num_steps, max(1, spec.num_steps // LOWEST)
    while level > lowest:
        level = max(lowest, min(level - 1, round(RATIO * level)))
        found.append(level)
    alive = [t for t in found if spec.branchable(t)]
    return tuple(alive or found)


def price(spec: Spec, levels: tuple[int, ...]) -> int:
    """NFE of one chain with its continuations."""
    return spec.num_steps + sum(t - 1 for t in levels if spec.branchable(t))


@dataclass(frozen=True, kw_only=True)
class Pilot(Greedy):
    """A pilot of `chains` chains a task.

    Args:
        chains: K.
        levels: l, descending from T.
        lam: λ, for the ESS on the progress line.
    """

    name = "pilot"

    chains: int
    levels: tuple[int, ...]
    lam: float | str = 1.0

    def unit(self, spec: Spec) -> Unit:
        again = sum(map(spec.branchable, self.levels))
        calls = self.chains * (len(self.levels) + 1 + again)
        return Unit(f"a pilot of {self.chains} chains", self.chains * price(spec, self.levels), calls)

    def start(self, problem: Problem) -> PilotSearch:
        return PilotSearch(self, problem)


def size_of(spec: Spec, nfe: int, tasks: int, beside: int) -> Pilot:
    """The largest pilot that costs at most `nfe` with what is evaluated beside it.

    Raises:
        BudgetError: it would have fewer than `LEAST` chains a task.
    """
    levels = levels_of(spec)
    each = price(spec, levels) * tasks
    chains = (nfe - beside) // each
    if chains < LEAST:
        raise BudgetError(
            f"nfe={nfe} is below a pilot of {LEAST} chains a task: the minimum is {LEAST * each + beside}"
        )
    return Pilot(chains=chains, levels=levels)


class PilotSearch(Search):
    """Level by level down, then all continuations at once."""

    def __init__(self, method: Pilot, problem: Problem) -> None:
        super().__init__(problem)
        self.method, self.lam, self.chain = method, number(method.lam), []
        self.again: list[Ids] = []  # leaves of the continuations, by level; none where every step is deterministic
        self.ends: Ids = NO_NODES  # of the chains

    chain: list[Ids]  # nodes of the chains, by level

    def ask(self, capacity: int) -> Segments:
        del capacity  # a level is one wave
        at = len(self.chain)
        if len(self.ends):
            self.status = Status.FINISHED
            return Segments(NO_NODES, NO_NODES, NO_NODES)
        if at == len(self.method.levels):
            return self._finish()
        above = self.chain[-1] if at else np.full(self.method.chains, ROOT)
        new = self._children(above, self.method.levels[at], 0)
        self.chain.append(new)
        return Segments(above, new, new, hold=True, keep=self._held(at))

    def _held(self, levels: int) -> Ids:
        """Nodes of the first levels, whose continuations are to come."""
        return np.concatenate([NO_NODES, *self.chain[:levels]])

    def _finish(self) -> Segments:
        self.ends = self._children(self.chain[-1], 0, 0)
        spec = self.problem.spec
        self.again = [self._children(c, 0, 1) for c in self.chain if spec.branchable(int(self.tree.t[c[0]]))]
        sources = [self.chain[-1], *self.chain[: len(self.again)]]
        new = np.concatenate([self.ends, *self.again])
        return Segments(np.concatenate(sources), new, new, keep=self._held(len(self.chain)))

    def _children(self, above: Ids, level: int, ordinal: int) -> Ids:
        """The child number `ordinal` of each node; of the root as many as there are chains."""
        root = bool(above[0] == ROOT)
        ordinals = np.arange(len(above)) if root else np.full(len(above), ordinal)
        t = int(self.tree.t[above[0]])
        keys = child_keys(self.tree.key[above], t, ordinals, at_root=root)
        return self.tree.append(above, np.full(len(above), level), keys)

    def tell(self, segments: Segments) -> None:
        done = segments.last[self.tree.t[segments.last] == 0]
        self.tree.value[done] = self.tree.reward[done]

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        raise StoreError("a pilot is not recorded: run it again")

    def readout(self) -> Readout:
        leaves = self.told
        return Readout(leaves, scaled(self.lam, self.tree.reward[leaves]) + self.tree.edge_weights(leaves))

    def rewards(self) -> tuple[F64, F64]:
        """Of the endpoints (K, L), and of the leaves (K, 1 + continuations): the chain's own, then by level."""
        reward = self.tree.reward
        return np.stack([reward[c] for c in self.chain], 1), np.stack([reward[n] for n in (self.ends, *self.again)], 1)

    def log_p(self) -> F64:
        """Σ log p/q of the leaves, (K, 1 + continuations)."""
        return np.stack([self.tree.edge_weights(n) for n in (self.ends, *self.again)], 1)
