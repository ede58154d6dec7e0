"""The engine: segments of many searches, at different t, share every forward pass.

A search asks for segments, the engine runs them and writes what it finds into the trees: `log_w` and `slot` of the
nodes that a segment passes, `reward` of its last node. It packs rows as an inference server packs requests: the oldest
wave first, within a wave the rows with most evaluations left, so that a wave of R rows and S evaluations in all takes
max(longest row, ceil(S / batch_size)) passes. Which rows share a pass changes no draw: noise is keyed by path.

A segment that ends above t = 0 with `hold` evaluates its last level without leaving it: the endpoint is scored, the
transition is kept, and segments that start there draw from it without another network call (a population of K
particles costs K·T). A segment from a node without a held transition evaluates the node's state again.

A node at level T is a draw of the prior from noise z. Below the root z is the node's own, ε(key); below another node of
level T it is a neighbour's, z = cos θ z(parent) + sin θ ε(key), again N(0, I). Such sideways edges cost no evaluation.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Kernel, Shared, Spec, Transition
from treesearch.budget import Cost
from treesearch.core.noise import normals
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.engine.states import StateStore, index, recovered
from treesearch.errors import KernelError
from treesearch.rewards.base import Reward, RewardError, anew, flat

Ids = NDArray[np.int64]
_SEGMENT = ("source", "first", "last")


@contextmanager
def without_graph() -> Iterator[None]:
    """Keeps no autograd graph and makes no inference tensors, whatever the caller's mode is.

    Guides that need gradients turn them on around what they differentiate.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Asking:
    """Has errors of a kernel say what was asked of it; those that would end a loop here become its own.

    Args:
        what: makes the words.

    Raises:
        KernelError: StopIteration or GeneratorExit.
    """

    def __init__(self, what: Callable[[], str]) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (StopIteration, GeneratorExit)):
            raise KernelError(f"{self.what()} raised {type(error).__name__}: {error}") from error
        if isinstance(error, (Exception, SystemExit)):
            error.add_note(f"in {self.what()}")
            if "does not require grad" in str(error):
                error.add_note("a search keeps no graph: put `with torch.enable_grad():` around what is differentiated")


class Ledger(Protocol):
    """The columns of nodes that an engine reads and writes: a `Tree`'s, or those of a part of one."""

    parent: NDArray[Any]
    t: NDArray[Any]
    key: NDArray[np.uint64]
    slot: NDArray[Any]
    reward: NDArray[np.float64]
    log_w: NDArray[np.float64]

    def lineage(self, node: int, /) -> NDArray[np.uint64]:
        """Keys whose noise makes the state of a node at level T."""
        ...


class Nodes(Protocol):
    """The nodes of every task."""

    def __getitem__(self, task: int, /) -> Ledger: ...


@dataclass
class Segments:
    """Walks to run: row i leaves source[i] and passes the new nodes first[i]..last[i], each a child of the one before.

    Args:
        source, first, last: node numbers, (n,).
        hold: score the endpoint of `last` and keep its transition, instead of scoring a sample.
        keep: nodes whose transitions, held since earlier waves, are kept for later ones; all others are let go.
    """

    source: Ids
    first: Ids
    last: Ids
    hold: bool = False
    keep: Ids = field(default_factory=lambda: np.empty(0, np.int64))


class Leg(NamedTuple):
    """A way that is walked again.

    Args:
        keys: noise key of its steps; from the prior those of a lineage, the last of which is the key of its steps.
        level, end: t of both ends; T + 1 for the prior.
    """

    keys: tuple[int, ...]
    level: int
    end: int


class Arrival(NamedTuple):
    """Rows that are scored.

    Args:
        wave: theirs.
        rows: positions among the wave's segments, in order of its work.
        cost: what the wave cost, once all its rows have arrived.
    """

    wave: int
    rows: Ids
    cost: Cost | None


@dataclass
class Held:
    """Transitions of one task's nodes, evaluated and not left yet."""

    transition: Transition
    node: Ids  # increasing

    def only(self, nodes: Ids) -> Held | None:
        """Those of the given nodes; None where there are none."""
        rows = np.flatnonzero(np.isin(self.node, nodes))
        return Held(self.transition.take(torch.from_numpy(rows)), self.node[rows]) if len(rows) else None


