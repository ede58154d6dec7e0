"""Two-phase sampling: `BestOfN(draft=..., floor=...)` with draws of π and an unbiased Ẑ.

    wave 1     a sixteenth of the budget: every candidate is drafted and finished
    wave k     three times all before: what pairs of earlier waves say of drafts decides how many candidates there are,
               and which of them are finished, with which probability π_i >= floor

    Ẑ = Σ α_k Ẑ_k,   a finished sample of wave k weighs α_k w_i / (N_k π_i)

`treesearch.core.two_phase` has Ẑ_k, its π and its proof. α_k follows from the planned sizes alone, in rollouts of
best-of-N. A candidate is a child of the root at level T with the key that it has in best-of-N, and d_i the reward of
that node; its sample is the node's only child, bit for bit that of best-of-N. Where drafts do not pay, or pairs
teach nothing, a wave is best-of-N; so are budgets of fewer than 64 rollouts.

log Ẑ and the draws come of two estimates, the difference estimator and Horvitz-Thompson weights: weights are scaled so
that their log-mean-exp is log Ẑ, which changes no draw.

The interval takes the terms T_i of Ẑ for independent; the head of `treesearch.core.two_phase` says when that is too
wide. Totals of finished samples, w_i / π_i, show a heavy tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from treesearch.budget import INFINITE, Share
from treesearch.core import backup, two_phase
from treesearch.core.noise import Stream, child_keys, uniforms
from treesearch.core.tree import ROOT
from treesearch.core.two_phase import Fit, Pairs, Terms
from treesearch.core.weights import F64, log_sum, scaled
from treesearch.engine.segments import Segments
from treesearch.errors import StoreError
from treesearch.methods import genealogy, population
from treesearch.methods.base import NO_NODES, Ids, Problem, Readout, Search, Spent, Status
from treesearch.methods.claims import Interval, Standing
from treesearch.methods.settings import number
from treesearch.methods.tree_sampling import FIRST, GROWTH, SMALLEST, TIMED_FIRST, TIMED_MOST

TRIED = 2 * two_phase.FEWEST  # pairs from which nothing is learnt, after which there are no drafts
SOURCE = "terms of the difference estimator (Särndal, Swensson and Wretman, 1992)"


@dataclass
class Wave:
    """Candidates that are decided on together.

    Args:
        size: rollouts that it was planned for.
        count: N.
        finish: K.
        drafted: whether there are drafts.
        first: ordinal of its first candidate.
        log_m, pi: of the candidates (N,), once they are drafted.
        chosen: positions of those that are finished (K,), increasing.
        nodes, leaves: drafts and samples so far.
    """

    size: int
    count: int
    finish: int
    drafted: bool
    first: int
    fit: Fit | None
    nodes: Ids = field(default_factory=lambda: NO_NODES)
    leaves: Ids = field(default_factory=lambda: NO_NODES)
    u: F64 = field(default_factory=lambda: np.empty(0))
    log_w: F64 = field(default_factory=lambda: np.empty(0))
    pi: F64 = field(default_factory=lambda: np.empty(0))
    chosen: Ids = field(default_factory=lambda: NO_NODES)

    @property
    def log_m(self) -> F64:
        """log m (N,); -inf where there is no fit."""
        return np.full(self.count, -math.inf) if self.fit is None else self.fit.m(self.u)

    @property
    def log_totals(self) -> F64:
        """log w / (N π) of the finished ones (K,)."""
        return self.log_w - np.log(self.pi[self.chosen]) - math.log(self.count)


class TwoPhaseSearch(Search):
    """One task's waves.

    Args:
        problem: the task.
        n: how many candidates; None for as many as the budget allows.
        lam: λ of the target.
        draft: evaluations of a draft.
        floor: least π.
    """

    def __init__(self, problem: Problem, n: int | None, lam: float | str, draft: int, floor: float) -> None:
        super().__init__(problem)
        self.n, self.lam, self.draft, self.floor = n, number(lam), draft, floor
        self.num_steps = problem.num_steps
        self.nfe = int(problem.spec.draft_prices(draft)[-1])
        self.waves: list[Wave] = []
        self.open: Wave | None = None

    @property
    def busy(self) -> bool:
        """Whether candidates wait for what is decided on together."""
        return self.open is not None

    def frontier(self) -> Ids:
        return NO_NODES  # x_T of a draft costs nothing to make again

    def ask(self, capacity: int) -> Segments:
        wave = self.open or self._begin()
        if wave is None:
            self.status = Status.FINISHED if self.n is not None and self.n <= self._total else Status.BUDGET
            return Segments(NO_NODES, NO_NODES, NO_NODES)
        above, level, keys = self._next(wave, capacity)
        new = self.tree.append(above, np.full(len(above), level), keys)
        self._place(wave, new, level)
        return Segments(above, new, new, draft=self.draft if level else 0, paid=False)

    def _next(self, wave: Wave, most: int) -> tuple[Ids, int, Any]:
        """Parents, level and keys of the wave's next nodes, at most so many."""
        draft = wave.drafted and len(wave.nodes) < wave.count
        at = len(wave.nodes) if draft else len(wave.leaves)
        who = np.arange(wave.count) if draft else wave.chosen
        who = who[at : at + most]
        above = wave.nodes[who] if wave.drafted and not draft else np.full(len(who), ROOT)
        keys = child_keys(self.tree.key[:1], self.num_steps + 1, wave.first + who, at_root=True)
        return above, self.num_steps if draft else 0, keys

    def _place(self, wave: Wave, new: Ids, level: int) -> None:
        if level:
            wave.nodes = np.append(wave.nodes, new)
        else:
            wave.leaves = np.append(wave.leaves, new)

    def tell(self, segments: Segments) -> None:
        wave = self.open
        assert wave is not None
        leaves = segments.last[self.tree.t[segments.last] == 0]
        if len(leaves):
            backup.backup(self.tree, leaves, backup.rule_of("soft", self.lam), self.lam)
        self._told(wave)

    def _told(self, wave: Wave) -> None:
        """Decide who is finished once all are drafted; close the wave once those are."""
        tree = self.tree
        if wave.drafted and len(wave.nodes) == wave.count and not len(wave.chosen):
            wave.u = scaled(self.lam, tree.reward[wave.nodes]) + tree.log_w[wave.nodes]
            self._choose(wave)
        if len(wave.leaves) and len(wave.leaves) == len(wave.chosen):
            wave.log_w = scaled(self.lam, tree.reward[wave.leaves]) + tree.edge_weights(wave.leaves)
            self.waves.append(wave)
            self.open = None

    def _choose(self, wave: Wave) -> None:
        if wave.fit is None or wave.finish >= wave.count:
            wave.pi, wave.chosen = np.ones(wave.count), np.arange(wave.count)
            return
        pi = two_phase.chances(wave.fit.s(wave.u), wave.finish, self.floor)
        offset = float(uniforms(self.problem.key, 1, len(self.waves), Stream.RESAMPLE)[0])
        wave.chosen, wave.pi = two_phase.systematic(pi, wave.u, offset)

    def _begin(self) -> Wave | None:
        """The next wave, None where the budget ends."""
        left = self._total - sum(wave.size for wave in self.waves)
        if left < 1:
            return None
        size = self._planned(left)
        self.open = self._opened(size, *self._numbers(size, left))
        return self.open

    def _opened(self, size: int, count: int, finish: int, drafted: bool) -> Wave:
        wave = Wave(size, count, finish, drafted, self._candidates, self._fit() if drafted else None)
        if not drafted:
            wave.u, wave.pi, wave.chosen = np.full(count, -math.inf), np.ones(count), np.arange(count)
        return wave

    @property
    def _total(self) -> int:
        """Rollouts of best-of-N that the whole budget pays for."""
        fits = self.share.units(self.num_steps, 1)
        return fits if self.n is None else min(fits, self.n)

    def _planned(self, left: int) -> int:
        """Size of the next wave in rollouts; it follows from the budget and the sizes before."""
        done = sum(wave.size for wave in self.waves)
        if self.share.timed:
            size = min(max(TIMED_FIRST, GROWTH * done), TIMED_MOST)
        elif done:
            size = GROWTH * done
        else:
            size = left if left < SMALLEST else left // FIRST
        size = min(size, left, population.memory_cap(self.problem))
        whole = size < left <= min(population.memory_cap(self.problem), 2 * size)
        return left if whole else size  # no small wave at the end

    def _numbers(self, size: int, left: int) -> tuple[int, int, bool]:
        """Candidates, how many of them are finished, and whether they are drafted."""
        part = self._part(size, left)
        share = self._share(part, last=size == left)
        if share is None:
            count = part.units(self.num_steps, 1)
            return count, count, False
        count = int(min(part.iterations, 1 / self._price(part, share)))
        while count > 1 and self._most(part, count) < max(1, self.floor * count):
            count -= 1
        most = self._most(part, count)
        return count, min(most, math.ceil(share * count)) if count == part.iterations else most, True

    @property
    def spent(self) -> Spent:
        drafts = sum(wave.count for wave in self.waves if wave.drafted)
        finished = sum(wave.finish for wave in self.waves)
        return Spent(drafts * self.nfe + finished * self.num_steps, drafts + finished, self._candidates)

    def _part(self, size: int, left: int) -> Share:
        """What a wave may spend: its part of what is left of each limit."""
        rest = self.left
        wanted = INFINITE if self.n is None else self.n - self._candidates
        rest = replace(rest, iterations=min(rest.iterations, wanted))
        nfe, calls, candidates = (
            INFINITE if limit > INFINITE // 2 else limit * size // left
            for limit in (rest.nfe, rest.reward_calls, rest.iterations)
        )
        only_timed = min(nfe, calls, candidates) == INFINITE
        return Share(size * self.num_steps if only_timed else nfe, calls, candidates)

    @property
    def _candidates(self) -> int:
        return sum(wave.count for wave in self.waves)

    def _most(self, part: Share, count: int) -> int:
        """How many of so many drafts can be finished."""
        return min(count, (part.nfe - count * self.nfe) // self.num_steps, part.reward_calls - count)

    def _price(self, part: Share, share: float | None) -> float:
        """Of a candidate that is finished with a given probability, or of one without a draft, as share of `part`."""
        nfe, calls = (self.num_steps, 1.0) if share is None else (self.nfe + share * self.num_steps, 1 + share)
        return max(nfe / part.nfe, calls / part.reward_calls)

    def _share(self, part: Share, *, last: bool) -> float | None:
        """Share of the candidates to finish, None for no drafts; all of them where a later wave may learn from it."""
        if self.lam == 0 or self.floor == 1 or self._most(part, 1) < 1:
            return None
        found = self._fit()
        drafted = [wave for wave in self.waves if wave.drafted]
        if found is None:
            return None if last or sum(wave.finish for wave in drafted) >= TRIED else 1.0
        u = np.concatenate([wave.u for wave in drafted])
        return two_phase.share(found, u, self.floor, lambda share: self._price(part, share))

    def _fit(self) -> Fit | None:
        """What pairs of earlier waves say."""
        known = [(wave, share) for wave, share in zip(self.waves, self._shares(), strict=True) if wave.drafted]
        if not known:
            return None
        mass = [math.log(share / wave.count) - np.log(wave.pi[wave.chosen]) for wave, share in known]
        u, log_w = (np.concatenate(of) for of in zip(*((w.u[w.chosen], w.log_w) for w, _ in known), strict=True))
        return two_phase.fit(Pairs(u, log_w, np.concatenate(mass)))

    def _shares(self) -> F64:
        """α_k / Σα."""
        return two_phase.shares(np.array([wave.size for wave in self.waves], np.int64))

    def state(self) -> dict[str, Any]:
        waves = self.waves if self.open is None else [*self.waves, self.open]
        return {"waves": [[[w.size, int(w.drafted)], [w.count, 0], [w.finish, 0]] for w in waves]}

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        """Repeat the decisions on the recorded rewards; the recorded nodes must be the ones they lead to."""
        del ends
        at = 1
        for (size, drafted), (count, _), (finish, _) in state["waves"]:
            wave = self.open = self._opened(size, count, finish, bool(drafted))
            while self.open is not None and at < len(self.tree):
                above, level, keys = self._next(wave, len(self.tree) - at)
                new = np.arange(at, at + len(above))
                for name, want in (("parent", above), ("t", level), ("key", keys)):
                    if not np.all(getattr(self.tree, name)[new] == want):
                        raise StoreError(f"{name} of the recorded nodes is not what their rewards lead to: damaged run")
                at += len(new)
                self._place(wave, new, level)
                self._told(wave)
        if at < len(self.tree):
            raise StoreError("the recorded waves are smaller than the tree: damaged run")
        backup.recompute(self.tree, backup.rule_of("soft", self.lam), self.lam)

    def readout(self) -> Readout:
        if not self.waves:
            return Readout(np.empty(0, np.int64), np.empty(0))
        terms, shares = [_terms(wave) for wave in self.waves], self._shares()
        found = two_phase.combine(terms, shares)
        log_w = np.concatenate([math.log(s) + wave.log_totals for wave, s in zip(self.waves, shares, strict=True)])
        leaves = np.concatenate([wave.leaves for wave in self.waves])
        extra: dict[str, Any] = {
            "waves": [[wave.count, wave.finish] for wave in self.waves],
            "drafted": [wave.drafted for wave in self.waves],
            "log_z_waves": [math.log(each.mean) + each.log_unit if each.mean > 0 else None for each in terms],
        }
        scale = math.log(len(leaves))
        if found.log_z == -math.inf:
            return Readout(leaves, log_w + scale, -math.inf, warnings=self._unused(), extra=extra)
        if math.isnan(found.log_z):
            reason = f"Ẑ = {found.relative:.2g} ± {found.error:.2g}: drafts mislead here; spend more, or raise floor"
            known = Interval(source=SOURCE, standing=Standing.NOT_POSITIVE, reason=reason)
            return Readout(leaves, log_w + scale, interval=known, extra=extra)
        known = genealogy.stated(SOURCE, found.log_z, found.apart, log_w - found.log_z)
        log_w += scale + found.log_z - log_sum(log_w)
        return Readout(leaves, log_w, found.log_z, known.se, self._unused(), extra, known)

    def _unused(self) -> list[str]:
        """What a reader must know where every candidate was finished."""
        if any(wave.finish < wave.count for wave in self.waves):
            return []
        return [f"drafts decided nothing, all was finished as in best-of-N: {self._why()}"]

    def _why(self) -> str:
        if self.floor == 1:
            return "floor is 1, lower it"
        if self.lam == 0:
            return "all samples weigh the same at λ = 0"
        if self._total < SMALLEST:
            return f"fewer than {SMALLEST} rollouts are too few to learn from, raise the budget"
        if self._fit() is None:
            return f"fewer than {two_phase.FEWEST} drafted samples carry weight, or all weigh the same"
        return "they say too little of the samples for their price"


def _terms(wave: Wave) -> Terms:
    return two_phase.terms(wave.log_m, wave.log_w, wave.pi, wave.chosen)
