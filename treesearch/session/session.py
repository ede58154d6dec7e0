"""A search over all its tasks: ask every one, run the wave, tell, record, repeat.

while some task has work:
    ask each task for its part of the wave          (with lag = 1, one wave ahead)
    engine: run the segments in full batches, score them
    tell each task; write the wave to the run folder; yield a snapshot
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch import __version__
from treesearch.backends.base import Kernel, Spec, describe, fingerprint
from treesearch.budget import Budget, Cost, Share
from treesearch.core import weights
from treesearch.core.noise import root_key
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.core.weights import ess
from treesearch.engine.asking import decode, encode, without_graph
from treesearch.engine.engine import Engine
from treesearch.engine.model import Model
from treesearch.engine.segments import Arrival, Segments
from treesearch.engine.states import LostStates, MemoryStates, StateStore, forget, recovered
from treesearch.errors import BudgetError, StoreError, TreeSearchError, choose, unknown
from treesearch.interrupts import first_interrupt, interrupts_deferred, interrupts_unwrapped
from treesearch.methods import METHODS
from treesearch.methods.base import AUTO, MEMORY, Method, Problem, Search, Status
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.population import planned_memory
from treesearch.results.certificate import Context
from treesearch.results.result import Absent, SearchResult, TaskResult
from treesearch.rewards.base import Reward, RewardError
from treesearch.runs import folder as runs
from treesearch.session.calibrate import Pilot, choose_lambda

Callback = Callable[["Snapshot"], Any]
KEEP = ("all", "frontier", "none")
PREVIEWED = "rewards above t = 0 are of approximate previews, those of the samples are not"
UNPROMPTED = "neither the kernel nor the reward takes prompts: here they change nothing but the noise"
NOISY = "the reward gives one sample another value each time: whether it is the one of this run cannot be told"
REWRITTEN = "the code of the reward is another than when this run began; the samples scored again came out the same"
SAME = 1e-3  # relative difference at which numbers that a network gave count as one
LARGEST = weights.LARGEST / 100  # of |r| and |λ r|: methods may add some up before they weigh them
UNDECODED = Absent("this run was read without its kernel: use treesearch.resume")
GROWTH = 1.1  # the ESS of the history is computed again when the trees have grown by this factor


@dataclass(frozen=True)
class Options:
    """How a search runs; nothing here changes a draw.

    Args:
        batch_size: rows of a forward pass.
        keep_states: "all" keeps the state of every node, "frontier" only those the search can still start from and the
            samples, "none" only the samples; a dropped state is recomputed from its key when it is needed.
        batch_invariant: pad every pass to batch_size rows, so that a row's result does not depend on its batch.
    """

    batch_size: int = 64
    keep_states: str = "all"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise TypeError(f"batch_size is {self.batch_size!r}, expected a whole number")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        choose("keep_states", self.keep_states, KEEP)
        if not isinstance(self.batch_invariant, bool):
            raise TypeError(f"batch_invariant is {self.batch_invariant!r}, expected True or False")


@dataclass
class Snapshot:
    """The search after a wave.

    Args:
        wave: its number.
        best_reward: best over all tasks so far; -inf before the first sample.
        cost: spent so far on what is recorded.
        record: the wave's history record.
        result: makes the result so far.
        total: NFE budget, None without one.
        stop: ends the search after this wave; `resume` goes on from there.
    """

    wave: int
    best_reward: float
    cost: Cost
    record: dict[str, Any]
    result: Callable[[], SearchResult]
    total: int | None
    stop: Callable[[], None]

    def __getstate__(self) -> dict[str, Any]:
        """As data: with the result so far, and nothing to stop."""
        return vars(self) | {"result": Found(self.result()), "stop": _is_elsewhere}


@dataclass(frozen=True)
class Found:
    """A result as a function that returns it."""

    result: SearchResult

    def __call__(self) -> SearchResult:
        return self.result


def _is_elsewhere() -> None:
    raise TreeSearchError("this snapshot was copied: its search is elsewhere, stop it there")


@dataclass
class Wave:
    """A wave in flight."""

    number: int
    work: list[tuple[int, Segments]]
    bounds: list[tuple[int, int]]  # nodes it added to each tree
    hits: list[NDArray[Any]]  # records of `runs.HIT`
    states: list[dict[str, Any]]  # of the searches, right after they were asked
    known: list[NDArray[np.float64]] | None = None  # rewards of a wave that was read back from a run
    cost: Cost = field(default_factory=Cost)
    left: int = 0  # rows that have not arrived
    told: list[int] = field(default_factory=list)  # rows of each task told before it was selected

    def tell(self, searches: Sequence[Search], rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Tell the searches of some of its rows, counted in order of its work; (task, how many)."""
        at, told = 0, []
        for task, segments in self.work:
            mine = rows[(rows >= at) & (rows < at + len(segments.first))] - at
            at += len(segments.first)
            if len(mine):
                part = Segments(segments.source[mine], segments.first[mine], segments.last[mine], segments.hold)
                searches[task].tell(part)
                told.append((task, len(mine)))
        self.left -= len(rows)
        return told


