"""Drafts under way: rows that walk from a node to x_0 several steps at a time, a batch a pass.

A draft leaps down a few levels of the chain, with one evaluation each and the noise that the steps between would have
taken (`treesearch.backends.chains.coarse`); beside its state it remembers the endpoint of the leap before, by which it
finds where to evaluate. It adds no node: where it ends is scored, and the node that it began at gets the reward.

A draft from a node that is held leaps with the transition that the node holds: x_t is evaluated once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Gaussian, Kernel, Transition, describe, optional
from treesearch.backends.chains.coarse import Coarse
from treesearch.budget import Cost
from treesearch.core.noise import draft_keys, sums_of_normals
from treesearch.engine.asking import as_states
from treesearch.engine.flight import Flight, grouped
from treesearch.engine.model import Model, Work
from treesearch.engine.segments import Ids


class Leap(NamedTuple):
    """Where rows come by one evaluation each.

    Args:
        x: states (n, *state) at the levels below[t].
        end: the endpoints that they held on the way.
        at: the levels that were evaluated, (n,).
        padding: rows that went along.
    """

    x: Tensor
    end: Tensor
    at: Ids
    padding: int


class Leaps:
    """Drafts of one number of evaluations, as arrays and a network know them.

    Args:
        model: whose kernel, or the one that drafts for it, is asked.
        evaluations: of a draft from T.
    """

    def __init__(self, model: Model, evaluations: int) -> None:
        self.model = model
        self.prices, self.held = (np.array(model.spec.draft_prices(evaluations, held=held)) for held in (False, True))
        other: Kernel | None = optional(model.kernel, "drafter")
        self.kernel = model.kernel if other is None else other
        self.work = model.work if other is None else Work(other, describe(other, identify=False))
        self.chain = Coarse(model.kernel.chain, model.spec.draft_levels(evaluations))  # type: ignore[attr-defined]
        self.below, self.left = self.chain.below.cpu().numpy(), self.chain.evaluations
        self._offset = optional(model.kernel, "offset")

    def charge(self, cost: Cost, t: Ids, *, held: bool) -> None:
        """Enter whole drafts from levels t, of states that were evaluated or not."""
        nfe = int((self.held if held else self.prices)[t].sum())
        cost.nfe += nfe
        cost.draft_nfe += nfe

    def leap(
        self, x: Tensor, t: Ids, task: Ids, key: NDArray[np.uint64], end: Tensor, begun: NDArray[np.bool_]
    ) -> Leap:
        """One evaluation.

        Args:
            x: states (n, *state).
            t, task: theirs, (n,).
            key: of their noise, (n,).
            end: the endpoints of the leaps before, like x.
            begun: (n,) which rows have one.
        """
        model, spec, at = self.model, self.model.spec, np.where(begun, self.chain.probed[t], t)
        level, place = (torch.from_numpy(v).to(spec.device) for v in (t, at))
        offset = self._around(x, task)
        probe = self.chain.probe(x, level, place, end, offset)
        seen = probe.sample(self._noise(key, np.where((at < t)[:, None], self.chain.probes[t], 0.0)))
        fine, padding = model.evaluate(as_states(seen, len(t), spec, "a draft"), at, task, self.kernel)
        law = self.chain.law(x, level, place, fine, offset)
        return Leap(*self._reached(law, t, key), at, padding)

    def begin(self, x: Tensor, t: Ids, task: Ids, key: NDArray[np.uint64], held: Transition) -> tuple[Tensor, Tensor]:
        """A leap without an evaluation, with transitions that were made at x: states, and the endpoints they held."""
        level = torch.from_numpy(t).to(self.model.spec.device)
        return self._reached(self.chain.law(x, level, level, held, self._around(x, task)), t, key)

    def _reached(self, law: Gaussian, t: Ids, key: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        spec = self.model.spec
        reached = as_states(law.sample(self._noise(key, self.chain.weights[t])), len(t), spec, "a draft")
        return self.model.finite(reached, t), law.endpoint.to(reached.dtype)

    def _around(self, x: Tensor, task: Ids) -> Tensor | None:
        """The offset of the chain, where it has one."""
        return None if self._offset is None else self._offset(x, self.model.conditioning(task))

    def _noise(self, key: NDArray[np.uint64], weights: NDArray[np.float64]) -> Tensor:
        """Sums (n, *noise) of the paths' noise."""
        spec = self.model.spec
        noise = sums_of_normals(key, weights, int(np.prod(spec.noise_shape)))
        return torch.from_numpy(noise).reshape(len(key), *spec.noise_shape).to(spec.device)