@dataclass
class Flight:
    """The rows of one wave, as arrays."""

    wave: int
    x: Tensor  # (n, *state)
    t: Ids
    task: Ids
    node: Ids  # the next node to reach
    last: Ids
    stop: Ids  # t of `node`
    key: NDArray[np.uint64]
    hold: NDArray[np.bool_]
    log_w: NDArray[np.float64]  # since the node passed last
    again: NDArray[np.bool_]  # the next evaluation was paid for before (an interrupted wave)
    trees: Nodes
    unscored: int = 0
    cost: Cost = field(default_factory=Cost)  # settled when the wave is finished
    held: dict[int, list[Held]] = field(default_factory=dict)  # by task: transitions that ended a segment
    queue: dict[int, list[Ids]] = field(default_factory=dict)  # evaluations left -> chunks of rows

    def enqueue(self, rows: Ids, left: Ids) -> None:
        """Queue rows by the evaluations they have left; rows with none are not queued."""
        for steps in np.unique(left[left > 0]):
            self.queue.setdefault(int(steps), []).append(rows[left == steps])

    def take(self, room: int) -> Iterator[tuple[int, Ids]]:
        """Up to `room` rows with their evaluations left, most first."""
        for steps in sorted(self.queue, reverse=True):
            chunks = self.queue[steps]
            while chunks and room > 0:
                chunk = chunks.pop(0)
                if len(chunk) > room:
                    chunks.insert(0, chunk[room:])
                    chunk = chunk[:room]
                room -= len(chunk)
                yield steps, chunk
            if not chunks:
                del self.queue[steps]


class Batch:
    """The rows of one pass, which may belong to several flights."""

    def __init__(self, parts: list[tuple[Flight, int, Ids]]) -> None:
        self.parts = parts
        self.x = _cat([f.x[index(rows)] for f, _, rows in parts])
        self.t = np.concatenate([f.t[rows] for f, _, rows in parts])
        self.task = np.concatenate([f.task[rows] for f, _, rows in parts])
        self.key = np.concatenate([f.key[rows] for f, _, rows in parts])
        self.ends = np.concatenate([f.hold[rows] & (steps == 1) for f, steps, rows in parts])

    def split(self) -> Iterator[tuple[Flight, int, Ids, slice]]:
        """Each part with its place in the batch."""
        at = 0
        for flight, steps, rows in self.parts:
            yield flight, steps, rows, slice(at, at + len(rows))
            at += len(rows)