class Runner(Protocol):
    """What computes: `treesearch.engine.engine.Engine` here, or one that sends the work elsewhere."""

    ahead: int

    @property
    def drains(self) -> bool: ...
    @property
    def capacity(self) -> int: ...
    def submit(self, wave: int, work: Sequence[tuple[int, Segments]]) -> Any: ...
    def finish(self, wave: int) -> Cost: ...
    def collect(self) -> list[Arrival]: ...
    def path(self, task: int, node: int, above: int) -> Tensor: ...
    def score(self, task: NDArray[np.int64], x: Tensor) -> NDArray[np.float64]: ...
    def settle(self) -> None: ...
    def backlog(self) -> float: ...
    def summary(self) -> dict[str, Any]: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Workers(Protocol):
    """Processes that compute, such as `treesearch.distributed.RayWorkers`; running while entered."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...
    def kernel(self, recipe: Any) -> Kernel: ...
    def reward(self, recipe: Any) -> Reward: ...
    def engine(
        self, model: Model, trees: Sequence[Tree], states: StateStore, cost: Cost, *, keep_inner: bool = True
    ) -> Runner: ...


class Session:
    """One search over all its tasks.

    Args:
        kernel, reward, method: what searches what, and how.
        prompts: one a task; None for a single unconditional task.
        budget: of the whole search.
        seed: of all noise.
        options: how it runs.
        workers: where it computes; None is this process.
        stream_id: population of root keys; 1 is the pilot's.
        encoded: conditioning of the prompts, if it was computed before.
    """

    def __init__(
        self,
        kernel: Kernel,
        reward: Reward,
        method: Method,
        *,
        prompts: Sequence[Any] | None,
        budget: Budget,
        seed: int,
        options: Options,
        workers: Workers | None = None,
        stream_id: int = 0,
        encoded: dict[str, Any] | None = None,
    ) -> None:
        self.kernel, self.reward, self.method, self.prompts = kernel, reward, method, prompts
        self.budget, self.seed, self.options = budget, seed, options
        self.workers = workers
        self.engine: Runner
        self.spec = describe(kernel)
        self.keys = [root_key(seed, task, stream_id) for task in range(self.num_tasks)]
        self.cost, self.pilot = Cost(), Pilot()
        self.memory = planned_memory()
        self.history: list[dict[str, Any]] = []
        self.run: runs.Run | None = None
        self.searches: list[Search] = []
        self._inflight: deque[Wave] = deque()
        self._next, self._best, self._ess = 0, -np.inf, (0, 0.0)
        self._told, self._staleness = [0] * self.num_tasks, Staleness()
        self._encoded = encoded
        self._told_of: list[list[str]] | None = None
        self.doubts: list[str] = []  # what resuming could not make sure of
        self._inner: dict[int, NDArray[np.int64]] = {}  # by task: nodes above t = 0 whose states are kept
        self._stopped = False
        self.lost: str | None = None  # what became of a run folder that is gone
        self._seconds = 0.0  # of earlier sessions
        self._out_of_time = False
        self._began = time.perf_counter()

    @property
    def num_tasks(self) -> int:
        return 1 if self.prompts is None else len(self.prompts)

    @without_graph()
    @interrupts_unwrapped()
    def start(self, store: str | os.PathLike[str] | None, beside: Mapping[str, Any] | None = None) -> None:
        """Check the budget, resolve λ, open the run folder, start the searches.

        Args:
            store: the run folder, None to keep nothing.
            beside: further JSON documents for it, by file name.
        """
        self.check_budget()
        self._conditioning()  # refuses prompts before a folder is made
        self._remarks()
        if self.method.lam == AUTO:
            if store is not None:
                runs.check_vacant(store)  # refuses before the pilot is paid for
            self._pilot()
        if store is not None:
            content = {} if self.spec.fingerprint is not None else {"kernel_code": fingerprint.of(self.kernel)}
            self.run = runs.Run.create(store, self.config() | content, beside)
        try:
            self._begin(self._states(0), 0)
        except BaseException:
            self.close("interrupted")
            raise

    def check_budget(self) -> None:
        """Raises:
        BudgetError: no budget, or one below a unit of the method for each task.
        """
        unit, share = self.method.unit(self.spec), self.budget.share(self.num_tasks)
        if self.budget.reward_calls is not None and any(self.spec.rewards_per_nfe):
            raise BudgetError(
                "a guide calls the reward in its steps, which Budget(reward_calls=...) cannot plan: limit nfe instead"
            )
        sized = getattr(self.method, "n", None) or getattr(self.method, "num_particles", None)
        if self.budget.empty and not sized:
            raise BudgetError("no budget: give budget=ts.Budget(nfe=...), seconds, reward_calls or iterations")
        least = {"nfe": unit.nfe, "reward_calls": unit.reward_calls, "iterations": 1}
        for name, need in least.items():
            if getattr(share, name) < need:
                each = f" for each of {self.num_tasks} tasks" if self.num_tasks > 1 else ""
                raise BudgetError(
                    f"Budget({name}={getattr(self.budget, name)}) is below {unit.name}{each}: "
                    f"the minimum is {need * self.num_tasks}"
                )

    def config(self) -> dict[str, Any]:
        """What run.json holds and `resume` checks."""
        return {
            "method": {"name": type(self.method).__name__} | asdict(self.method),
            "seed": self.seed,
            "prompts": None if self.prompts is None else list(self.prompts),
            "num_steps": self.spec.num_steps,
            "state_shape": list(self.spec.state_shape),
            "dtype": str(self.spec.dtype),
            "fingerprint": self.spec.fingerprint,
            "deterministic": [t for t, noisy in enumerate(self.spec.stochastic) if not noisy],
            "previews": self.spec.previews,
            "unprompted": self.unprompted,
            **({"remarks": self._remarks()} if any(self._remarks()) else {}),
            **({} if self.spec.departs is None else {"departs": self.spec.departs}),
            "reward": self.reward.name,
            "reward_settings": self.reward.settings,
            "reward_code": self.reward.code,
            "kernel": getattr(self.kernel, "class_name", type(self.kernel).__name__),
            "budget": asdict(self.budget),
            "pilot": asdict(self.pilot),
            "options": asdict(self.options),
            "memory": self.memory,
            "versions": {
                "treesearch": __version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    @without_graph()
    @interrupts_unwrapped()
    def restore(self, run: runs.Run, blocks: list[runs.Block]) -> None:
        """Take up a run where its log ends; recorded rewards decide, nothing is computed again."""
        self.run = run
        self.pilot = Pilot(**run.config["pilot"])
        self.memory = run.config.get("memory", self.memory)
        self.history = [b.meta["history"] for b in blocks]
        used = blocks[-1].meta["slots"] if blocks else 0
        self.cost = Cost(**blocks[-1].meta["cost"]) if blocks else Cost(**run.config["pilot"]["cost"])
        self._seconds, self._next = self.cost.seconds, len(blocks)
        self._best = max((h["best_reward"] for h in self.history if h["best_reward"] is not None), default=-np.inf)
        self._remarks()
        self._begin(self._states(used), used)
        if not blocks:
            return
        again = Wave(self._next - 1, [], [], [], [], known=[])
        again.work, again.known = rebuild(self.searches, blocks, self.method.lag)
        if self.method.lag and len(blocks[-1].nodes):
            self._inflight.append(again)

    @without_graph()
    @interrupts_unwrapped()
    def verify(self) -> None:
        """Compute a little of what a run has recorded again: one edge of a kernel without a fingerprint, some rewards.

        This is work done again, `Cost.repeated_nfe`, and no budget pays for it: however often a run is resumed, its
        tree is that of a straight one.

        Raises:
            StoreError: the kernel or the reward does not reproduce it.
        """
        if self.spec.fingerprint is None and not self._of_same_content():
            self._verify_kernel()
        while True:
            try:
                return self._verify_reward()
            except LostStates as lost:
                forget(lost, self._slots_of())

    def _of_same_content(self) -> bool:
        """Whether a kernel without a fingerprint is, code and all that it holds, the one that the run began with."""
        was = None if self.run is None else self.run.config.get("kernel_code")
        return was is not None and was == fingerprint.of(self.kernel)

    def _verify_kernel(self) -> None:
        """Walk the cheapest stored edge again."""
        if not (found := self._cheapest()):
            return
        _, node, above, task = found
        again = self.engine.path(task, node, above)
        stored = self.states.get(self.searches[task].tree.slot[[node]])[0]
        if not torch.allclose(again.cpu().double(), stored.cpu().double(), rtol=1e-3, atol=1e-3):
            raise StoreError(
                f"fingerprint: the kernel does not reproduce node {node} of task {task}, so it is not the one this run "
                "was made with (weights, num_steps, eta, guidance?): resume with the original kernel"
            )

    def _verify_reward(self) -> None:
        """Score the lowest, the middle and the highest recorded sample again: a name and settings are not all of it."""
        task, node, recorded = self._scored()
        if not len(task):
            return
        finite = recorded[np.isfinite(recorded)]
        room = SAME * float(np.ptp(finite)) if len(finite) else 0.0
        pick = np.unique(np.argsort(recorded, kind="stable")[[0, len(task) // 2, -1]])
        task, node, recorded = task[pick], node[pick], recorded[pick]
        x = self.states.get(np.array([self.searches[i].tree.slot[n] for i, n in zip(task, node, strict=True)]))
        again = self.engine.score(task, x)
        same = _alike(again, recorded, room)
        if same.all():
            was = self.run.config.get("reward_code") if self.run is not None else None
            if was is not None and self.reward.code not in (None, was):
                self.doubts.append(REWRITTEN)
            return
        alone = np.concatenate([self.engine.score(task[i : i + 1], x[i : i + 1]) for i in range(len(task))])
        if not _alike(alone, again, room).all():
            self.doubts.append(NOISY)
            return
        i = int(np.argmin(same))
        raise StoreError(
            f"reward: {self.reward.name!r} is {again[i]:g} at node {node[i]} of task {task[i]}, where the run has "
            f"{recorded[i]:g}: it is not the one that this run was made with; resume with that one, or begin a new run"
        )

    def _scored(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """(task, node, reward) of all samples whose states are stored."""
        found = [
            (i, s.tree, leaves[s.tree.slot[leaves] != NONE])
            for i, s in enumerate(self.searches)
            for leaves in [s.tree.leaves]
        ]
        task = np.concatenate([np.full(len(leaves), i) for i, _, leaves in found])
        node = np.concatenate([leaves for _, _, leaves in found])
        return task, node, np.concatenate([tree.reward[leaves] for _, tree, leaves in found])

    def _cheapest(self) -> tuple[int, int, int, int] | None:
        """(NFE, node, stored ancestor or the root, task) of the cheapest walk between stored states that are whole.

        Raises:
            StoreError: all are lost.
        """
        stored = any((search.tree.slot != NONE).any() for search in self.searches)
        while found := [(*path, task) for task in range(self.num_tasks) if (path := self._cheapest_path(task))]:
            _, node, above, task = cheapest = min(found)
            slot = self.searches[task].tree.slot[[node, above]]
            try:
                self.states.get(slot[slot != NONE])
            except LostStates as lost:
                forget(lost, self._slots_of())
            else:
                return cheapest
        if stored and not any((search.tree.slot != NONE).any() for search in self.searches):
            raise StoreError(
                f"{self.run.path if self.run else 'the run'}: every state is lost, and the kernel has no fingerprint: "
                "nothing shows that it is the run's own; put back the states"
            )
        return None

    def _slots_of(self) -> list[NDArray[Any]]:
        """Places of the states of every tree."""
        return [search.tree.slot for search in self.searches]

    def _cheapest_path(self, task: int) -> tuple[int, int, int] | None:
        """(NFE, node, stored ancestor or the root) of the cheapest walk between stored states."""
        tree, top = self.searches[task].tree, self.spec.num_steps
        stored = np.flatnonzero(tree.slot != NONE)
        above = np.maximum(tree.parent[stored], ROOT)
        while (missing := (above != ROOT) & (tree.slot[above] == NONE)).any():
            above[missing] = tree.parent[above[missing]]
        price = np.minimum(tree.t[above], top) - tree.t[stored]
        if not (price > 0).any():
            return None
        i = int(np.argmin(np.where(price > 0, price, top + 1)))
        return int(price[i]), int(stored[i]), int(above[i])

    def waves(self) -> Generator[Snapshot]:
        """Run until the budget is spent, one snapshot a wave.

        Where the engine drains, a first Ctrl-C stops the asking and takes effect once what is under way has arrived.
        """
        status = "interrupted"
        try:
            with first_interrupt(self._stop) if self.engine.drains else nullcontext():
                steps = self._flow() if self.method.mode == "async" else self._in_waves()
                while (snapshot := _next(steps)) is not None:
                    if not self._stopped:
                        yield snapshot
            status = "stopped" if any(s.status == Status.STOPPED for s in self.searches) else "finished"
        finally:
            self.close(status)

    def stop(self) -> None:
        """End the search after the wave that is yielded; what is under way already arrives and is recorded."""
        self._stopped = True
        self._stop()

    def _stop(self) -> None:
        """Ask for nothing new."""
        for search in self.searches:
            if search.status == Status.RUNNING:
                search.status = Status.STOPPED

    def _in_waves(self) -> Iterator[Snapshot]:
        """Run a wave, tell it, send the next one, record it; with a lag the next one is under way already."""
        while self._advance():
            wave = self._inflight.popleft()
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
                self._drop(wave)
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
                f"reward {self.reward.name!r} is {reward[row]:g}, lam {self.method.lam}: sums of such numbers are not "
                f"finite; scale it, or return -inf to forbid [{where}]"
            )

    def _settle(self, wave: Wave) -> Snapshot:
        """Record a wave that was told, once its states are there."""
        self.engine.settle()
        return self._record(wave)

    def _flow(self) -> Iterator[Snapshot]:
        """Asynchronous: tell each row when it arrives and select another in its place.

        The log holds what was selected in order of selection, so rows that arrive early wait for the ones before them
        to be recorded. One record for as many rows as are in flight.
        """
        while True:
            wave = self._ask()
            if wave is not None:
                self.engine.submit(wave.number, wave.work)
                self._inflight.append(wave)
            if not self._inflight:
                return
            known = {w.number: w for w in self._inflight}
            for number, rows, cost in self.engine.collect():
                of = known[number]
                self._check_sizes(of)
                for task, count in of.tell(self.searches, rows):
                    self._staleness.add(self._told[task] - of.told[task], count)
                    self._told[task] += count
                of.cost = cost or of.cost
            done = list(itertools.takewhile(lambda w: not w.left, self._inflight))
            rows = sum(len(segments.first) for w in done for _, segments in w.work)
            if len(done) == len(self._inflight) or rows >= sum(w.left for w in self._inflight):
                for _ in done:
                    self._inflight.popleft()
                wave = _merge(len(self.history), done)
                self._drop(wave)
                yield self._settle(wave)

    def close(self, status: str | None = None) -> None:
        """Let go of the run folder and the workers; without a status the run keeps its own."""
        if self.run is not None:
            if status is not None:
                self.run.config["out_of_time"] = self._out_of_time
            self.run.close(self.run.config["status"] if status is None else status)
        if self.searches:
            self.engine.close()

    def _advance(self) -> bool:
        """Ask for waves until enough are in flight; whether any is."""
        ahead = self.engine.ahead if self.method.independent else 0
        while len(self._inflight) <= max(self.method.lag, ahead):
            wave = self._ask()
            if wave is None:
                break
            self.engine.submit(wave.number, wave.work)
            self._inflight.append(wave)
        return bool(self._inflight)

    def _ask(self) -> Wave | None:
        self._watch_clock()
        active = [i for i, s in enumerate(self.searches) if s.status == Status.RUNNING and not s.full]
        before = [len(s.tree) for s in self.searches]
        capacity = -(-self.engine.capacity // max(1, len(active)))
        with interrupts_deferred():
            work = [(i, self.searches[i].ask(capacity)) for i in active]
        hits = [np.empty(0, runs.HIT)]
        for i in active:
            ended = np.empty(len(self.searches[i].hits), runs.HIT)
            ended["task"], ended["leaf"] = i, self.searches[i].hits
            hits.append(ended)
        work = [(i, segments) for i, segments in work if len(segments.first)]
        if not work and not any(map(len, hits)):
            return None
        bounds = [(a, len(s.tree)) for a, s in zip(before, self.searches, strict=True)]
        rows = sum(len(segments.first) for _, segments in work)
        self._next += 1
        return Wave(
            self._next - 1, work, bounds, hits, [s.state() for s in self.searches], left=rows, told=list(self._told)
        )

    def _watch_clock(self) -> None:
        """Stop asking once the time is up; a population on its way may arrive, for it has no samples before."""
        if self.budget.seconds is not None and self.elapsed() + self._backlog() >= self.budget.seconds:
            for search in self.searches:
                if search.status == Status.RUNNING and not search.busy:
                    search.status, self._out_of_time = Status.BUDGET, True
        if self.lost is not None:
            for search in self.searches:
                if search.status == Status.RUNNING and not search.busy:
                    search.status = Status.STOPPED

    def _backlog(self) -> float:
        """Seconds before new work would begin; the first work of all is asked in any case."""
        return self.engine.backlog() if self.history else 0.0

    def _drop(self, wave: Wave) -> None:
        """Forget the states that the search cannot start from any more (keep_states="frontier").

        Only nodes that were kept so far and those of this wave are looked at; states that have yet to come home wait.
        """
        if self.options.keep_states != "frontier":
            return
        for task, _ in wave.work:
            tree, frontier = self.searches[task].tree, self.searches[task].frontier()
            if frontier is None:
                continue
            start, stop = wave.bounds[task]
            new = np.arange(start, stop)[tree.t[start:stop] > 0]
            if task not in self._inner:
                self._inner[task] = np.flatnonzero((tree.t[:start] > 0) & (tree.slot[:start] != NONE))
            nodes = np.concatenate([self._inner[task], new])
            kept, home = np.isin(nodes, frontier), tree.slot[nodes] != NONE
            stale = nodes[~kept & home]
            self.states.drop(tree.slot[stale])
            tree.slot[stale] = NONE
            self._inner[task] = nodes[kept | ~home]

    def _record(self, wave: Wave) -> Snapshot:
        """The wave's history record; written to the run folder, handed to the caller."""
        self.cost.add(wave.cost)
        self.cost.seconds = self.elapsed()
        for task, segments in wave.work:
            tree = self.searches[task].tree
            leaves = segments.last[tree.t[segments.last] == 0]
            if len(leaves):
                self._best = max(self._best, float(tree.reward[leaves].max()))
        nodes = sum(after for _, after in wave.bounds)
        record = {
            "wave": wave.number,
            "nfe": self.cost.nfe,
            "reward_calls": self.cost.reward_calls,
            "seconds": round(self.cost.seconds, 4),
            "best_reward": self._best if np.isfinite(self._best) else None,
            "ess": self._ess_now(nodes),
            "nodes": nodes,
        }
        if self.method.mode == "async":
            record["staleness"] = self._staleness.mean()
        if workers := self.engine.summary():
            record["workers"] = workers
        self.history.append(record)
        if self.run is not None and self.lost is None:
            self._write(self.run, wave, record)
        return Snapshot(wave.number, self._best, self.cost.copy(), record, self.result, self.budget.nfe, self.stop)

    def _write(self, run: runs.Run, wave: Wave, record: dict[str, Any]) -> None:
        if not run.there:
            self._lose(run)
            return
        nodes = np.concatenate([runs.records(i, s.tree, *wave.bounds[i]) for i, s in enumerate(self.searches)])
        self._slots = max(self._slots, int(nodes["slot"].max(initial=-1)) + 1)
        meta = {"history": record, "cost": self.cost.as_dict(), "searches": wave.states, "slots": self._slots}
        run.write(runs.Block(wave.number, meta, nodes, np.concatenate(wave.hits)))

    def _lose(self, run: runs.Run) -> None:
        """The run folder is gone: ask for nothing new, and leave the result to the caller."""
        self.lost = (
            f"{run.path} was removed, moved or replaced while the search ran: it stopped there, and what it found is "
            "in this result alone"
        )
        logging.getLogger("treesearch").warning(self.lost)
        run.leave()

    def _ess_now(self, nodes: int) -> float:
        """ESS of the leaves, summed over tasks; as of the last time that the recorded nodes had grown by 10 %."""
        if nodes >= GROWTH * self._ess[0]:
            self._ess = nodes, float(sum(ess(s.readout().log_weights) for s in self.searches))
        return round(self._ess[1], 3)

    def elapsed(self) -> float:
        """Seconds of this session and the ones before it."""
        return self._seconds + time.perf_counter() - self._began

    @without_graph()
    @interrupts_unwrapped()
    def result(self) -> SearchResult:
        """Everything so far."""
        tasks, config = [], self.config()
        for i, search in enumerate(self.searches):
            prompt = None if self.prompts is None else self.prompts[i]
            readout = search.readout()
            readout.extra |= self.pilot.diagnostics()
            if self.method.mode == "async":
                readout.extra["staleness"] = {"mean": self._staleness.mean(), "max": self._staleness.most}
            if workers := self.engine.stats():
                readout.extra["workers"] = workers
            if self.spec.previews and (~np.isnan(search.tree.reward[search.tree.t > 0])).any():
                readout.warnings.append(PREVIEWED)
            if self.spec.departs is not None:
                readout.warnings.append(self.spec.departs)
            readout.warnings += [UNPROMPTED] * self.unprompted + self._remarks()[i] + self.doubts
            if self.lost is not None:
                readout.warnings.append(self.lost)
            fetch = self._fetcher(i)
            context = self._context(config, i)
            tasks.append(TaskResult(prompt, search.tree, readout, float(search.lam), search.status, fetch, context))
        store = None if self.run is None or self.lost is not None else str(self.run.path)
        return SearchResult(tasks, self.cost.copy(), list(self.history), store)

    def _context(self, config: dict[str, Any], task: int) -> Context:
        """What a task's certificate needs beside its read-out."""
        saved = {} if self.run is None else self.run.config
        return Context(
            method=self.method,
            config=config,
            task=task,
            over=self.searches[task].status not in (Status.RUNNING, Status.STOPPED)
            or saved.get("status") == "finished",
            out_of_time=self._out_of_time or (saved.get("status") != "running" and saved.get("out_of_time", False)),
        )

    def _fetcher(self, task: int) -> Callable[[NDArray[np.int64]], Any]:
        """Decodes nodes of one tree, in batches; states that were lost are computed again."""

        @without_graph()
        def fetch(nodes: NDArray[np.int64]) -> Any:
            size, parts = self.options.batch_size, []
            for at in range(0, max(len(nodes), 1), size):
                some = nodes[at : at + size]
                x = recovered(lambda some=some: self._stored(task, some), self._slots_of()).to(self.spec.device)
                parts.append(decode(self.kernel, x))
            return torch.cat(parts) if isinstance(parts[0], Tensor) else [item for part in parts for item in part]

        return fetch

    def _stored(self, task: int, nodes: NDArray[np.int64]) -> Tensor:
        """States of nodes of one tree; those that are not stored are computed again from their keys.

        Raises:
            LostStates: some that should be stored are not.
        """
        tree = self.searches[task].tree
        kept = tree.slot[nodes] != NONE
        found = self.states.get(tree.slot[nodes[kept]])
        if kept.all():
            return found
        out = found.new_empty((len(nodes), *self.spec.state_shape))
        out[torch.from_numpy(kept)] = found
        for i in np.flatnonzero(~kept):
            above = int(tree.parent[nodes[i]])
            while above != ROOT and tree.slot[above] == NONE:
                above = int(tree.parent[above])
            out[int(i)] = self.engine.path(task, int(nodes[i]), above).to(out.device)
        return out

    def _begin(self, states: StateStore, slots: int) -> None:
        """Start every task's search on what the pilot left of the budget."""
        share = self._share()
        each = self.memory // self.num_tasks
        searches = [self.method.start(Problem(i, self.spec, key, share, each)) for i, key in enumerate(self.keys)]
        self.states, self._slots = states, slots
        trees = [s.tree for s in searches]
        model = Model(
            self.kernel,
            self.spec,
            self.reward,
            prompts=self.prompts,
            encoded=self._conditioning(),
            batch_size=self.options.batch_size,
            batch_invariant=self.options.batch_invariant,
            angle=trees[0].angle,
        )
        make = Engine if self.workers is None else self.workers.engine
        self.engine = make(model, trees, states, self.cost, keep_inner=self.options.keep_states != "none")
        self.searches = searches  # last: what is begun has an engine to close

    def _conditioning(self) -> dict[str, Any]:
        """The encoded prompts; encoding happens once a search."""
        if self._encoded is None:
            self._encoded = {} if self.prompts is None else encode(self.kernel, self.prompts)
        return self._encoded

    def _remarks(self) -> list[list[str]]:
        """What the reward says of each task's prompt; it is asked once a search."""
        if self._told_of is None:
            self._told_of = [[]] if self.prompts is None else self.reward.remarks_on(self.prompts)
        return self._told_of

    @property
    def unprompted(self) -> bool:
        """Whether there are prompts that nothing takes."""
        return self.prompts is not None and not self._conditioning() and not self.reward.prompted

    def _share(self) -> Share:
        """One task's part of what is left beside the pilot."""
        beside = {name: self.pilot.cost[name] for name in ("nfe", "reward_calls")}
        limits = {name: getattr(self.budget, name) for name in beside}
        left = {name: max(1, limit - beside[name]) for name, limit in limits.items() if limit is not None}
        return replace(self.budget, **left).share(self.num_tasks)

    def _states(self, used: int) -> StateStore:
        if self.run is not None:
            return self.run.open_states(self.spec.state_shape, self.spec.dtype, used)
        return MemoryStates(self.spec.state_shape, self.spec.dtype)

    def _pilot(self) -> None:
        """Draw a pilot with noise of its own, choose λ from it, and freeze both."""
        self.pilot, lam = choose_lambda(self._draw_pilot, self.budget, self.num_tasks, self.spec.num_steps)
        self.method = replace(self.method, lam=lam)
        self.cost = Cost(**self.pilot.cost)

    def _draw_pilot(self, n: int) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], Cost]:
        """Rewards and log p/q of n rollouts a task, and their cost; of the kernel that a guide proposes for."""
        guide = hasattr(type(self.kernel), "proposes_for") and self.spec.departs is None
        session = Session(
            self.kernel.proposes_for if guide else self.kernel,  # type: ignore[attr-defined]
            self.reward,
            BestOfN(n=n),
            prompts=self.prompts,
            budget=Budget(),
            seed=self.seed,
            options=self.options,
            workers=self.workers,
            stream_id=1,
            encoded=self._conditioning(),
        )
        session.start(None)
        for _ in session.waves():
            pass
        trees = [s.tree for s in session.searches]
        return [t.reward[t.leaves] for t in trees], [t.log_w[t.leaves] for t in trees], session.cost


