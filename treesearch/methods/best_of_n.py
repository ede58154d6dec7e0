"""Best-of-N: independent samples, all of them kept.

    x_0^(i) ~ p,   log w_i = λ r(x_0^(i)) + Σ log p/q

Its weights make it self-normalised importance sampling: Ẑ = (1/N) Σ w_i is unbiased for Z, `draw` is consistent for π
with error O(1/√ESS), and `best` is the greedy answer. Cost: N·T NFE. The baseline every search must beat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from treesearch.backends.base import Spec
from treesearch.budget import INFINITE
from treesearch.core import backup
from treesearch.core.noise import child_keys
from treesearch.core.tree import ROOT
from treesearch.core.weights import log_mean, log_mean_se, scaled
from treesearch.engine.segments import Segments
from treesearch.methods import genealogy
from treesearch.methods.base import NO_NODES, Ids, Method, Problem, Readout, Search, Status, Unit
from treesearch.methods.claims import SELF_NORMALISED, Claims
from treesearch.methods.settings import check_lam, check_whole, number


@dataclass(frozen=True, kw_only=True)
class BestOfN(Method):
    """Independent samples with importance weights.

    Args:
        n: samples a task; None draws as many as the budget allows.
        lam: λ of the target, or "auto"; it changes weights, never the samples.
    """

    name = "best_of_n"
    independent = True

    n: int | None = None
    lam: float | str = 1.0

    def __post_init__(self) -> None:
        check_whole(n=self.n)
        check_lam(self.lam)

    @property
    def claims(self) -> Claims:
        return Claims(flags=(SELF_NORMALISED,), iid=True)

    def unit(self, spec: Spec) -> Unit:
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> BestOfNSearch:
        return BestOfNSearch(problem, self.n, self.lam)


class Rollouts(Search):
    """Independent rollouts from the root, as many at a time as the engine has room for.

    Args:
        problem: the task.
        n: how many; None for as many as the budget allows.
        lam: λ of the target.
    """

    def __init__(self, problem: Problem, n: int | None, lam: float | str) -> None:
        super().__init__(problem)
        self.n, self.lam, self.num_steps = n, number(lam), problem.num_steps

    def ask(self, capacity: int) -> Segments:
        done = len(self.tree) - 1
        wanted = (INFINITE if self.n is None else self.n) - done
        count = min(wanted, self.share.less(done * self.num_steps, done, done).units(self.num_steps, 1), capacity)
        if count <= 0:
            self.status = Status.FINISHED if wanted <= 0 else Status.BUDGET
            count = 0
        keys = child_keys(self.tree.key[:1], self.num_steps + 1, np.arange(done, done + count), at_root=True)
        new = self.tree.append(np.full(count, ROOT), np.zeros(count), keys)
        return Segments(np.full(count, ROOT), new, new)

    def check(self, leaves: Ids) -> None:
        """Look at samples before they count; they may be refused by an error."""

    def tell(self, segments: Segments) -> None:
        self.check(segments.last)
        backup.backup(self.tree, segments.last, backup.rule_of("soft", self.lam), self.lam)

    def frontier(self) -> Ids:
        return NO_NODES

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        del state, ends
        self.tree.check_levels(np.array([self.num_steps + 1, 0]))
        backup.recompute(self.tree, backup.rule_of("soft", self.lam), self.lam)


class BestOfNSearch(Rollouts):
    """Rollouts, weighed."""

    def readout(self) -> Readout:
        leaves = self.told
        u = scaled(self.lam, self.tree.reward[leaves])
        log_w = u + self.tree.log_w[leaves]
        log_z = log_mean(log_w)
        found = genealogy.interval([genealogy.independent(log_w, u)]) if log_z > -math.inf else None
        return Readout(leaves, log_w, log_z if len(leaves) else None, log_mean_se(log_w), interval=found)