class Engine:
    """Runs segments where it is; the only caller of kernels and rewards.

    Args:
        kernel, spec: the model and `describe(kernel)`.
        reward: scores leaves and held endpoints.
        trees: one a task.
        states: where the states of nodes are kept.
        cost: counts what runs outside waves: paths computed again.
        prompts: one a task, or None.
        encoded: what `encode` made of them.
        batch_size: rows of a forward pass.
        keep_inner: whether states of nodes above t = 0 are stored; without, they are recomputed from their keys.
        batch_invariant: pad every pass to `batch_size` rows, so that a row's result does not depend on the batch.
    """

    angle = 0.0  # θ of sideways edges
    ahead = 0  # waves that an independent method may run ahead
    drains = False  # whether an interrupt lets the waves under way arrive

    def __init__(
        self,
        kernel: Kernel,
        spec: Spec,
        reward: Reward,
        trees: Sequence[Tree],
        states: StateStore,
        cost: Cost,
        *,
        prompts: Sequence[Any] | None = None,
        encoded: dict[str, Any] | None = None,
        batch_size: int = 64,
        keep_inner: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self.kernel, self.spec, self.reward, self.trees, self.states = kernel, spec, reward, trees, states
        self.cost, self.prompts, self.batch_size = cost, prompts, batch_size
        self.keep_inner, self.batch_invariant = keep_inner, batch_invariant
        self.passes = 0
        self.angle = trees[0].angle if trees else 0.0
        guide = getattr(kernel, "scores", None)
        self._guide_decodes = guide is not None and guide.input == "sample"
        self.guide_scores = guide is not None and guide == reward  # of one name is not enough: functions must agree
        self._backward, self._guiding = np.array(spec.backward_per_nfe), np.array(spec.rewards_per_nfe)
        self._encoded = encoded or {}
        self._gathered: tuple[Ids, dict[str, Any]] | None = None
        self._flights: list[Flight] = []
        self._held: dict[int, list[Held]] = {}  # by task
        self._unscored: list[tuple[Flight, Ids, Tensor]] = []
        self._given: list[tuple[Flight, Ids, NDArray[np.float64]]] = []  # held rows whose reward came with their law
        self._arrived: list[tuple[Flight, Ids]] = []  # scored, and not collected yet

    @property
    def capacity(self) -> int:
        """Rows that are enough to keep it busy."""
        return self.batch_size

    def submit(self, wave: int, work: Sequence[tuple[int, Segments]], trees: Nodes | None = None) -> Flight | None:
        """Take a wave of (task, segments) and draw the states that its rows start from."""
        if not work:
            return None
        trees = self.trees if trees is None else trees
        flight = self._start(wave, work, trees)
        for task, segments in work:
            held = self._held.pop(task, [])
            self._held[task] = [part for h in held if (part := h.only(segments.keep))] if len(segments.keep) else []
        flight.unscored = len(flight.t)
        self._flights.append(flight)
        rows = np.arange(len(flight.t))
        end = np.concatenate([trees[task].t[s.last] for task, s in work])
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
                self._score(self.batch_size if flight.queue else 1)
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
        waiting = any(not f.queue for f in self._flights)
        self._score(1 if eager or waiting else self.batch_size, mixed=True)
        landed = {id(f): self._land(f) for f in [f for f in self._flights if not f.unscored]}
        arrived, self._arrived = self._arrived, []
        # The cost of a wave goes with the last of its rows.
        return [Arrival(f.wave, rows, landed.pop(id(f), None)) for f, rows in reversed(arrived)][::-1]

    def abandon(self) -> list[Flight]:
        """Forget everything under way."""
        lost, self._flights, self._unscored, self._given, self._arrived = self._flights, [], [], [], []
        return lost

    def _land(self, flight: Flight) -> Cost:
        """Settle a wave that is scored."""
        self._flights.remove(flight)
        for task, held in flight.held.items():
            self._held.setdefault(task, []).extend(held)
        return flight.cost

    def _start(self, wave: int, work: Sequence[tuple[int, Segments]], trees: Nodes) -> Flight:
        """Rows at the states they start from: the prior, a draw from a held transition, or a stored state."""
        size = [len(s.first) for _, s in work]
        task, hold = np.repeat([i for i, _ in work], size), np.repeat([s.hold for _, s in work], size)
        source, first, last = (np.concatenate([getattr(s, name) for _, s in work]) for name in _SEGMENT)
        level = np.concatenate([trees[i].t[s.source] for i, s in work]).astype(np.int64)
        stop = np.concatenate([trees[i].t[s.first] for i, s in work]).astype(np.int64)
        key = np.concatenate([trees[i].key[s.first] for i, s in work])
        scored = ~np.isnan(np.concatenate([trees[i].reward[s.source] for i, s in work]))
        beside, t = stop == level, np.minimum(level, self.spec.num_steps)
        x = torch.empty((len(t), *self.spec.state_shape), dtype=self.spec.dtype, device=self.spec.device)
        log_w = np.zeros(len(t))
        rows = np.flatnonzero(source == ROOT)
        if len(rows):
            x[index(rows)], log_w[rows] = self._prior(task[rows], self._prior_noise(key[rows]))
        rows = np.flatnonzero(beside)
        if len(rows):
            z = [self._neighbours(trees[i], source[rows][at], key[rows][at]) for i, at in _runs(task[rows])]
            x[index(rows)], _ = self._prior(task[rows], _cat(z))
        for rows, law in self._left(task, source, beside):
            x[index(rows)], log_w[rows] = self._draw(law, key[rows], t[rows])
            t[rows] -= 1
        rows = np.flatnonzero((source != ROOT) & (t == level) & ~beside)
        if len(rows):
            x[index(rows)] = self._fetch(trees, task[rows], source[rows]).to(x.device)
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
            log_w=log_w,
            again=(t == level) & (t > 0) & scored & ~beside,
            trees=trees,
        )

    def _left(self, task: Ids, source: Ids, beside: NDArray[np.bool_]) -> Iterator[tuple[Ids, Transition]]:
        """Rows that leave a node whose transition is held, and their transitions."""
        for i, at in _runs(task):
            if not (parts := self._held.get(i)):
                continue
            node, first = np.concatenate([h.node for h in parts]), np.cumsum([0, *(len(h.node) for h in parts)])
            order = np.argsort(node)
            place = order[np.searchsorted(node, source[at], sorter=order).clip(max=len(node) - 1)]
            mine = np.flatnonzero((node[place] == source[at]) & ~beside[at])
            place = place[mine]
            for part, which in _grouped(np.searchsorted(first, place, "right") - 1):
                law = parts[part].transition.take(torch.from_numpy(place[which] - first[part]))
                yield at.start + mine[which], law

    def _pass(self) -> None:
        """One forward pass over up to `batch_size` rows."""
        batch, room = [], self.batch_size
        for flight in self._flights:
            taken = [(flight, steps, rows) for steps, rows in flight.take(room)]
            batch += taken
            room -= sum(len(rows) for _, _, rows in taken)
        batch = Batch(batch)
        law, padding = self._evaluate(batch.x, batch.t, batch.task)
        for flight, _, rows in batch.parts:
            self._count(flight.cost, flight.t[rows], flight.again[rows], padding)
            flight.again[rows] = False
            padding = 0
        if batch.ends.any():
            self._hold(batch, law)
        go = np.flatnonzero(~batch.ends)
        moving = law if len(go) == len(batch.t) else law.take(torch.from_numpy(go))
        x, log_w = self._draw(moving, batch.key[go], batch.t[go]) if len(go) else (batch.x[:0], np.empty(0))
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
        for task, part in _runs(flight.task[mine]):
            tree = flight.trees[task]
            tree.log_w[nodes[part]], tree.slot[nodes[part]] = log_w[part], slot[part]
            onward = mine[part][further[part]]
            flight.stop[onward] = tree.t[flight.node[onward]]
        flight.log_w[rows] = 0.0
        done = rows[(flight.t[rows] == 0) & ~flight.hold[rows]]
        if len(done):
            self._unscored.append((flight, done, flight.x[torch.from_numpy(done)]))

    def _hold(self, batch: Batch, law: Transition) -> None:
        """Keep transitions that ended a segment and send their endpoints to be scored."""
        for flight, _, rows, place in batch.split():
            at = np.arange(place.start, place.stop)[batch.ends[place]]
            rows = rows[batch.ends[place]]
            if not len(rows):
                continue
            for task, mine in _grouped(flight.task[rows]):
                order = mine[np.argsort(flight.last[rows[mine]])]
                part = law.take(torch.from_numpy(at[order]))
                flight.held.setdefault(task, []).append(Held(part, flight.last[rows[order]]))
            known = self._known(law, at)
            new = np.isnan(known)
            if not new.all():
                self._given.append((flight, rows[~new], known[~new]))
            if new.any():
                self._unscored.append((flight, rows[new], law.endpoint[torch.from_numpy(at[new])]))

    def _known(self, law: Transition, at: Ids) -> NDArray[np.float64]:
        """Rewards of endpoints that a guide by the search's own reward has computed, NaN where there are none."""
        rewards: Tensor | None = getattr(law, "rewards", None)
        if rewards is None or not self.guide_scores:
            return np.full(len(at), np.nan)
        return rewards[torch.from_numpy(at)].double().cpu().numpy()

    def _score(self, at_least: int, *, mixed: bool = False) -> None:
        """Score what waits once it fills a batch, of one wave or (mixed) of several."""
        while self._given:
            self._record(*self._given.pop(0), mixed)
        while self._unscored and sum(len(rows) for _, rows, _ in self._unscored) >= at_least:
            parts, states, room = [], [], self.batch_size
            while self._unscored and room > 0 and self._belongs(self._unscored[0], parts, mixed):
                flight, rows, x = self._unscored.pop(0)
                if len(rows) > room:
                    self._unscored.insert(0, (flight, rows[room:], x[room:]))
                    rows, x = rows[:room], x[:room]
                room -= len(rows)
                parts.append((flight, rows))
                states.append(x)
            rewards = self._reward(_cat(states), parts)
            for flight, rows in parts:
                reward, rewards = rewards[: len(rows)], rewards[len(rows) :]
                self._record(flight, rows, reward, mixed)

    def _belongs(self, next_: tuple[Flight, Ids, Tensor], parts: list[tuple[Flight, Ids]], mixed: bool) -> bool:
        """Whether rows may be scored with those before them: of one wave unless mixed, and drawn by one decoder."""
        if not parts:
            return True
        alike = not self.spec.previews or next_[0].hold[next_[1][0]] == parts[0][0].hold[parts[0][1][0]]
        return alike and (mixed or next_[0] is parts[0][0])

    def _record(self, flight: Flight, rows: Ids, reward: NDArray[np.float64], mixed: bool) -> None:
        """Enter the rewards of rows."""
        for i, mine in _grouped(flight.task[rows]):
            flight.trees[i].reward[flight.last[rows[mine]]] = reward[mine]
        flight.unscored -= len(rows)
        if mixed:
            self._arrived.append((flight, rows))

    def _reward(self, x: Tensor, parts: list[tuple[Flight, Ids]]) -> NDArray[np.float64]:
        """Rewards (n,) of states (n, *state), counted; errors name the node.

        Raises:
            RewardError: the reward raised or broke its contract.
        """
        before = self.reward.calls() if self.reward.calls else None
        task = np.concatenate([flight.task[rows] for flight, rows in parts])
        samples = self._decode(x, parts)
        prompts = None if self.prompts is None else [self.prompts[i] for i in task]
        try:
            values = self.reward(samples, prompts)
        except RewardError as error:
            names = [name for flight, rows in parts for name in self._names(flight, rows)]
            named = ", ".join(names[i] for i in (error.rows[:4] or range(min(4, len(names)))))
            raise RewardError(f"{error} [{named}]", error.rows) from error
        calls = None if before is None or not self.reward.calls else self.reward.calls() - before
        for flight, rows in parts:  # a cache cannot say whose samples it knew: the first part bears what it asked
            flight.cost.reward_calls += len(rows) if calls is None else calls
            calls = None if calls is None else 0
        return values.numpy()

    def _decode(self, x: Tensor, parts: list[tuple[Flight, Ids]]) -> Any:
        """What the reward sees of states (n, *state)."""
        if self.reward.input == "state":
            return x
        endpoints = self.spec.previews and parts[0][0].hold[parts[0][1][0]]
        samples = decode(self.kernel, x, "preview" if endpoints else "decode")
        if not hasattr(samples, "__len__") or len(samples) != len(x):
            got = f"{len(samples)} samples" if hasattr(samples, "__len__") else type(samples).__name__
            raise KernelError(f"kernel.decode returned {got} for {len(x)} states, expected one sample each")
        for flight, rows in parts:
            flight.cost.decodes += len(rows)
        return samples

    def _names(self, flight: Flight, rows: Ids) -> list[str]:
        """What errors call the last nodes of rows."""
        nodes = [(int(flight.task[i]), int(flight.last[i])) for i in rows]
        return [f"node {node} (t = {flight.trees[task].t[node]}) of task {task}" for task, node in nodes]

    def _evaluate(self, x: Tensor, t: Ids, task: Ids) -> tuple[Transition, int]:
        """One network call on n rows, checked; the transition and how many rows of padding went along."""
        n, pad = len(t), max(0, self.batch_size - len(t)) if self.batch_invariant else 0
        if pad:
            x, t, task = torch.cat([x, x[:1].expand(pad, *x.shape[1:])]), _pad(t, pad), _pad(task, pad)
        levels = torch.from_numpy(t).to(self.spec.device)
        with _Asking(lambda: f"kernel.transition of {len(t)} rows at t = {np.unique(t).tolist()}"):
            law = self.kernel.transition(x, levels, self._cond(task))
        if not hasattr(law, "endpoint"):
            got = type(law).__name__
            raise KernelError(f"kernel.transition returned {got}, expected a law such as backends.base.Gaussian")
        if tuple(law.endpoint.shape) != tuple(x.shape):
            got, want = tuple(law.endpoint.shape), tuple(x.shape)
            raise KernelError(
                f"kernel.transition returned an endpoint of shape {got}, expected {want}, like its states"
            )
        self.passes += 1
        return (law.take(torch.arange(n, device="cpu")) if pad else law), pad

    def _count(self, cost: Cost, t: Ids, again: NDArray[np.bool_], padding: int = 0) -> None:
        """Enter the rows of an evaluation into a cost; those done `again` were paid for before."""
        repeated, guided = int(again.sum()), int(self._guiding[t[~again]].sum())
        cost.nfe += len(t) - repeated
        cost.repeated_nfe += repeated
        cost.rows += (len(t) + padding) * self.spec.rows_per_nfe
        cost.backward_nfe += int(self._backward[t].sum())
        cost.reward_calls += guided
        cost.decodes += guided * self._guide_decodes

    def _draw(self, law: Transition, key: NDArray[np.uint64], t: Ids) -> tuple[Tensor, NDArray[np.float64]]:
        """x_{t-1} and the log p/q of the step, from each row's own noise."""
        try:
            x = law.sample(self._noise(key, t))
        except RuntimeError as error:
            raise KernelError(
                f"transition.sample failed on {len(t)} rows of states {self.spec.state_shape}: {error}; mean must have "
                "the shape of the states, and std one that broadcasts against it, such as (n, 1, ...)"
            ) from error
        x = _states(x, len(t), self.spec, "transition.sample")
        # Asked last: a GPU computes while the noise is made here, and is waited for once.
        if not (finite := torch.isfinite(flat(x)).all(1)).all():
            bad = torch.from_numpy(t)[~finite.cpu()]
            at, hint = sorted(set(bad.tolist())), getattr(self.kernel, "diagnose", lambda t: "")(bad)
            raise KernelError(
                f"{len(bad)} of {len(t)} states are NaN or infinite after the step from t = {at}{hint and ': '}{hint}"
            )
        return x, _weights(law.log_weight(x), len(t), "transition.log_weight")

    def _prior(self, task: Ids, z: Tensor) -> tuple[Tensor, NDArray[np.float64] | float]:
        """x_T from noise z (n, *noise) and the log p/q of the prior draw."""
        cond = self._cond(task)
        with _Asking(lambda: "kernel.prior"):
            x = self.kernel.prior(z, cond)
        x = _states(x, len(z), self.spec, "kernel.prior")
        weight = getattr(self.kernel, "prior_log_weight", None)
        return x, _weights(weight(x, cond), len(z), "kernel.prior_log_weight") if weight else 0.0

    def _prior_noise(self, key: NDArray[np.uint64]) -> Tensor:
        return self._noise(key, np.full(len(key), self.spec.num_steps + 1))

    def _lineage_noise(self, keys: NDArray[np.uint64]) -> Tensor:
        """z (*noise) of the last of a line of neighbours, of which the first is the root's child."""
        z, *fresh = self._prior_noise(keys)
        for own in fresh:
            z = self._turn(z, own)
        return z

    def _neighbours(self, tree: Ledger, source: Ids, key: NDArray[np.uint64]) -> Tensor:
        """z (n, *noise) of new neighbours of nodes at level T."""
        lines = [tree.lineage(node) for node in map(int, source)]
        pivots = {name: self._lineage_noise(line) for name, line in {line.tobytes(): line for line in lines}.items()}
        return self._turn(torch.stack([pivots[line.tobytes()] for line in lines]), self._prior_noise(key))

    def _turn(self, z: Tensor, fresh: Tensor) -> Tensor:
        return math.cos(self.angle) * z + math.sin(self.angle) * fresh

    def _noise(self, key: NDArray[np.uint64], counter: Ids) -> Tensor:
        shape = self.spec.noise_shape
        size = int(np.prod(shape))
        return torch.from_numpy(normals(key, counter, size)).reshape(len(key), *shape).to(self.spec.device)

    def _cond(self, task: Ids) -> dict[str, Any]:
        """Conditioning of rows: encoded rows gathered by task, shared values as they are.

        Rows of large models weigh megabytes: the last batch's are handed in again as long as its tasks stay the same.
        """
        if self._gathered is None or not np.array_equal(self._gathered[0], task):
            rows = torch.from_numpy(task).to(self.spec.device)
            cond = {k: v.value if isinstance(v, Shared) else v[rows] for k, v in self._encoded.items()}
            self._gathered = task.copy(), cond | {"task": rows}
        return dict(self._gathered[1])

    def settle(self) -> None:
        """States are where they belong as soon as their rows are."""

    def backlog(self) -> float:
        """Seconds until it would begin new work."""
        return 0.0

    def summary(self) -> dict[str, Any]:
        """Figures of the workers, for the history: there are none."""
        return {}

    def stats(self) -> dict[str, Any]:
        """Figures of each worker, for the diagnostics: there are none."""
        return {}

    def close(self) -> None:
        """Nothing is open."""

    def _fetch(self, trees: Nodes, task: Ids, nodes: Ids) -> Tensor:
        """States of nodes, recomputed along their path where they are not stored or were lost."""
        return recovered(lambda: self._gather(trees, task, nodes), [trees[i].slot for i, _ in _runs(task)])

    def _gather(self, trees: Nodes, task: Ids, nodes: Ids) -> Tensor:
        """States of nodes, recomputed along their path where they are not stored.

        Raises:
            LostStates: some that should be stored are not.
        """
        slot = np.concatenate([trees[i].slot[nodes[part]] for i, part in _runs(task)])
        if (slot != NONE).all():
            return self.states.get(slot)
        return _cat([self._retraced(i, trees[i], nodes[part]) for i, part in _runs(task)])

    def _retraced(self, task: int, tree: Ledger, nodes: Ids) -> Tensor:
        """States of nodes of one task, recomputed where they are not stored."""
        missing, device = sorted(_missing(tree, nodes)), self.spec.device
        if not missing:
            return self.states.get(tree.slot[nodes]).to(device)
        found: dict[int, Tensor] = {}
        for node in missing:  # parents have smaller numbers, so they come first
            above = int(tree.parent[node])
            x = found.get(above)
            if x is None and above != ROOT:
                x = self.states.get(tree.slot[[above]])[0]
            found[node] = self.walk(task, node, x)
        stored = {int(n): self.states.get(tree.slot[[n]])[0].to(device) for n in nodes if tree.slot[n] != NONE}
        return torch.stack([found[n] if n in found else stored[n] for n in map(int, nodes)])

    def path(self, task: int, node: int, above: int) -> Tensor:
        """The state of a node, computed again from the stored state of its ancestor `above` or (the root) the prior."""
        tree, nodes = self.trees[task], [node]
        while (parent := int(tree.parent[nodes[-1]])) != above:
            nodes.append(parent)
        x = None if above == ROOT else self.states.get(tree.slot[[above]])[0]
        for step in reversed(nodes):
            x = self.walk(task, step, x)
        assert x is not None
        return x

    def score(self, task: Ids, x: Tensor) -> NDArray[np.float64]:
        """Rewards (n,) of samples x_0 (n, *state) that were scored and paid for before, by no cache."""
        x = x.to(self.spec.device)
        samples = x if self.reward.input == "state" else decode(self.kernel, x)
        with anew():
            return self.reward(samples, None if self.prompts is None else [self.prompts[i] for i in task]).numpy()

    def walk(self, task: int, node: int, x: Tensor | None) -> Tensor:
        """Run the edge to a node again, from its parent's state or the prior; one row at a time."""
        return self.retrace(task, leg(self.trees[task], node, self.spec.num_steps), x)

    def retrace(self, task: int, leg: Leg, x: Tensor | None) -> Tensor:
        """The state at the end of a leg, from the state x at its beginning or, above level T, from the prior."""
        level, key = min(leg.level, self.spec.num_steps), np.array(leg.keys[-1:], np.uint64)
        if leg.level > self.spec.num_steps:
            row = self._prior(np.array([task]), self._lineage_noise(np.array(leg.keys, np.uint64))[None])[0]
        else:
            assert x is not None
            row = x[None].to(self.spec.device)
        for t in range(level, leg.end, -1):
            at = np.array([t])
            law, padding = self._evaluate(row, at, np.array([task]))
            self._count(self.cost, at, np.array([True]), padding)
            row, _ = self._draw(law, key, at)
        return row[0]