@dataclass
class Staleness:
    """How many rows of its task were told between the selection of a row and its arrival: what it did not know."""

    total: int = 0
    rows: int = 0
    most: int = 0

    def add(self, told: int, rows: int) -> None:
        """Enter rows that arrive together, `told` rows after they were selected."""
        self.total, self.rows, self.most = self.total + told * rows, self.rows + rows, max(self.most, told)

    def mean(self) -> float:
        """Mean over the rows so far."""
        return round(self.total / max(1, self.rows), 2)


@without_graph()
@interrupts_unwrapped()
def _next(steps: Iterator[Snapshot]) -> Snapshot | None:
    """The next snapshot, None at the end: modes that hold while it is made end with it."""
    return next(steps, None)


def _alike(a: NDArray[np.float64], b: NDArray[np.float64], room: float) -> NDArray[np.bool_]:
    return np.isclose(a, b, rtol=SAME, atol=room)


def _merge(number: int, waves: Sequence[Wave]) -> Wave:
    """Waves that follow one another as one."""
    cost = Cost()
    for wave in waves:
        cost.add(wave.cost)
    bounds = [(a, b) for (a, _), (_, b) in zip(waves[0].bounds, waves[-1].bounds, strict=True)]
    work = [part for wave in waves for part in wave.work]
    return Wave(number, work, bounds, [h for w in waves for h in w.hits], waves[-1].states, cost=cost)


