"""Best-of-N: independent samples, all of them kept.

    x_0^(i) ~ p,   log w_i = λ r(x_0^(i)) + Σ log p/q

Its weights make it self-normalised importance sampling: Ẑ = (1/N) Σ w_i is unbiased for Z, `draw` is consistent for π
with error O(1/√ESS), and `best` is the greedy answer. Cost: N·T NFE. The baseline every search must beat.

With drafts a candidate is looked at before it is finished: a cheap walk on the noise of its own rollout, whose reward
says how good that will be. Two uses of one pass:

    draft=10               a search: the best drafts are finished, greedy, no Z (`treesearch.methods.racing`)
    draft=(5, 10)          the same, read twice before they are
    draft=10, floor=.1     draws of π: each is finished with a probability >= floor and weighs its inverse; Ẑ stays
                           unbiased (`treesearch.methods.two_phase`)
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
from treesearch.methods.base import NO_NODES, Ids, Method, Problem, Readout, Search, Spent, Status, Unit
from treesearch.methods.claims import GREEDY, SELF_NORMALISED, Claims
from treesearch.methods.racing import RacingSearch
from treesearch.methods.settings import as_levels, check_drafts, check_lam, check_whole, number
from treesearch.methods.two_phase import TwoPhaseSearch
from treesearch.rewards.numeric import is_number

GREEDY_DRAFTS = Claims(flags=(GREEDY,), weighs=False, no_interval="greedy: no Z is estimated")


@dataclass(frozen=True, kw_only=True)
class BestOfN(Method):
    """Independent samples with importance weights, all of them or those whose drafts are good.

    Args:
        n: samples a task, with drafts candidates; None draws as many as the budget allows.
        lam: λ of the target, or "auto"; it changes weights, and what a floor finishes.
        draft: evaluations of a draft, or of several in turn; None for none.
        floor: least probability that a drafted candidate is finished; None searches and finishes the best.
    """

    name = "best_of_n"
    independent = True

    n: int | None = None
    lam: float | str = 1.0
    draft: int | tuple[int, ...] | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        check_whole(n=self.n)
        check_lam(self.lam)
        if isinstance(self.draft, (list, tuple)):
            object.__setattr__(self, "draft", as_levels("draft", self.draft))
        check_drafts(self.draft)
        if self.floor is not None and not (is_number(self.floor, 0, 1) and self.floor > 0):
            raise ValueError(f"floor is {self.floor!r}, expected a probability in (0, 1]")
        if self.floor is not None and len(self.rungs) != 1:
            raise ValueError(f"floor says how often a draft is finished: use it with one draft, got draft={self.draft}")
        object.__setattr__(self, "independent", not self.rungs)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Evaluations of each draft of a candidate."""
        return self.draft if isinstance(self.draft, tuple) else () if self.draft is None else (self.draft,)

    @property
    def claims(self) -> Claims:
        if self.rungs and self.floor is None:
            return GREEDY_DRAFTS
        return Claims(flags=(SELF_NORMALISED,), iid=not self.rungs)

    def unit(self, spec: Spec) -> Unit:
        for m in self.rungs:
            spec.draft_prices(m)
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> Search:
        if not self.rungs:
            return BestOfNSearch(problem, self.n, self.lam)
        if self.floor is None:
            return RacingSearch(problem, self.n, self.rungs)
        return TwoPhaseSearch(problem, self.n, self.lam, self.rungs[0], self.floor)


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
        count = min(wanted, self.left.units(self.num_steps, 1), capacity)
        if count <= 0:
            self.status = Status.FINISHED if wanted <= 0 else Status.BUDGET
            count = 0
        keys = child_keys(self.tree.key[:1], self.num_steps + 1, np.arange(done, done + count), at_root=True)
        new = self.tree.append(np.full(count, ROOT), np.zeros(count), keys)
        return Segments(np.full(count, ROOT), new, new)

    @property
    def spent(self) -> Spent:
        done = len(self.tree) - 1
        return Spent(done * self.num_steps, done, done)

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
