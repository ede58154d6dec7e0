"""Drafts under way: rows that walk from a node to x_0 several steps at a time, a batch a pass.

A draft evaluates the network at a few levels of the chain and leaps from each to the next, with the noise that the
steps between would have taken (`treesearch.backends.chains.coarse`). It adds no node: where it ends is scored, and the
node that it began at gets the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Kernel, optional
from treesearch.backends.chains.coarse import Coarse
from treesearch.budget import Cost
from treesearch.core.noise import draft_keys, sums_of_normals
from treesearch.engine.asking import as_states
from treesearch.engine.flight import Flight, grouped
from treesearch.engine.model import Model
from treesearch.engine.segments import Ids


class Leaps:
    """Drafts of one number of evaluations, as arrays and a network know them.

    Args:
        model: whose kernel, or the one that drafts for it, is asked.
        evaluations: of a draft from T.
    """

    def __init__(self, model: Model, evaluations: int) -> None:
        self.model, self.prices = model, np.array(model.spec.draft_prices(evaluations))
        other: Kernel | None = optional(model.kernel, "drafter")
        self.kernel = model.kernel if other is None else other
        self.chain = Coarse(model.kernel.chain, model.spec.draft_levels(evaluations))  # type: ignore[attr-defined]
        self.below, self.left = self.chain.below.cpu().numpy(), self.chain.evaluations
        self._offset = optional(model.kernel, "offset")

    def charge(self, cost: Cost, t: Ids) -> None:
        """Enter whole drafts from levels t."""
        cost.nfe += int(self.prices[t].sum())
        cost.draft_nfe += int(self.prices[t].sum())

    def leap(self, x: Tensor, t: Ids, task: Ids, key: NDArray[np.uint64]) -> tuple[Tensor, int]:
        """One evaluation: states at the levels below[t], and how many rows of padding went along.

        Args:
            x: states (n, *state).
            t, task: theirs, (n,).
            key: of their noise, (n,).
        """
        model, spec = self.model, self.model.spec
        law, padding = model.evaluate(x, t, task, self.kernel)
        noise = sums_of_normals(key, self.chain.weights[t], int(np.prod(spec.noise_shape)))
        z = torch.from_numpy(noise).reshape(len(t), *spec.noise_shape).to(spec.device)
        offset = None if self._offset is None else self._offset(x, model.conditioning(task))
        reached = self.chain.law(x, torch.from_numpy(t).to(spec.device), law, offset).sample(z)
        return model.finite(as_states(reached, len(t), spec, "a draft"), t), padding


@dataclass
class Rows:
    """Rows under way, in the order that they came."""

    flight: NDArray[np.object_]
    row: Ids  # in its flight
    x: Tensor
    t: Ids
    key: NDArray[np.uint64]

    def take(self, at: Ids) -> Rows:
        """Some of them."""
        return Rows(self.flight[at], self.row[at], self.x[torch.from_numpy(at)], self.t[at], self.key[at])

    def join(self, other: Rows) -> Rows:
        """Others behind them."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _COLUMNS}
        return Rows(x=torch.cat([self.x, other.x]), **columns)

    @property
    def task(self) -> Ids:
        """Of each, (n,)."""
        return np.array([flight.task[row] for flight, row in zip(self.flight, self.row, strict=True)], np.int64)

    def flights(self) -> Iterator[tuple[Flight, Ids]]:
        """Whose they are: each flight with the positions of its rows."""
        of = {id(flight): flight for flight in self.flight}
        names = np.array([id(flight) for flight in self.flight], np.int64)
        for name, at in grouped(names):
            yield of[name], at


_COLUMNS = ("flight", "row", "t", "key")


class Drafting:
    """Rows that are drafted.

    Args:
        model: evaluates them.
        done: takes rows of a flight with the x_0 of their drafts.
    """

    def __init__(self, model: Model, done: Callable[[Flight, Ids, Tensor], None]) -> None:
        self.model, self.done = model, done
        self._leaps: dict[int, Leaps] = {}  # by evaluations, as what is under way
        self._rows: dict[int, Rows] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def clear(self) -> None:
        """Forget everything under way."""
        self._rows.clear()

    def add(self, flight: Flight, rows: Ids, x: Tensor) -> None:
        """Rows at the states x (n, *state) of their last nodes."""
        for evaluations, at in grouped(flight.draft[rows]):
            if evaluations not in self._leaps:
                self._leaps[evaluations] = Leaps(self.model, evaluations)
            mine, t = rows[at], flight.t[rows[at]]
            self._leaps[evaluations].charge(flight.cost, t)
            key = np.where(flight.hold[mine], draft_keys(flight.key[mine], t), flight.key[mine])
            flights = np.empty(len(at), object)
            flights[:] = [flight] * len(at)
            self._put(evaluations, Rows(flights, mine, x[torch.from_numpy(at)], t, key))

    def step(self) -> None:
        """One pass over up to a batch of rows, those with most evaluations left first."""
        evaluations = next(iter(self._rows))
        rows, leaps = self._rows.pop(evaluations), self._leaps[evaluations]
        order = np.argsort(-leaps.left[rows.t], kind="stable")
        size = self.model.batch_size
        going, rest = rows.take(np.sort(order[:size])), rows.take(np.sort(order[size:]))
        t = going.t
        going.x, padding = leaps.leap(going.x, t, going.task, going.key)
        for flight, at in going.flights():
            self.model.charge_work(flight.cost, t[at], t[at], padding)
            padding = 0
        going.t = leaps.below[t]
        over = going.t == 0
        self._put(evaluations, rest)
        self._put(evaluations, going.take(np.flatnonzero(~over)))
        ended = going.take(np.flatnonzero(over))
        for flight, at in ended.flights():
            self.done(flight, ended.row[at], ended.x[torch.from_numpy(at)])

    def _put(self, evaluations: int, rows: Rows) -> None:
        if len(rows.t):
            known = self._rows.get(evaluations)
            self._rows[evaluations] = rows if known is None else known.join(rows)