def rebuild(
    searches: Sequence[Search], blocks: list[runs.Block], lag: int
) -> tuple[list[tuple[int, Segments]], list[NDArray[np.float64]]]:
    """Fill fresh searches from recorded waves; with a lag, returns the last wave's leaves and rewards, untold.

    Raises:
        StoreError: the records are none that the searches would have left.
    """
    nodes, hits = np.concatenate([b.nodes for b in blocks]), np.concatenate([b.hits for b in blocks])
    late = blocks[-1].nodes[: len(blocks[-1].nodes) * lag]
    order = np.argsort(nodes["task"], kind="stable")
    bounds = np.searchsorted(nodes["task"][order], np.arange(len(searches) + 1))
    work, known = [], []
    for task, search in enumerate(searches):
        with _replayed(task):
            runs.grow(search.tree, nodes[order[bounds[task] : bounds[task + 1]]])
            leaves = np.flatnonzero(search.tree.t == 0)
            # With a lag, the straight run had selected the next wave before the last one was told.
            untold = leaves[leaves >= len(search.tree) - np.count_nonzero(late["task"] == task)]
            known.append(search.tree.reward[untold].copy())
            work.append((task, Segments(untold, untold, untold)))
            search.tree.reward[untold] = np.nan
            ends = np.concatenate([leaves, hits["leaf"][hits["task"] == task]])
            state = blocks[-1].meta["searches"][task]
            runs.check_state(state, search.state(), len(search.tree))
            search.restore(state, ends)
    return work, known