def sideways(tree: Ledger, segments: Segments) -> NDArray[np.bool_]:
    """Rows that begin at a neighbour of the node they leave."""
    return np.asarray(tree.t[segments.first] == tree.t[segments.source])


def leg(tree: Tree, node: int, num_steps: int) -> Leg:
    """The way to a node from its parent; to one at level T from the prior, with the keys of its lineage."""
    end = int(tree.t[node])
    if end == num_steps:
        return Leg(tuple(tree.lineage(node).tolist()), num_steps + 1, end)
    return Leg((int(tree.key[node]),), int(tree.t[tree.parent[node]]), end)


def encode(kernel: Kernel, prompts: Sequence[Any]) -> dict[str, Any]:
    """Conditioning of the prompts, one row each."""
    if not hasattr(kernel, "encode"):
        raise TypeError(f"prompts need kernel.encode, which {type(kernel).__name__} lacks; it may return None")
    with _Asking(lambda: f"kernel.encode of {len(prompts)} prompts, {_brief(prompts)}"):
        encoded = kernel.encode(prompts) or {}
    for name, rows in encoded.items():
        if not isinstance(rows, Shared) and len(rows) != len(prompts):
            raise KernelError(
                f"kernel.encode returned {len(rows)} rows of {name!r} for {len(prompts)} prompts: "
                "give one row each, or mark what has no row axis as Shared"
            )
    return encoded


