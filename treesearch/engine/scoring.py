"""Rows on their way from a state to a reward: those that wait for one, and those that have it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treesearch.engine.flight import Flight, cat, grouped
from treesearch.engine.model import Model
from treesearch.engine.segments import Ids
from treesearch.rewards.base import RewardError

Part = tuple[Flight, Ids]
"""Rows of a flight."""
Names = Callable[[Flight, Ids], list[str]]
"""What errors call the last nodes of rows."""


def names(flight: Flight, rows: Ids) -> list[str]:
    """By their number, level and task."""
    nodes = [(int(flight.task[i]), int(flight.last[i])) for i in rows]
    return [f"node {node} (t = {flight.trees[task].t[node]}) of task {task}" for task, node in nodes]


class Scoring:
    """Scores rows in batches and enters their rewards into the trees.

    Args:
        model: decodes and scores.
        away: takes the samples of rows whose rewards are given elsewhere; None scores them here.
        names: says which nodes an error is about.
    """

    def __init__(
        self, model: Model, away: Callable[[Flight, Ids, Any], None] | None = None, names: Names = names
    ) -> None:
        self.model, self.away, self.names = model, away, names
        self.clear()

    def clear(self) -> None:
        """Forget everything under way."""
        self._waiting: list[tuple[Flight, Ids, Tensor]] = []
        self._given: list[tuple[Flight, Ids, NDArray[np.float64]]] = []  # held rows whose reward came with their law
        self._arrived: list[Part] = []  # scored, and not collected yet

    def add(self, flight: Flight, rows: Ids, x: Tensor) -> None:
        """Rows with what is to be scored of them: states x_0 or endpoints, (n, *state)."""
        self._waiting.append((flight, rows, x))

    def give(self, flight: Flight, rows: Ids, rewards: NDArray[np.float64]) -> None:
        """Rows whose rewards are known."""
        self._given.append((flight, rows, rewards))

    def collect(self) -> list[Part]:
        """Rows that were scored since, where `run` was mixed."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def run(self, at_least: int, *, mixed: bool = False) -> None:
        """Score what waits once it fills a batch, of one wave or (mixed) of several."""
        while self._given:
            self._record(*self._given.pop(0), mixed)
        while self._waiting and sum(len(rows) for _, rows, _ in self._waiting) >= at_least:
            parts, states, room = [], [], self.model.batch_size
            while self._waiting and room > 0 and self._belongs(self._waiting[0], parts, mixed):
                flight, rows, x = self._waiting.pop(0)
                if len(rows) > room:
                    self._waiting.insert(0, (flight, rows[room:], x[room:]))
                    rows, x = rows[:room], x[:room]
                room -= len(rows)
                parts.append((flight, rows))
                states.append(x)
            rewards = self._rewards(cat(states), parts)
            for flight, rows in parts:
                reward, rewards = rewards[: len(rows)], rewards[len(rows) :]
                self._record(flight, rows, reward, mixed)

    def _belongs(self, next_: tuple[Flight, Ids, Tensor], parts: list[Part], mixed: bool) -> bool:
        """Whether rows may be scored with those before them: of one wave unless mixed, and drawn by one decoder."""
        if not parts:
            return True
        alike = not self.model.spec.previews or next_[0].previewed[next_[1][0]] == parts[0][0].previewed[parts[0][1][0]]
        return alike and (mixed or next_[0] is parts[0][0])

    def _record(self, flight: Flight, rows: Ids, reward: NDArray[np.float64], mixed: bool) -> None:
        """Enter the rewards of rows."""
        for i, mine in grouped(flight.task[rows]):
            flight.trees[i].reward[flight.last[rows[mine]]] = reward[mine]
        flight.unscored -= len(rows)
        if mixed:
            self._arrived.append((flight, rows))

    def _rewards(self, x: Tensor, parts: list[Part]) -> NDArray[np.float64]:
        """Rewards (n,) of states (n, *state), counted; errors name the node.

        Raises:
            RewardError: the reward raised or broke its contract.
        """
        flight, rows = parts[0]
        began = time.perf_counter()
        samples = self.model.samples(x, endpoints=bool(flight.previewed[rows[0]]))
        if self.model.reward.input == "sample":
            for flight, rows in parts:
                flight.cost.decodes += len(rows)
        if self.away is not None:
            _spend(parts, time.perf_counter() - began)
            return self._sent(samples, parts)
        try:
            values, calls = self.model.score(samples, np.concatenate([flight.task[rows] for flight, rows in parts]))
        except RewardError as error:
            found = [name for flight, rows in parts for name in self.names(flight, rows)]
            named = ", ".join(found[i] for i in (error.rows[:4] or range(min(4, len(found)))))
            raise RewardError(f"{error} [{named}]", error.rows) from error
        _spend(parts, time.perf_counter() - began)
        for flight, rows in parts:  # a cache cannot say whose samples it knew: the first part bears what it asked
            flight.cost.reward_calls += len(rows) if calls is None else calls
            calls = None if calls is None else 0
        return values

    def _sent(self, samples: Any, parts: list[Part]) -> NDArray[np.float64]:
        """Hand samples to where they are scored; zeros stand for their rewards."""
        assert self.away is not None
        at = 0
        for flight, rows in parts:
            self.away(flight, rows, samples[at : at + len(rows)])
            at += len(rows)
        return np.zeros(at)


def _spend(parts: list[Part], seconds: float) -> None:
    """Enter the time of decoding and scoring, a row as much as another."""
    each = seconds / sum(len(rows) for _, rows in parts)
    for flight, rows in parts:
        flight.cost.reward_seconds += each * len(rows)
