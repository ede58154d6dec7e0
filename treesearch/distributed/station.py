"""The station: runs bundles where a kernel lives.

It runs them with the engine that runs a search in one process, so that several bundles share every pass. Transitions
that ended a segment (`hold`) stay at the station; a row that finds its transition gone starts from the stored state, at
the price of one evaluation more.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.backends.base import Kernel, describe
from treesearch.budget import Cost
from treesearch.core.tree import NONE
from treesearch.distributed.bundles import Bundle, Counters, Ledger, Reply, as_numpy, as_tensor
from treesearch.engine.asking import without_graph
from treesearch.engine.engine import Engine
from treesearch.engine.flight import Flight, Held, Transitions
from treesearch.engine.model import Model
from treesearch.engine.retrace import retrace
from treesearch.engine.segments import Arrival, Ids, Leg, Segments
from treesearch.engine.states import MemoryStates
from treesearch.errors import ended
from treesearch.rewards.base import Reward
from treesearch.rewards.values import content


@dataclass
class _Running:
    bundle: Bundle
    ledger: Ledger
    flight: Flight
    beside: Cost  # walks to rebuild states, work done again
    samples: list[tuple[Ids, Any]] = field(default_factory=list)


class Station:
    """Runs bundles of one search.

    Args:
        kernel: the model.
        reward: scores what it makes, or None: samples are sent away to be scored.
        sample: whether rewards see samples, as against states; for reward = None.
        prompts, encoded, batch_size, batch_invariant: as of an `Engine`.
        guide_scores: whether the rewards that a guide computes are the search's; kernel and reward came apart.
        angle: θ of sideways edges.
        keep_inner: whether states above t = 0 are wanted.
    """

    def __init__(
        self,
        kernel: Kernel,
        reward: Reward | None,
        *,
        sample: bool = True,
        prompts: Sequence[Any] | None = None,
        encoded: dict[str, Any] | None = None,
        batch_size: int = 64,
        batch_invariant: bool = False,
        guide_scores: bool = False,
        angle: float = 0.0,
        keep_inner: bool = True,
    ) -> None:
        spec = describe(kernel)
        if encoded:
            encoded = {k: v.to(spec.device) if isinstance(v, Tensor) else v for k, v in encoded.items()}
        stub = Reward(lambda samples, prompts: None, "elsewhere", "sample" if sample else "state")
        self.model = Model(
            kernel,
            spec,
            reward or stub,
            prompts=prompts,
            encoded=encoded,
            batch_size=batch_size,
            batch_invariant=batch_invariant,
            angle=angle,
            guide_scores=guide_scores,  # equal by what they were built from they may be here all the same
        )
        self._away, self._running = reward is None, dict[int, _Running]()
        self._states = MemoryStates(spec.state_shape, spec.dtype)
        away = self._take if self._away else None
        self.engine = Engine(self.model, (), self._states, Cost(), keep_inner=keep_inner, away=away, names=self._names)
        self.counters = Counters()
        self._kept: dict[int, list[tuple[Ids, Held]]] = {}  # by bundle: rows and transitions

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._running

    @without_graph()
    def submit(self, bundle: Bundle) -> None:
        """Take a bundle."""
        for number in bundle.forget:
            self._kept.pop(number, None)
        with self._counting():
            self._begin(bundle, Cost())

    @without_graph()
    def step(self) -> list[tuple[int, Reply | Exception]]:
        """One pass: the bundles that it finished, with their replies or with what their kernel or reward raised."""
        try:
            with self._counting():
                arrivals = self.engine.step(eager=False)
        except BaseException as error:  # a kernel that calls sys.exit does not end its worker
            return self._recover(ended(error))
        return [(a.wave, self._reply(a)) for a in arrivals if a.cost is not None]

    def close(self) -> None:
        """Forget everything."""
        self.engine.abandon()
        self._running.clear()
        self._kept.clear()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts what the engine does meanwhile."""
        counters, model = self.counters, self.model
        began, passes, rows = time.perf_counter(), model.passes, model.evaluated
        try:
            yield
        finally:
            took, room = time.perf_counter() - began, (model.passes - passes) * model.batch_size
            counters.seconds += took
            counters.passes += model.passes - passes
            counters.room += room
            counters.rows += model.evaluated - rows
            if room and model.evaluated - rows == room:
                counters.full_rows += room
                counters.full_seconds += took

    def _begin(self, bundle: Bundle, lost: Cost) -> None:
        ledger = Ledger(bundle, self.model.spec.num_steps + 1)
        if bundle.states is not None:
            slots = self._states.put(as_tensor(bundle.states, self.model.spec.dtype))
            rows = np.flatnonzero(bundle.start != NONE)
            ledger.slot[1 + rows] = slots[bundle.start[rows]]
        for row, legs in bundle.legs.items():
            self._retrace(bundle, ledger, row, legs, lost)
        if gone := set(bundle.kept[bundle.kept[:, 0] != NONE, 0].tolist()) - self._kept.keys():
            raise LookupError(f"transitions of bundles {sorted(gone)} are not here any more")
        held = Transitions({task: self._held_by(bundle, task) for task in np.unique(bundle.task).tolist()})
        groups = np.stack([bundle.task, bundle.hold, bundle.draft], 1)
        work = []
        for task, hold, draft in np.unique(groups, axis=0).tolist():
            rows = np.flatnonzero((groups == (task, hold, draft)).all(1))
            of = Segments(ledger.source[rows], ledger.first[rows], ledger.last[rows], bool(hold), draft=draft)
            work.append((task, of))
        flight = self.engine.submit(bundle.number, work, ledger, held)
        assert flight is not None
        self._running[bundle.number] = _Running(bundle, ledger, flight, lost)

    def _retrace(self, bundle: Bundle, ledger: Ledger, row: int, legs: list[Leg], cost: Cost) -> None:
        """Walk to the state that a row starts from."""
        x = None if bundle.start[row] == NONE else self._states.get(ledger.slot[[1 + row]])[0]
        for leg in legs:
            x = retrace(self.model, int(bundle.task[row]), leg, x, cost)
        assert x is not None
        ledger.slot[1 + row] = self._states.put(x[None])[0]

    def _held_by(self, bundle: Bundle, task: int) -> list[Held]:
        """The transitions that a task's rows of a bundle draw from."""
        found = []
        for number in np.unique(bundle.kept[(bundle.task == task) & (bundle.kept[:, 0] != NONE), 0]):
            for kept, held in self._kept.get(int(number), []):
                rows = np.flatnonzero((bundle.task == task) & (bundle.kept[:, 0] == number))
                rows = rows[np.isin(bundle.kept[rows, 1], kept)]
                if len(rows):
                    at = np.searchsorted(kept, bundle.kept[rows, 1])
                    found.append(Held(held.transition.take(torch.from_numpy(at)), 1 + rows))
        return found

    def _reply(self, arrival: Arrival) -> Reply:
        """The reply to a finished bundle."""
        done = self._running.pop(arrival.wave)
        bundle, ledger, n = done.bundle, done.ledger, len(done.bundle.t)
        cost = arrival.cost or Cost()
        cost.add(done.beside)
        pieces = [
            (np.searchsorted(ledger.last, held.node), held) for part in done.flight.held.values() for held in part
        ]
        if pieces:
            self._kept[bundle.number] = pieces
        slot = ledger.slot[1 + n :]
        stored = slot != NONE
        states = as_numpy(self._states.get(slot[stored])) if stored.any() else None
        self._release(ledger)
        reply = Reply(bundle.number, ledger.log_w[1 + n :], stored, ledger.reward[ledger.last], cost, states)
        if done.samples:
            sent = np.sort(np.concatenate([rows for rows, _ in done.samples]))
            reply.reward[sent] = np.nan
            samples = _in_order(done)
            given = self.model.prompts
            prompts = [None] * n if given is None else [given[task] for task in bundle.task]
            reply.digests = [_digest(sample, prompts[i]) for sample, i in zip(samples, sent, strict=True)]
            reply.dtype = samples.dtype if isinstance(samples, Tensor) else None
            reply.samples = as_numpy(samples) if isinstance(samples, Tensor) else samples
        return reply

    def _release(self, ledger: Ledger) -> None:
        """Let go of the states of a bundle."""
        used = ledger.slot[1:]
        self._states.drop(np.unique(used[used != NONE]))

    def _take(self, flight: Flight, rows: Ids, samples: Any) -> None:
        """Keep samples that are scored elsewhere."""
        of = self._running[flight.wave]
        of.samples.append((np.searchsorted(of.ledger.last, flight.last[rows]), samples))

    def _names(self, flight: Flight, rows: Ids) -> list[str]:
        """What errors call the last nodes of rows: the search's own numbers."""
        of = self._running[flight.wave]
        at = np.searchsorted(of.ledger.last, flight.last[rows])
        return [
            f"node {of.bundle.name[i]} (t = {of.ledger.t[of.ledger.last[i]]}) of task {of.bundle.task[i]}" for i in at
        ]

    def _recover(self, error: Exception) -> list[tuple[int, Reply | Exception]]:
        """After an exception: with less memory a smaller batch, otherwise each bundle alone, to see whose it is."""
        lost = {f.wave: f.cost for f in self.engine.abandon()}
        again = [self._running.pop(number) for number in list(self._running)]
        for one in again:
            self._release(one.ledger)
        smaller = _out_of_memory(error) and self.model.batch_size > 1
        if smaller:
            self.model.batch_size = -(-self.model.batch_size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        elif len(again) == 1:
            return [(again[0].bundle.number, error)]
        out: list[tuple[int, Reply | Exception]] = []
        for one in again:
            spent = lost.get(one.bundle.number, Cost())
            spent.repeated_nfe, spent.nfe, spent.draft_nfe = spent.repeated_nfe + spent.nfe, 0, 0
            spent.add(one.beside)
            try:
                self._begin(one.bundle, spent)
            except BaseException as failure:
                out.append((one.bundle.number, ended(failure)))
                continue
            while not smaller and one.bundle.number in self._running:
                out += self.step()
        return out


def _in_order(done: _Running) -> Any:
    """Samples of a bundle that are scored elsewhere, in order of its rows."""
    order = np.argsort(np.concatenate([rows for rows, _ in done.samples]), kind="stable")
    parts = [part for _, part in done.samples]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[torch.from_numpy(order)]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)[order]
    flat = [sample for part in parts for sample in part]
    return [flat[i] for i in order]


def _digest(sample: Any, prompt: Any) -> bytes | None:
    """16 bytes that stand for a sample and its prompt; None for objects whose content is not known."""
    try:
        return hashlib.blake2b(b"".join([*content(sample), b"|prompt|", *content(prompt)]), digest_size=16).digest()
    except TypeError:
        return None


def _out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