@dataclass
class Rows:
    """Rows under way, in the order that they came."""

    flight: NDArray[np.object_]
    row: Ids  # in its flight
    x: Tensor
    end: Tensor  # the endpoint of the leap before, in rows that have begun
    t: Ids
    key: NDArray[np.uint64]
    begun: NDArray[np.bool_]

    def take(self, at: Ids) -> Rows:
        """Some of them."""
        columns = {name: getattr(self, name)[at] for name in _COLUMNS}
        states = torch.from_numpy(at)
        return Rows(x=self.x[states], end=self.end[states], **columns)

    def join(self, other: Rows) -> Rows:
        """Others behind them."""
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _COLUMNS}
        return Rows(x=torch.cat([self.x, other.x]), end=torch.cat([self.end, other.end]), **columns)

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


_COLUMNS = ("flight", "row", "t", "key", "begun")


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

    def add(self, flight: Flight, rows: Ids, x: Tensor, held: Transition | None = None) -> None:
        """Rows at the states x (n, *state) of their last nodes, and the transitions that these hold, if they do."""
        for evaluations, at in grouped(flight.draft[rows]):
            if evaluations not in self._leaps:
                self._leaps[evaluations] = Leaps(self.model, evaluations)
            mine, t = rows[at], flight.t[rows[at]]
            leaps, which = self._leaps[evaluations], torch.from_numpy(at)
            leaps.charge(flight.cost, t, held=held is not None)
            key = flight.key[mine] if held is None else draft_keys(flight.key[mine], t)
            start, end = x[which], torch.zeros_like(x[which])
            if held is not None:
                start, end = leaps.begin(start, t, flight.task[mine], key, held.take(which))
                t = leaps.below[t]
            flights = np.empty(len(at), object)
            flights[:] = [flight] * len(at)
            begun = np.full(len(at), held is not None)
            self._go_on(evaluations, Rows(flights, mine, start, end, t, key, begun))

    def step(self) -> None:
        """One pass over up to a batch of rows, those with most evaluations left first."""
        evaluations = next(iter(self._rows))
        rows, leaps = self._rows.pop(evaluations), self._leaps[evaluations]
        order = np.argsort(-leaps.left[rows.t], kind="stable")
        size = self.model.batch_size
        going, rest = rows.take(np.sort(order[:size])), rows.take(np.sort(order[size:]))
        began = time.perf_counter()
        leap = leaps.leap(going.x, going.t, going.task, going.key, going.end, going.begun)
        padding, each = leap.padding, (time.perf_counter() - began) / len(going.t)
        for flight, at in going.flights():
            flight.cost.model_seconds += each * len(at)
            leaps.work.charge(flight.cost, leap.at[at], leap.at[at], padding)
            padding = 0
        going.x, going.end, going.t = leap.x, leap.end, leaps.below[going.t]
        going.begun = np.ones(len(going.t), np.bool_)
        self._put(evaluations, rest)
        self._go_on(evaluations, going)

    def _go_on(self, evaluations: int, rows: Rows) -> None:
        """Put rows back, and hand on those that are at x_0."""
        over = rows.t == 0
        self._put(evaluations, rows.take(np.flatnonzero(~over)))
        ended = rows.take(np.flatnonzero(over))
        for flight, at in ended.flights():
            self.done(flight, ended.row[at], ended.x[torch.from_numpy(at)])

    def _put(self, evaluations: int, rows: Rows) -> None:
        if len(rows.t):
            known = self._rows.get(evaluations)
            self._rows[evaluations] = rows if known is None else known.join(rows)
