"""The loop of a search over all its tasks: ask every one, run the wave, tell, record, repeat.

while some task has work:
    ask each task for its part of the wave          (with lag = 1, one wave ahead)
    engine: run the segments in full batches, score them
    tell each task; enter the wave in the history and the run folder
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from treesearch.core import weights
from treesearch.interrupts import interrupts_deferred
from treesearch.methods.base import Method, Search, Status
from treesearch.rewards.base import RewardError
from treesearch.runs.log import HIT
from treesearch.session.clock import Clock
from treesearch.session.frontier import Frontier
from treesearch.session.interfaces import Runner
from treesearch.session.recorder import Recorder
from treesearch.session.wave import Staleness, Wave, merge

LARGEST = weights.LARGEST / 100  # of |r| and |λ r|: methods may add some up before they weigh them


class Loop:
    """Waves of some searches, one after another or several under way.

    Args:
        searches: one a task.
        engine: runs what they ask for.
        method: whose searches they are.
        recorder: enters the waves.
        frontier: forgets states after each; None keeps all.
        clock: limits waves by their time; None where nothing does.
        reward: its name, for errors.

    Attributes:
        under_way: waves asked and not yet recorded, in order.
        next: number of the next wave.
        staleness: of rows told so far (mode="async").
        out_of_time: whether the clock ended it.
    """

    def __init__(
        self,
        searches: Sequence[Search],
        engine: Runner,
        method: Method,
        recorder: Recorder,
        frontier: Frontier | None,
        *,
        clock: Clock | None,
        reward: str,
    ) -> None:
        self.searches, self.engine, self.method, self.recorder = searches, engine, method, recorder
        self.frontier, self.clock, self.reward = frontier, clock, reward
        self.under_way: deque[Wave] = deque()
        self.next, self.staleness, self.out_of_time = 0, Staleness(), False
        self._told = [0] * len(searches)  # rows, by task
        self._unrecorded = False  # whether a wave was told that is not recorded yet

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records of the waves, until the budget is spent."""
        return self._flow() if self.method.mode == "async" else self._in_waves()

    def stop(self) -> None:
        """Ask for nothing new."""
        for search in self.searches:
            if search.status == Status.RUNNING:
                search.status = Status.STOPPED

    def _in_waves(self) -> Iterator[dict[str, Any]]:
        """Run a wave, tell it, send the next one, record it; with a lag the next one is under way already."""
        while self._advance():
            wave = self.under_way.popleft()
            if wave.known is None:
                wave.cost = self.engine.finish(wave.number)
            else:
                for (task, segments), rewards in zip(wave.work, wave.known, strict=True):
                    self.searches[task].tree.reward[segments.last] = rewards
            self._check_sizes(wave)
            with interrupts_deferred():
                for task, segments in wave.work:
                    self.searches[task].tell(segments)
            if wave.known is None:
                self._unrecorded = True
                self._forget(wave)
                if self.engine.ahead:  # others compute while this wave is recorded
                    self._advance()
                yield self._settle(wave)

    def _check_sizes(self, wave: Wave) -> None:
        """Raises:
        RewardError: numbers of which sums or differences would not be finite.
        """
        if not wave.work:
            return
        reward = np.concatenate([self.searches[i].tree.reward[s.last] for i, s in wave.work])
        lam = self.method.lam if isinstance(self.method.lam, (int, float)) and np.isfinite(self.method.lam) else 1.0
        bad = np.isfinite(reward) & (np.abs(reward) > LARGEST / max(1.0, lam))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            task, node = [(i, node) for i, s in wave.work for node in s.last][row]
            where = f"node {node} (t = {self.searches[task].tree.t[node]}) of task {task}"
            raise RewardError(
                f"reward {self.reward!r} is {reward[row]:g}, lam {self.method.lam}: sums of such numbers are not "
                f"finite; scale it, or return -inf to forbid [{where}]"
            )

    def _settle(self, wave: Wave) -> dict[str, Any]:
        """Record a wave that was told, once its states are there."""
        self.engine.settle()
        beside: dict[str, Any] = {"staleness": self.staleness.mean()} if self.method.mode == "async" else {}
        if workers := self.engine.summary():
            beside["workers"] = workers
        record = self.recorder.record(wave, self.searches, **beside)
        self._unrecorded = False
        if self.clock is not None:
            self.clock.learn(wave)
        if workers:
            self.recorder.account(self.engine.stats)
        return record

    def _forget(self, wave: Wave) -> None:
        if self.frontier is not None:
            self.frontier.drop(wave)

    def _flow(self) -> Iterator[dict[str, Any]]:
        """Asynchronous: tell each row when it arrives and select another in its place.

        The log holds what was selected in order of selection, so rows that arrive early wait for the ones before them
        to be recorded. One record for as many rows as are in flight.
        """
        while True:
            wave = self._ask()
            if wave is not None:
                self.engine.submit(wave.number, wave.work)
                self.under_way.append(wave)
            if not self.under_way:
                return
            known = {w.number: w for w in self.under_way}
            for number, rows, cost in self.engine.collect():
                of = known[number]
                self._check_sizes(of)
                for task, count in of.tell(self.searches, rows):
                    self.staleness.add(self._told[task] - of.told[task], count)
                    self._told[task] += count
                of.cost = cost or of.cost
            done = list(itertools.takewhile(lambda w: not w.left, self.under_way))
            rows = sum(len(segments.first) for w in done for _, segments in w.work)
            if len(done) == len(self.under_way) or rows >= sum(w.left for w in self.under_way):
                for _ in done:
                    self.under_way.popleft()
                wave = merge(len(self.recorder.history), done)
                self._forget(wave)
                yield self._settle(wave)

    def _advance(self) -> bool:
        """Ask for waves until enough are in flight; whether any is."""
        ahead = self.engine.ahead if self.method.independent else 0
        while len(self.under_way) <= max(self.method.lag, ahead):
            wave = self._ask()
            if wave is None:
                break
            self.engine.submit(wave.number, wave.work)
            self.under_way.append(wave)
        return bool(self.under_way)

    def _ask(self) -> Wave | None:
        self._watch_clock()
        if self.clock is not None and self.clock.waits(len(self.under_way)):
            return None
        active = [i for i, s in enumerate(self.searches) if s.status == Status.RUNNING and not s.full]
        before = [len(s.tree) for s in self.searches]
        capacity = -(-self.engine.capacity // max(1, len(active)))
        with interrupts_deferred(), self._timed(active):
            work = [(i, self.searches[i].ask(capacity)) for i in active]
        hits = [np.empty(0, HIT)]
        for i in active:
            ended = np.empty(len(self.searches[i].hits), HIT)
            ended["task"], ended["leaf"] = i, self.searches[i].hits
            hits.append(ended)
        work = [(i, segments) for i, segments in work if len(segments.first)]
        if not work and not any(map(len, hits)):
            return None
        bounds = [(a, len(s.tree)) for a, s in zip(before, self.searches, strict=True)]
        rows = sum(len(segments.first) for _, segments in work)
        self.next += 1
        return Wave(
            self.next - 1, work, bounds, hits, [s.state() for s in self.searches], left=rows, told=list(self._told)
        )

    @contextmanager
    def _timed(self, active: Sequence[int]) -> Iterator[None]:
        """Have searches ask for no more than there is time for."""
        if self.clock is None:
            yield
            return
        asked = [self.searches[i] for i in active]
        with self.clock.limits(self.searches, asked, more=self._unrecorded or bool(self.under_way)):
            yield
        self.out_of_time |= self.clock.ended(asked)

    def _watch_clock(self) -> None:
        """Stop asking once the time is up; a population on its way may arrive, for it has no samples before."""
        if self.clock is not None and self.clock.over:
            for search in self.searches:
                if search.status == Status.RUNNING and not search.busy:
                    search.status, self.out_of_time = Status.BUDGET, True
        if self.recorder.lost is not None:
            for search in self.searches:
                if search.status == Status.RUNNING and not search.busy:
                    search.status = Status.STOPPED
