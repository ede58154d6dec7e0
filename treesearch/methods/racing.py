"""Best-of-N that finishes the best drafts only: `BestOfN(draft=...)` as a search.

    trials   the first candidates are read at every rung and finished, and more while it is in doubt whether drafts
             pay, and later ones while they are off
    wave     finish those that the plan finds worth it, or read them at the next rung; where there are none, draw more

`treesearch.core.reservation` has the plan and its formulas. A candidate is a child of the root at level T with the key
that it has in best-of-N, and its reading the reward of that node; a further rung is a node of the same key. A finished
one is best-of-N's sample, bit for bit, so that the best here is the best of a subset of those. Drafts that predict
nothing cost the trials': then candidates are finished as they come. Towards the end of a budget what is left goes to
the best drafts that wait. Every draft leaves enough to finish one, and nothing is tried that cannot be finished: a
budget that pays for no trial is best-of-N. So is a search that has found no finite reward in its trials, until it does.

Greedy: samples are no draws of π, no Z is estimated. Log p/q of proposals are not looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from treesearch.budget import INFINITE, Share
from treesearch.core import backup, reservation
from treesearch.core.backup import Rule
from treesearch.core.noise import child_keys
from treesearch.core.reservation import Line, Plan
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.errors import StoreError
from treesearch.methods.base import NO_NODES, Ids, Problem, Readout, Search, Spent, Status

TRIALS, LATER = 16, 16  # candidates that are tried at first, and of those finished later one in so many
DOUBTFUL = 64  # pairs that a plan is tried for whose gain is in doubt
WAVE, GROWTH = 32, 8  # candidates of a wave: at least, and all so far over this
AT_ONCE = 4  # of a wave's size: at most one in so many is finished before the rewards are looked at again


class RacingSearch(Search):
    """One task's candidates.

    Args:
        problem: the task.
        n: how many candidates; None for as many as the budget allows.
        drafts: evaluations of each rung.
    """

    def __init__(self, problem: Problem, n: int | None, drafts: tuple[int, ...]) -> None:
        super().__init__(problem)
        self.n, self.drafts, self.num_steps = n, drafts, problem.num_steps
        self.nfe = [int(problem.spec.draft_prices(m)[-1]) for m in drafts] + [self.num_steps]
        self.seen = np.empty((len(drafts) + 1, 0))  # rewards by rung and candidate, NaN where it was not read
        self.node = np.empty(0, np.int64)  # of a candidate's last draft, ROOT where it has none
        self.rungs: list[list[int]] = []  # rung of the drafts in order, as [rung, how many]
        self.pending: tuple[int, Ids] = (0, NO_NODES)
        self.trial = (0, 0)  # first of the candidates that are tried together, and the one behind the last
        self.plan: Plan | None = None
        self.lines: dict[tuple[int, int], Line] = {}
        self.scores = self.seen

    @property
    def last(self) -> int:
        """The rung of finished samples."""
        return len(self.drafts)

    def ask(self, capacity: int) -> Segments:
        del capacity  # the result depends on the wave, never on the batch size
        rung, who = self._decide()
        if not len(who):
            over = self.n is not None and len(self.node) >= self.n
            self.status = Status.FINISHED if over else Status.BUDGET
            return Segments(NO_NODES, NO_NODES, NO_NODES)
        self._enter(who)
        keys = child_keys(self.tree.key[:1], self.num_steps + 1, who, at_root=True)
        finish = rung == self.last
        above = self.node[who] if finish else np.full(len(who), ROOT)
        new = self.tree.append(above, np.full(len(who), 0 if finish else self.num_steps), keys)
        self._sent(rung, who, new)
        return Segments(above, new, new, draft=0 if finish else self.drafts[rung], paid=False)

    def _enter(self, who: Ids) -> None:
        """Make room for candidates."""
        more = int(who.max()) + 1 - len(self.node)
        if more > 0:
            self.node = np.append(self.node, np.full(more, ROOT))
            self.seen = np.pad(self.seen, ((0, 0), (0, more)), constant_values=np.nan)

    def _sent(self, rung: int, who: Ids, new: Ids) -> None:
        """New nodes read the candidates at a rung."""
        self.pending = rung, who
        if rung == self.last:
            return
        self.node[who] = new
        if self.rungs and self.rungs[-1][0] == rung:
            self.rungs[-1][1] += len(who)
        else:
            self.rungs.append([rung, len(who)])

    def tell(self, segments: Segments) -> None:
        rung, who = self.pending
        self.seen[rung, who] = self.tree.reward[segments.last]
        if rung == self.last:
            backup.backup(self.tree, segments.last, Rule.MAX, math.inf)

    def _decide(self) -> tuple[int, Ids]:
        """The rung and the candidates that are read at it; nobody where the budget ends."""
        rung, who = self._on_trial()
        if len(who):
            return rung, who
        if self._found:
            self._learn()
        if len(who := self._trials()):
            return 0, who
        if not self._found:
            return self._plain()
        for rung, who in self._planned():
            if len(found := self._afford(rung, who)):
                return rung, found
        return self._rest()

    def _planned(self) -> Iterator[tuple[int, Ids]]:
        """Readings by plan, the most urgent first: of drafts that are worth it, then of new candidates."""
        assert self.plan is not None
        at = self._at()
        for rung, following in reversed(list(itertools.pairwise(self.plan.rungs))):
            waiting = np.flatnonzero(at == rung)
            worth = self.plan.worth(rung, self.scores[rung, waiting])
            ready = waiting[np.argsort(-worth, kind="stable")][: int((worth > 0).sum())]
            yield following, ready[: self._wave // AT_ONCE if following == self.last else None]
        yield self.plan.rungs[0], self._fresh(self._wave)

    def _on_trial(self) -> tuple[int, Ids]:
        """The next reading of candidates on trial."""
        who = np.arange(*self.trial)
        who = who[np.isnan(self.seen[self.last, who])]
        rungs = (~np.isnan(self.seen[:, who])).sum(0)
        rung = int(rungs.min(initial=self.last))
        return rung, self._afford(rung, who[rungs == rung])

    def _trials(self) -> Ids:
        """New ones, where pairs of some rung are few for what is finished, or for a plan that may gain."""
        whole = self._left.units(sum(self.nfe), len(self.nfe))  # trials that are not finished teach nothing
        who = self._fresh(min(max(self._untried(), 0), whole))
        self.trial = len(self.node), len(self.node) + len(who)
        return who

    def _untried(self) -> int:
        """Trials that lack; no more than the first while nothing finite is found."""
        done = ~np.isnan(self.seen[self.last])
        pairs = int((~np.isnan(self.seen[: self.last]) & done).sum(1).min(initial=len(done)))
        if not self._found or self.plan is None:
            return TRIALS - pairs
        least = min(pairs + TRIALS, DOUBTFUL) if self.plan.doubtful else TRIALS
        return max(least, int(done.sum()) // LATER) - pairs

    @property
    def _found(self) -> bool:
        """Whether a finished sample is allowed at all."""
        return bool((self.seen[self.last] > -np.inf).any())

    def _plain(self) -> tuple[int, Ids]:
        """Where nothing finite is found: finish the candidates read furthest, the best first, then new ones."""
        at = self._at()
        waiting = np.flatnonzero(at >= 0)
        order = np.lexsort((-self.seen[at[waiting], waiting], -at[waiting]))
        ready = waiting[order] if len(waiting) else self._fresh(self._wave)
        return self.last, self._afford(self.last, ready[: self._wave])

    def _fresh(self, count: int) -> Ids:
        """Candidates that were not drawn yet."""
        limit = self.share.iterations if self.n is None else min(self.n, self.share.iterations)
        return np.arange(len(self.node), min(len(self.node) + count, limit))

    def _afford(self, rung: int, who: Ids) -> Ids:
        """Those of them that the budget pays for; drafts leave enough to finish one."""
        left = self._left if rung == self.last else self._left.less(self.num_steps, 1, 0)
        return who[: left.units(self.nfe[rung], 1)]

    @property
    def _left(self) -> Share:
        """What is not spent, of NFE and reward calls."""
        return replace(self.left, iterations=INFINITE)

    @property
    def spent(self) -> Spent:
        read = (~np.isnan(self.seen)).sum(1)
        return Spent(int(read @ self.nfe), int(read.sum()), len(self.node))

    def _rest(self) -> tuple[int, Ids]:
        """Where nothing can be drawn any more: what is left of a budget goes to the best drafts, then to fresh ones."""
        if self.n is not None and len(self.node) >= self.n:
            return self.last, NO_NODES
        best = float(np.nanmax(self.scores[self.last]))
        waiting = np.flatnonzero(self._at() >= 0)
        hope = np.array([self._hope(int(who), best) for who in waiting])
        ready = waiting[np.argsort(-hope, kind="stable")] if len(waiting) else self._fresh(self._wave)
        return self.last, self._afford(self.last, ready[: self._wave])

    def _hope(self, who: int, best: float) -> float:
        """Expected improvement of finishing a candidate."""
        rung = self._at()[who]
        line = self.lines.get((rung, self.last), reservation.line(np.zeros(1), np.zeros(1)))
        return float(reservation.hoped(line.a + line.b * self.scores[rung, [who]], line.sd, best)[0])

    def _at(self) -> Ids:
        """The last rung that each unfinished candidate was read at; -1 for all others."""
        read = ~np.isnan(self.seen)
        deepest = self.last - 1 - np.argmax(read[: self.last][::-1], 0)
        return np.where(read[self.last] | ~read.any(0), -1, deepest)

    @property
    def _wave(self) -> int:
        return max(WAVE, len(self.node) // GROWTH)

    def _learn(self) -> None:
        """Scores, lines through the pairs seen, and the plan that they lead to."""
        self.scores = self._scores()
        self.lines = {}
        for r, s in itertools.combinations(range(self.last + 1), 2):
            both = ~np.isnan(self.scores[r]) & ~np.isnan(self.scores[s])
            if both.any():
                self.lines[r, s] = reservation.line(self.scores[r, both], self.scores[s, both])
        prices = [max(nfe / self.share.nfe, 1 / self.share.reward_calls) for nfe in self.nfe]
        best = float(np.nanmax(self.scores[self.last]))
        self.plan = reservation.plan(self.last, self.lines, prices, best)

    def _scores(self) -> F64:
        """Normal scores of the readings: a candidate that was read on stands for those near it that were not."""
        read, scores = ~np.isnan(self.seen), np.full(self.seen.shape, np.nan)
        mass = np.ones(self.seen.shape)
        for rung, reward in enumerate(self.seen):
            before = int(np.argmax(read[:rung].sum(1))) if rung else 0
            both = read[rung] & read[before]
            if rung and both.any():
                of = read[before]
                mass[rung, both] = reservation.spread(scores[before, of], read[rung, of], mass[before, of])
            if (here := read[rung]).any():
                scores[rung, here] = reservation.scores(reward[here], mass[rung, here])
        return scores

    def state(self) -> dict[str, Any]:
        first, end = self.trial
        return {"rungs": [[list(run) for run in self.rungs]] if self.rungs else [], "first": first, "end": end}

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        """Read who is who from the keys; drafts are of the rungs that are recorded."""
        del ends
        tree = self.tree
        self.trial = state["first"], state["end"]
        self.rungs = [list(run) for group in state["rungs"] for run in group]
        rung = np.repeat(*np.array(self.rungs, np.int64).reshape(-1, 2).T)
        drafts, leaves = np.flatnonzero(tree.t == self.num_steps), np.flatnonzero(tree.t == 0)
        if len(rung) != len(drafts) or len(drafts) + len(leaves) != len(tree) - 1:
            raise StoreError("the recorded drafts are not those of the tree: damaged run")
        keys = child_keys(tree.key[:1], self.num_steps + 1, np.arange(len(tree)), at_root=True)
        order = np.argsort(keys)
        who = order[np.minimum(np.searchsorted(keys, tree.key, sorter=order), len(keys) - 1)]
        if not np.array_equal(keys[who[1:]], tree.key[1:]):
            raise StoreError("a recorded noise key is none of a candidate: damaged run")
        self._enter(who[1:])
        self.node[who[drafts]] = drafts
        self.seen[rung, who[drafts]] = tree.reward[drafts]
        self.seen[self.last, who[leaves]] = tree.reward[leaves]
        backup.recompute(tree, Rule.MAX, math.inf)

    def frontier(self) -> Ids:
        return NO_NODES  # x_T of a draft costs nothing to make again

    def readout(self) -> Readout:
        leaves = self.tree.leaves
        read = (~np.isnan(self.seen)).sum(1)
        extra: dict[str, Any] = {
            "drafts": dict(zip(self.drafts, map(int, read), strict=False)),
            "finished": len(leaves),
        }
        if self.plan is not None:
            extra["plan"] = [self.drafts[rung] for rung in self.plan.rungs if rung < self.last]
            known = {m: self._correlation(r) for r, m in enumerate(self.drafts) if (r, self.last) in self.lines}
            extra["correlation"] = known
        return Readout.greedy(leaves, **extra)

    def _correlation(self, rung: int) -> float:
        """Of the scores of a rung with those of finished samples, for candidates as they come."""
        line = self.lines[rung, self.last]
        return line.b / math.hypot(line.b, line.sd)