def _brief(prompts: Sequence[Any], most: int = 3) -> str:
    """The first prompts, for messages."""
    shown = ", ".join(textwrap.shorten(repr(p), 80, placeholder="...") for p in prompts[:most])
    return f"[{shown}{', ...' if len(prompts) > most else ''}]"


def decode(kernel: Kernel, x: Tensor, how: str = "decode") -> Any:
    """What a kernel makes of states (n, *state): samples without a graph."""
    with _Asking(lambda: f"kernel.{how}"):
        samples = getattr(kernel, how)(x)
    if isinstance(samples, Tensor):
        return samples.detach()
    if isinstance(samples, (list, tuple)):
        return [item.detach() if isinstance(item, Tensor) else item for item in samples]
    return samples


def _states(x: Any, n: int, spec: Spec, what: str) -> Tensor:
    """States without a graph.

    Raises:
        KernelError: not n states of the kernel's shape and dtype.
    """
    if not isinstance(x, Tensor):
        raise KernelError(f"{what} returned {type(x).__name__}, expected a tensor of states")
    if tuple(x.shape) != (n, *spec.state_shape):
        raise KernelError(f"{what} returned shape {tuple(x.shape)}, expected {(n, *spec.state_shape)}")
    if x.dtype != spec.dtype:
        raise KernelError(f"{what} returned {x.dtype}, expected kernel.dtype = {spec.dtype}")
    return x.detach()