@contextmanager
def _replayed(task: int) -> Iterator[None]:
    """Turns what a method makes of records that it did not write into a StoreError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StoreError(
            f"the records of task {task} are none that this method leaves ({error or type(error).__name__}): the run "
            "is damaged, or was made by something else"
        ) from error


def read_trees(config: dict[str, Any], blocks: list[runs.Block]) -> tuple[list[Tree], list[dict[str, Any]]]:
    """Trees and history of a recorded run, without its kernel."""
    found = read_result(config, blocks)
    return [task.tree for task in found.tasks], found.history


def read_result(config: dict[str, Any], blocks: list[runs.Block]) -> SearchResult:
    """The result of a recorded run without its kernel: everything but the decoded samples."""
    prompts, shape = config["prompts"] or [None], tuple(config["state_shape"])
    noisy = tuple(t not in config.get("deterministic", ()) for t in range(config["num_steps"] + 1))
    spec = Spec(config["num_steps"], shape, shape, noisy, torch.device("cpu"), torch.float32, None, 1)
    method = build_method(config["method"])
    each = config.get("memory", MEMORY) // len(prompts)
    with _replayed(0):
        searches = [
            method.start(Problem(i, spec, root_key(config["seed"], i), Share(), each)) for i in range(len(prompts))
        ]
    if blocks:
        rebuild(searches, blocks, 0)
    over, late = config["status"] == "finished", config.get("out_of_time", False)
    tasks = []
    for i, (prompt, search) in enumerate(zip(prompts, searches, strict=True)):
        context = Context(method=method, config=config, task=i, over=over, out_of_time=late)
        readout = search.readout()
        readout.extra |= Pilot(**config["pilot"]).diagnostics()
        readout.warnings += [config["departs"]] if "departs" in config else []
        readout.warnings += [UNPROMPTED] if config.get("unprompted") else []
        readout.warnings += itertools.chain.from_iterable(config.get("remarks", [])[i : i + 1])
        tasks.append(TaskResult(prompt, search.tree, readout, float(search.lam), search.status, UNDECODED, context))
    cost = Cost(**blocks[-1].meta["cost"]) if blocks else Cost()
    return SearchResult(tasks, cost, [b.meta["history"] for b in blocks])


def build_method(config: dict[str, Any]) -> Method:
    """A method from its saved name and fields.

    Raises:
        StoreError: a method or a field that this version does not know, or a value that the method refuses.
    """
    name, given = config["name"], {k: v for k, v in config.items() if k != "name"}
    if name not in METHODS:
        raise StoreError(unknown("method", name, METHODS))
    known = [f.name for f in fields(METHODS[name])]
    if foreign := sorted(set(given) - set(known)):
        raise StoreError(
            f"the run's {name} has settings this version does not know ({', '.join(foreign)}): use the version that "
            "wrote it"
        )
    if missing := [f for f in known if f not in given]:
        raise StoreError(
            f"the run's {name} lacks {', '.join(missing)}: an older version wrote it (use that one), or it is damaged"
        )
    try:
        return METHODS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"the run's {name} cannot be made: {error}") from error
