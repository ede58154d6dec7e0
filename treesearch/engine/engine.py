"""The engine: segments of many searches, at different t, share every forward pass.

A search asks for segments, the engine runs them and writes what it finds into the trees: `log_w` and `slot` of the
nodes that a segment passes, `reward` of its last node. It packs rows as an inference server packs requests: the oldest
wave first, within a wave the rows with most evaluations left, so that a wave of R rows and S evaluations in all takes
max(longest row, ceil(S / batch_size)) passes. Which rows share a pass changes no draw: noise is keyed by path.

A segment that ends above t = 0 with `hold` evaluates its last level without leaving it: the endpoint is scored, the
transition is kept, and segments that start there draw from it without another network call (a population of K
particles costs K·T). A segment from a node without a held transition evaluates the node's state again.

A segment with `draft` ends above t = 0 too: what is scored is where a draft from its last node ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Transition
from treesearch.budget import Cost, total
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.engine.drafting import Drafting
from treesearch.engine.flight import Batch, Flight, Held, Transitions, by_task, cat, grouped
from treesearch.engine.model import Model
from treesearch.engine.retrace import Retracer
from treesearch.engine.scoring import Names, Scoring, names
from treesearch.engine.segments import Arrival, Ids, Nodes, Segments
from treesearch.engine.states import StateStore, index
from treesearch.errors import KernelError
from treesearch.rewards.values import anew

_SEGMENT = ("source", "first", "last")
_SETTING = ("draft", "paid")


class Engine:
    """Runs segments where it is.

    Args:
        model: kernel and reward; a wave is packed into passes of its `batch_size`.
        trees: one a task.
        states: where the states of nodes are kept.
        cost: counts what runs outside waves: paths computed again.
        keep_inner: whether states of nodes above t = 0 are stored; without, they are recomputed from their keys.
        away, names: as of `Scoring`.
    """

    ahead = 0  # waves that an independent method may run ahead
    lanes = 1  # rows that take as long as one
    drains = False  # whether an interrupt lets the waves under way arrive

    def __init__(
        self,
        model: Model,
        trees: Sequence[Tree],
        states: StateStore,
        cost: Cost,
        *,
        keep_inner: bool = True,
        away: Callable[[Flight, Ids, Any], None] | None = None,
        names: Names = names,
    ) -> None:
        self.model, self.trees, self.states, self.keep_inner = model, trees, states, keep_inner
        self._retracer = Retracer(model, states, cost)
        self._scoring = Scoring(model, away, names)
        self._drafting = Drafting(model, self._scoring.add)
        self._flights: list[Flight] = []
        self._held = Transitions()

    @property
    def capacity(self) -> int:
        """Rows that are enough to keep it busy."""
        return self.model.batch_size

    def submit(
        self,
        wave: int,
        work: Sequence[tuple[int, Segments]],
        trees: Nodes | None = None,
        held: Transitions | None = None,
    ) -> Flight | None:
        """Take a wave of (task, segments) and draw the states that its rows start from.

        Args:
            wave: its number.
            work: its rows.
            trees: of nodes that are the caller's own; None for the trees of this engine.
            held: transitions that such rows draw from; the caller takes those that ended segments from the flight.
        """
        if not work:
            return None
        trees = self.trees if trees is None else trees
        flight = self._start(wave, work, trees, self._held if held is None else held)
        flight.stays = held is None
        for task, segments in work if flight.stays else ():
            self._held.keep_only(task, segments.keep)
        end = np.concatenate([trees[task].t[s.last] for task, s in work])
        _refuse_unscored(flight, end)
        flight.unscored = len(flight.t)
        self._flights.append(flight)
        rows = np.arange(len(flight.t))
        self._arrive(flight, rows[flight.t == flight.stop])
        flight.enqueue(rows, flight.t - end + flight.hold)
        return flight

    def finish(self, wave: int) -> Cost:
        """Run until every row of the wave is scored; room in a pass goes to later waves. Returns what it cost."""
        spent = Cost()
        for flight in [f for f in self._flights if f.wave == wave]:
            while flight.unscored:
                if flight.queue:
                    self._pass()
                elif self._drafting:
                    self._drafting.step()
                self._scoring.run(self.model.batch_size if flight.queue or self._drafting else 1)
            spent.add(self._land(flight))
        return spent

    def collect(self) -> list[Arrival]:
        """Run until some rows are scored; all that are, instead of `finish`."""
        while not (arrived := self.step()) and self._flights:
            pass
        return arrived

    def step(self, *, eager: bool = True) -> list[Arrival]:
        """One pass, and the rows that it brought to their rewards.

        Args:
            eager: score what waits at once; otherwise when it fills a batch or a wave waits for nothing else.
        """
        if any(f.queue for f in self._flights):
            self._pass()
        elif self._drafting:
            self._drafting.step()
        waiting = any(not f.queue for f in self._flights)
        self._scoring.run(1 if eager or waiting else self.model.batch_size, mixed=True)
        landed = {id(f): self._land(f) for f in [f for f in self._flights if not f.unscored]}
        arrived = self._scoring.collect()
        # The cost of a wave goes with the last of its rows.
        return [Arrival(f.wave, rows, landed.pop(id(f), None)) for f, rows in reversed(arrived)][::-1]

    def abandon(self) -> list[Flight]:
        """Forget everything under way."""
        lost, self._flights = self._flights, []
        self._scoring.clear()
        self._drafting.clear()
        return lost

    def _land(self, flight: Flight) -> Cost:
        """Settle a wave that is scored."""
        self._flights.remove(flight)
        for task, held in flight.held.items() if flight.stays else ():
            self._held.add(task, held)
        return flight.cost

    def _start(self, wave: int, work: Sequence[tuple[int, Segments]], trees: Nodes, held_at: Transitions) -> Flight:
        """Rows at the states they start from: the prior, a draw from a held transition, or a stored state."""
        model, spec = self.model, self.model.spec
        size = [len(s.first) for _, s in work]
        task = np.repeat([i for i, _ in work], size)
        hold = np.concatenate([np.broadcast_to(s.hold, n) for n, (_, s) in zip(size, work, strict=True)])
        draft, paid = (np.repeat([getattr(s, name) for _, s in work], size) for name in _SETTING)
        source, first, last = (np.concatenate([getattr(s, name) for _, s in work]) for name in _SEGMENT)
        level = np.concatenate([trees[i].t[s.source] for i, s in work]).astype(np.int64)
        stop = np.concatenate([trees[i].t[s.first] for i, s in work]).astype(np.int64)
        key = np.concatenate([trees[i].key[s.first] for i, s in work])
        scored = ~np.isnan(np.concatenate([trees[i].reward[s.source] for i, s in work]))
        beside, t = stop == level, np.minimum(level, spec.num_steps)
        x = torch.empty((len(t), *spec.state_shape), dtype=spec.dtype, device=spec.device)
        log_w = np.zeros(len(t))
        rows = np.flatnonzero(source == ROOT)
        if len(rows):
            x[index(rows)], log_w[rows] = model.prior(task[rows], model.prior_noise(key[rows]))
        rows = np.flatnonzero(beside)
        if len(rows):
            z = [model.neighbours(trees[i], source[rows][at], key[rows][at]) for i, at in by_task(task[rows])]
            x[index(rows)], _ = model.prior(task[rows], cat(z))
        for rows, law in held_at.leaving(task, source, beside):
            x[index(rows)], log_w[rows] = model.draw(law, key[rows], t[rows])
            t[rows] -= 1
        rows = np.flatnonzero((source != ROOT) & (t == level) & ~beside)
        if len(rows):
            x[index(rows)] = self._retracer.fetch(trees, task[rows], source[rows]).to(x.device)
        return Flight(
            wave=wave,
            x=x,
            t=t,
            task=task,
            node=first,
            last=last,
            stop=stop,
            key=key,
            hold=hold,
            draft=draft,
            log_w=log_w,
            again=(t == level) & (t > 0) & scored & paid & ~beside,
            trees=trees,
        )

    def _pass(self) -> None:
        """One forward pass over up to `batch_size` rows."""
        batch, room = [], self.model.batch_size
        for flight in self._flights:
            taken = [(flight, steps, rows) for steps, rows in flight.take(room)]
            batch += taken
            room -= sum(len(rows) for _, _, rows in taken)
        batch, began = Batch(batch), time.perf_counter()
        law, padding = self.model.evaluate(batch.x, batch.t, batch.task)
        for flight, _, rows in batch.parts:
            self.model.charge(flight.cost, flight.t[rows], flight.again[rows], padding)
            flight.again[rows] = False
            padding = 0
        if batch.ends.any():
            self._hold(batch, law)
        go = np.flatnonzero(~batch.ends)
        moving = law if len(go) == len(batch.t) else law.take(torch.from_numpy(go))
        x, log_w = self.model.draw(moving, batch.key[go], batch.t[go]) if len(go) else (batch.x[:0], np.empty(0))
        each = (time.perf_counter() - began) / len(batch.t)
        for flight, _, rows in batch.parts:
            flight.cost.model_seconds += each * len(rows)
        for flight, steps, rows, place in batch.split():
            if batch.ends[place].all():
                continue
            inside = slice(*np.searchsorted(go, (place.start, place.stop)))
            rows = rows[~batch.ends[place]]
            if len(rows) == len(flight.t):
                flight.x = x[inside]
            else:
                flight.x[index(rows)] = x[inside]
            flight.log_w[rows] += log_w[inside]
            flight.t[rows] -= 1
            if steps > 1:
                flight.queue.setdefault(steps - 1, []).append(rows)
            self._arrive(flight, rows[flight.t[rows] == flight.stop[rows]])

    def _arrive(self, flight: Flight, rows: Ids) -> None:
        """Rows that reached their next node: record it, and send those that reached x_0 to be scored."""
        if not len(rows):
            return
        mine = rows[np.argsort(flight.task[rows], kind="stable")]
        nodes, log_w, further = flight.node[mine], flight.log_w[mine], flight.node[mine] < flight.last[mine]
        slot, kept = np.full(len(mine), NONE), (flight.stop[mine] == 0) | self.keep_inner
        if kept.any():
            slot[kept] = self.states.put(flight.x[index(mine[kept])])
        flight.node[mine[further]] += 1
        for task, part in by_task(flight.task[mine]):
            tree = flight.trees[task]
            tree.log_w[nodes[part]], tree.slot[nodes[part]] = log_w[part], slot[part]
            onward = mine[part][further[part]]
            flight.stop[onward] = tree.t[flight.node[onward]]
        flight.log_w[rows] = 0.0
        done = rows[(flight.t[rows] == 0) & ~flight.hold[rows]]
        if len(done):
            self._scoring.add(flight, done, flight.x[torch.from_numpy(done)])
        drafted = mine[~further & (flight.draft[mine] > 0) & ~flight.hold[mine]]
        if len(drafted):
            self._drafting.add(flight, drafted, flight.x[torch.from_numpy(drafted)])

    def _hold(self, batch: Batch, law: Transition) -> None:
        """Keep transitions that ended a segment and send their endpoints to be scored."""
        for flight, _, rows, place in batch.split():
            at = np.arange(place.start, place.stop)[batch.ends[place]]
            rows = rows[batch.ends[place]]
            if not len(rows):
                continue
            for task, mine in grouped(flight.task[rows]):
                order = mine[np.argsort(flight.last[rows[mine]])]
                part = law.take(torch.from_numpy(at[order]))
                flight.held.setdefault(task, []).append(Held(part, flight.last[rows[order]]))
            if len(drafted := np.flatnonzero(flight.draft[rows])):
                which = torch.from_numpy(at[drafted])
                self._drafting.add(flight, rows[drafted], batch.x[which], law.take(which))
                at, rows = np.delete(at, drafted), np.delete(rows, drafted)
            if not len(rows):
                continue
            known = self._known(law, at)
            new = np.isnan(known)
            if not new.all():
                self._scoring.give(flight, rows[~new], known[~new])
            if new.any():
                self._scoring.add(flight, rows[new], law.endpoint[torch.from_numpy(at[new])])

    def _known(self, law: Transition, at: Ids) -> NDArray[np.float64]:
        """Values that the kernel declares, or rewards of endpoints that a guide by the search's own reward has
        computed; NaN where there are none.

        Raises:
            KernelError: a kernel that declares values left one out.
        """
        rewards: Tensor | None = getattr(law, "rewards", None)
        known = np.full(len(at), np.nan)
        if rewards is not None and self.model.guide_scores:
            known = rewards[torch.from_numpy(at)].double().cpu().numpy()
        if self.model.spec.valued and not (known < np.inf).all():
            raise KernelError(
                f"the kernel declares values (`valued`), and {int((~(known < np.inf)).sum())} of {len(at)} states came "
                "without one: a transition carries them as `rewards`, -inf where it has nothing to say"
            )
        return known

    def path(self, task: int, node: int, above: int) -> Tensor:
        """The state of a node, computed again from the stored state of its ancestor `above` or (the root) the prior."""
        return self._retracer.path(task, self.trees[task], node, above)

    def score(self, task: Ids, x: Tensor) -> NDArray[np.float64]:
        """Rewards (n,) of samples x_0 (n, *state) that were scored and paid for before, by no cache."""
        samples = self.model.samples(x.to(self.model.spec.device))
        with anew():
            return self.model.score(samples, task)[0]

    def settle(self) -> None:
        """States are where they belong as soon as their rows are."""

    def backlog(self) -> float:
        """Seconds until it would begin new work."""
        return 0.0

    def under_way(self) -> Cost:
        """What waves that have not landed have cost so far."""
        return total(flight.cost for flight in self._flights)

    def summary(self) -> dict[str, Any]:
        """Figures of the workers, for the history: there are none."""
        return {}

    def stats(self) -> dict[str, Any]:
        """Figures of each worker, for the diagnostics: there are none."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def _refuse_unscored(flight: Flight, end: NDArray[Any]) -> None:
    """Raises:
    ValueError: walks to levels `end` that nothing scores.
    """
    if ((end > 0) & ~flight.hold & (flight.draft == 0)).any():
        raise ValueError("a segment that ends above t = 0 is scored only where it is held or drafted")
    if ((end == 0) & (flight.draft > 0)).any():
        raise ValueError("a draft from t = 0: a segment that ends there is scored as it is, leave draft out of it")
