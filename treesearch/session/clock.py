"""A budget in seconds: how large a wave may be, from what the waves before it took.

    left       seconds - elapsed - what is under way
    a wave     n evaluations and c reward calls with  n·(s/NFE) + c·(s/reward call) <= left / tasks
    pace       what evaluations and rewards took in the last wave, times wall clock / both in all waves but the first

The first wave is one unit of the method for each task (on workers, one for each worker): nothing is known before it.
What it took beside evaluations and rewards is not counted, since much of that happens once. A small wave may take as
long as a larger one, whose pace is better: none begins where the quickest so far would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from treesearch.budget import Cost, Pace, Share
from treesearch.methods.base import Search, Spent, Status, Unit
from treesearch.session.interfaces import Runner
from treesearch.session.recorder import Recorder
from treesearch.session.wave import Wave


class Clock:
    """What time leaves room for.

    Args:
        seconds: of the whole search.
        recorder: knows what has passed, and what it went into.
        engine: runs the waves.
        unit: the least that a task costs.

    Attributes:
        pace: of the last wave, None before the first.
    """

    def __init__(self, seconds: float, recorder: Recorder, engine: Runner, unit: Unit) -> None:
        self.seconds, self.recorder, self.engine, self.unit = seconds, recorder, engine, unit
        self.pace: Pace | None = None
        self._quickest = math.inf  # wave
        self._last = recorder.cost.copy()  # of what is recorded
        self._first: Cost | None = None  # until the first wave was recorded
        self._scored, self._scale = 0, 1.0  # rows; seconds of the clock by those of evaluations and rewards
        self._unseen: tuple[int, int] | None = None  # what the searches had begun before

    @property
    def over(self) -> bool:
        """Whether nothing new may begin; the first work of all is asked in any case."""
        backlog = self.engine.backlog() if self.recorder.history else 0.0
        return self.recorder.elapsed() + backlog >= self.seconds

    def learn(self, wave: Wave) -> None:
        """Take the pace of a wave that was just recorded."""
        spent = self.recorder.cost.copy()
        before, self._last = self._last, spent
        model, reward = spent.model_seconds - before.model_seconds, spent.reward_seconds - before.reward_seconds
        nfe = spent.nfe + spent.repeated_nfe - before.nfe - before.repeated_nfe
        scored = sum(len(segments.last) for _, segments in wave.work)
        self._scored += scored
        if self._first is None:
            self._first = spent
        work = _seconds(spent) - _seconds(self._first)
        self._scale = (spent.seconds - self._first.seconds) / work if work > 0.0 else 1.0
        if model + reward > 0.0:
            self._quickest = min(self._quickest, self._scale * (model + reward))
            last = self.pace or Pace(0.0, 0.0)
            self.pace = Pace(
                self._scale * model / nfe if nfe else last.nfe,
                self._scale * reward / scored if scored else last.reward_call,
            )

    def waits(self, under_way: int) -> bool:
        """Whether the first wave must arrive before another can be asked for."""
        return self.pace is None and under_way > 0

    @contextmanager
    def limits(self, searches: Sequence[Search], asked: Sequence[Search], *, more: bool) -> Iterator[None]:
        """Have some of the searches begin no more than there is time for; what they have begun is paid for.

        With `more` to be learnt from waves that were begun before, a search for which nothing fits has not ended.
        """
        asked = [s for s in asked if s.spent is not None]
        left = (self.seconds - self.recorder.elapsed() - self._ahead(searches)) / max(1, len(asked))
        own = [(search, search.share, search.spent) for search in asked]
        for search in asked:
            search.share = self._share(search, left, len(asked))
        try:
            yield
        finally:
            for search, share, spent in own:
                search.share = share
                if search.status == Status.BUDGET and (more or search.spent != spent):  # the next may have room
                    search.status = Status.RUNNING

    def ended(self, searches: Sequence[Search]) -> bool:
        """Whether some search stopped for want of time alone."""
        unit = self.unit.nfe, self.unit.reward_calls
        stopped = (s for s in searches if s.status == Status.BUDGET and s.spent is not None)
        return any(s.left.units(*unit) for s in stopped)

    def _ahead(self, searches: Sequence[Search]) -> float:
        """Seconds until new work would begin: what was begun is done first."""
        spent = [search.spent or Spent(0, 0, 0) for search in searches]
        nfe, calls = (
            sum(s.nfe for s in spent) - self.recorder.cost.nfe,
            sum(s.reward_calls for s in spent) - self._scored,
        )
        if self._unseen is None:
            self._unseen = nfe, calls
        if self.pace is None:
            return 0.0
        done = self.engine.under_way()
        begun = self.pace.of(nfe - self._unseen[0], calls - self._unseen[1]) - self._scale * _seconds(done)
        return max(begun, self.engine.backlog(), 0.0)

    def _share(self, search: Search, left: float, tasks: int) -> Share:
        spent = search.spent
        assert spent is not None
        if self.pace is not None:
            seconds = (left if left * tasks >= self._quickest else 0.0) + self.pace.of(spent.nfe, spent.reward_calls)
            return replace(search.share, pace=self.pace, seconds=seconds)
        units = -(-self.engine.lanes // tasks)
        return replace(
            search.share,
            nfe=min(search.share.nfe, spent.nfe + units * self.unit.nfe),
            reward_calls=min(search.share.reward_calls, spent.reward_calls + units * self.unit.reward_calls),
        )


def _seconds(cost: Cost) -> float:
    """Of evaluations and rewards, wherever they ran."""
    return cost.model_seconds + cost.reward_seconds