def _weights(log_w: Tensor, n: int, what: str) -> NDArray[np.float64]:
    """log p/q of n rows.

    Raises:
        KernelError: a wrong shape, NaN or +inf.
    """
    if tuple(log_w.shape) != (n,):
        raise KernelError(f"{what} returned shape {tuple(log_w.shape)}, expected ({n},)")
    out = log_w.detach().double().cpu().numpy()
    if not (out < np.inf).all():  # NaN compares false
        raise KernelError(f"{what} returned NaN or +inf: the proposal q must be positive wherever it draws")
    return out


def _grouped(label: Ids) -> Iterator[tuple[int, Ids]]:
    """(label, positions of the rows that bear it), in order of label."""
    if (label == label[:1]).all():
        yield from [(int(label[0]), np.arange(len(label)))] if len(label) else []
        return
    order = np.argsort(label, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        yield int(label[part[0]]), part


def _runs(task: Ids) -> Iterator[tuple[int, slice]]:
    """(task, its rows) of rows that stand in order of task."""
    ends = [*(np.flatnonzero(np.diff(task)) + 1).tolist(), len(task)]
    at = 0
    for end in ends:
        yield int(task[at]), slice(at, end)
        at = end


def _missing(tree: Ledger, nodes: Ids) -> set[int]:
    """Nodes without a stored state on the paths from their nearest stored ancestors."""
    missing: set[int] = set()
    for node in map(int, nodes):
        while node != ROOT and tree.slot[node] == NONE and node not in missing:
            missing.add(node)
            node = int(tree.parent[node])
    return missing


def _pad(values: Ids, pad: int) -> Ids:
    return np.concatenate([values, np.repeat(values[:1], pad)])


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
