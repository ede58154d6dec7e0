"""A search over all its tasks: ask every one, run the wave, tell, record, repeat.

while some task has work:
    ask each task for its part of the wave          (with lag = 1, one wave ahead)
    engine: run the segments in full batches, score them
    tell each task; write the wave to the run folder; yield a snapshot
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.base import Kernel, Spec, describe
from rewards.base import Reward
from treesearch import __version__, runs
from treesearch.budget import Budget, Cost, Share
from treesearch.calibrate import Pilot, choose_lambda
from treesearch.certificate import Context
from treesearch.engine import Arrival, Engine, Segments, encode
from treesearch.errors import BudgetError, StoreError, choose, unknown
from treesearch.methods import METHODS
from treesearch.methods.base import AUTO, MEMORY, Method, Problem, Search, Status
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.population import planned_memory
from treesearch.noise import root_key
from treesearch.result import SearchResult, TaskResult
from treesearch.states import MemoryStates, StateStore
from treesearch.tree import NONE, ROOT, Tree
from treesearch.weights import ess

Callback = Callable[["Snapshot"], Any]
KEEP = ("all", "frontier", "none")
PREVIEWED = "rewards above t = 0 are of approximate previews, those of the samples are not"
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
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        choose("keep_states", self.keep_states, KEEP)


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
    """

    wave: int
    best_reward: float
    cost: Cost
    record: dict[str, Any]
    result: Callable[[], SearchResult]
    total: int | None


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
    """What computes: `treesearch.engine.Engine` here, or one that sends the work elsewhere."""

    ahead: int

    @property
    def drains(self) -> bool: ...
    @property
    def capacity(self) -> int: ...
    def submit(self, wave: int, work: Sequence[tuple[int, Segments]]) -> Any: ...
    def finish(self, wave: int) -> Cost: ...
    def collect(self) -> list[Arrival]: ...
    def path(self, task: int, node: int, above: int, *, repeated: bool) -> Tensor: ...
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
        self,
        kernel: Kernel,
        spec: Spec,
        reward: Reward,
        trees: Sequence[Tree],
        states: StateStore,
        cost: Cost,
        **how: Any,
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
        self.verified = 0  # NFE spent on checking a kernel without a fingerprint
        self._seconds = 0.0  # of earlier sessions
        self._out_of_time = False
        self._began = time.perf_counter()

    @property
    def num_tasks(self) -> int:
        return 1 if self.prompts is None else len(self.prompts)

    def start(self, store: str | os.PathLike[str] | None) -> None:
        """Check the budget, resolve λ, open the run folder, start the searches."""
        self.check_budget()
        self._conditioning()  # refuses prompts before a folder is made
        if self.method.lam == AUTO:
            if store is not None and (runs.Path(store) / "run.json").exists():
                runs.Run.create(store, {})  # refuses before the pilot is paid for
            self._pilot()
        if store is not None:
            self.run = runs.Run.create(store, self.config())
        self._begin(self._states(0), 0)

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
            **({} if self.spec.departs is None else {"departs": self.spec.departs}),
            "reward": self.reward.name,
            "reward_settings": self.reward.settings,
            "kernel": getattr(self.kernel, "class_name", type(self.kernel).__name__),
            "budget": asdict(self.budget),
            "pilot": asdict(self.pilot),
            "verified": self.verified,
            "options": asdict(self.options),
            "memory": self.memory,
            "versions": {
                "treesearch": __version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def restore(self, run: runs.Run, blocks: list[runs.Block]) -> None:
        """Take up a run where its log ends; recorded rewards decide, nothing is computed again."""
        self.run = run
        self.pilot, self.verified = Pilot(**run.config["pilot"]), run.config["verified"]
        self.memory = run.config.get("memory", self.memory)
        self.history = [b.meta["history"] for b in blocks]
        used = blocks[-1].meta["slots"] if blocks else 0
        self.cost = Cost(**blocks[-1].meta["cost"]) if blocks else Cost(**run.config["pilot"]["cost"])
        self._seconds, self._next = self.cost.seconds, len(blocks)
        self._best = max((h["best_reward"] for h in self.history if h["best_reward"] is not None), default=-np.inf)
        self._begin(self._states(used), used)
        if not blocks:
            return
        again = Wave(self._next - 1, [], [], [], [], known=[])
        again.work, again.known = rebuild(self.searches, blocks, self.method.lag)
        if self.method.lag and len(blocks[-1].nodes):
            self._inflight.append(again)

    def verify(self) -> None:
        """Recompute the cheapest stored edge of a kernel without a fingerprint; the budget pays for it.

        Raises:
            StoreError: the kernel does not reproduce it.
        """
        if self.spec.fingerprint is not None:
            return
        found = [(path, task) for task in range(self.num_tasks) if (path := self._cheapest_path(task))]
        if not found:
            return
        (price, node, above), task = min(found)
        # A population on its way has spoken for its budget: there the check is work done again.
        busy = any(search.busy for search in self.searches)
        if not busy and self.budget.nfe is not None and self.cost.nfe + price > self.budget.nfe:
            return  # nothing will be computed either
        tree = self.searches[task].tree
        again = self.engine.path(task, node, above, repeated=busy)
        stored = self.states.get(tree.slot[[node]])[0]
        if not torch.allclose(again.cpu().double(), stored.cpu().double(), rtol=1e-3, atol=1e-3):
            raise StoreError(
                f"fingerprint: the kernel does not reproduce node {node} of task {task}, so it is not the one this run "
                "was made with (weights, num_steps, eta, guidance?): resume with the original kernel"
            )
        if not busy:
            self.verified += price
            for search in self.searches:
                search.extend(self._share())

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

    def waves(self) -> Iterator[Snapshot]:
        """Run until the budget is spent, one snapshot a wave.

        Where the engine drains, a first Ctrl-C stops the asking and takes effect once what is under way has arrived.
        """
        status = "interrupted"
        try:
            with _first_interrupt(self._stop) if self.engine.drains else nullcontext():
                yield from self._flow() if self.method.mode == "async" else self._in_waves()
            status = "finished"
        finally:
            self.close(status)

    def _stop(self) -> None:
        """Ask for nothing new."""
        for search in self.searches:
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
            for task, segments in wave.work:
                self.searches[task].tell(segments)
            if wave.known is None:
                self._drop(wave)
                self._advance()
                yield self._settle(wave)

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
                for task, count in of.tell(self.searches, rows):
                    self._staleness.add(self._told[task] - of.told[task], count)
                    self._told[task] += count
                of.cost = cost or of.cost
            done = list(takewhile(lambda w: not w.left, self._inflight))
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

    def _backlog(self) -> float:
        """Seconds before new work would begin; the first work of all is asked in any case."""
        return self.engine.backlog() if self.history else 0.0

    def _drop(self, wave: Wave) -> None:
        """Forget the states that the search cannot start from any more (keep_states="frontier")."""
        if self.options.keep_states != "frontier":
            return
        for task, _ in wave.work:
            tree = self.searches[task].tree
            stale = np.flatnonzero((tree.t > 0) & (tree.slot != NONE))
            stale = np.setdiff1d(stale, self.searches[task].frontier())
            self.states.drop(tree.slot[stale])
            tree.slot[stale] = NONE

    def _record(self, wave: Wave) -> Snapshot:
        """The wave's history record; written to the run folder, handed to the caller."""
        self.cost.add(wave.cost)
        self.cost.seconds = self.elapsed()
        for task, segments in wave.work:
            tree = self.searches[task].tree
            leaves = segments.last[tree.t[segments.last] == 0]
            if len(leaves):
                self._best = max(self._best, float(tree.reward[leaves].max()))
        record = {
            "wave": wave.number,
            "nfe": self.cost.nfe,
            "reward_calls": self.cost.reward_calls,
            "seconds": round(self.cost.seconds, 4),
            "best_reward": self._best if np.isfinite(self._best) else None,
            "ess": self._ess_now(),
            "nodes": sum(after for _, after in wave.bounds),
        }
        if self.method.mode == "async":
            record["staleness"] = self._staleness.mean()
        if workers := self.engine.summary():
            record["workers"] = workers
        self.history.append(record)
        if self.run is not None:
            self._write(self.run, wave, record)
        return Snapshot(wave.number, self._best, self.cost.copy(), record, self.result, self.budget.nfe)

    def _write(self, run: runs.Run, wave: Wave, record: dict[str, Any]) -> None:
        nodes = np.concatenate([runs.records(i, s.tree, *wave.bounds[i]) for i, s in enumerate(self.searches)])
        self._slots = max(self._slots, int(nodes["slot"].max(initial=-1)) + 1)
        meta = {"history": record, "cost": self.cost.as_dict(), "searches": wave.states, "slots": self._slots}
        run.write(runs.Block(wave.number, meta, nodes, np.concatenate(wave.hits)))

    def _ess_now(self) -> float:
        """ESS of the leaves, summed over tasks; for a growing tree as of the last time it had grown by 10 %."""
        nodes = sum(len(s.tree) for s in self.searches)
        if nodes >= GROWTH * self._ess[0]:
            self._ess = nodes, float(sum(ess(s.readout().log_weights) for s in self.searches))
        return round(self._ess[1], 3)

    def elapsed(self) -> float:
        """Seconds of this session and the ones before it."""
        return self._seconds + time.perf_counter() - self._began

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
            fetch = self._fetcher(search)
            context = self._context(config, i)
            tasks.append(TaskResult(prompt, search.tree, readout, float(search.lam), search.status, fetch, context))
        store = None if self.run is None else str(self.run.path)
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

    def _fetcher(self, search: Search) -> Callable[[NDArray[np.int64]], Any]:
        """Decodes nodes of one tree, in batches."""

        def fetch(nodes: NDArray[np.int64]) -> Any:
            size, parts = self.options.batch_size, []
            for at in range(0, max(len(nodes), 1), size):
                x = self.states.get(search.tree.slot[nodes[at : at + size]]).to(self.spec.device)
                parts.append(self.kernel.decode(x))
            return torch.cat(parts) if isinstance(parts[0], Tensor) else [item for part in parts for item in part]

        return fetch

    def _begin(self, states: StateStore, slots: int) -> None:
        """Start every task's search on what the pilot left of the budget."""
        share = self._share()
        each = self.memory // self.num_tasks
        self.searches = [self.method.start(Problem(i, self.spec, key, share, each)) for i, key in enumerate(self.keys)]
        self.states, self._slots = states, slots
        make = Engine if self.workers is None else self.workers.engine
        self.engine = make(
            self.kernel,
            self.spec,
            self.reward,
            [s.tree for s in self.searches],
            states,
            self.cost,
            prompts=self.prompts,
            encoded=self._conditioning(),
            batch_size=self.options.batch_size,
            keep_inner=self.options.keep_states != "none",
            batch_invariant=self.options.batch_invariant,
        )

    def _conditioning(self) -> dict[str, Any]:
        """The encoded prompts; encoding happens once a search."""
        if self._encoded is None:
            self._encoded = {} if self.prompts is None else encode(self.kernel, self.prompts)
        return self._encoded

    def _share(self) -> Share:
        """One task's part of what is left beside the pilot and the check of an unknown kernel."""
        beside = {"nfe": self.pilot.cost["nfe"] + self.verified, "reward_calls": self.pilot.cost["reward_calls"]}
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
        """Rewards and log p/q of n rollouts a task, and their cost."""
        session = Session(
            self.kernel,
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


@contextmanager
def _first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Has a first Ctrl-C call `stop` and raise KeyboardInterrupt at the end; a second one raises at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, came = signal.getsignal(signal.SIGINT), []

    def handler(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        stop()

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if came:
        raise KeyboardInterrupt


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
    """Fill fresh searches from recorded waves; with a lag, returns the last wave's leaves and rewards, untold."""
    nodes, hits = np.concatenate([b.nodes for b in blocks]), np.concatenate([b.hits for b in blocks])
    late = blocks[-1].nodes[: len(blocks[-1].nodes) * lag]
    work, known = [], []
    for task, search in enumerate(searches):
        runs.grow(search.tree, nodes[nodes["task"] == task])
        leaves = np.flatnonzero(search.tree.t == 0)
        # With a lag, the straight run had selected the next wave before the last one was told.
        untold = leaves[leaves >= len(search.tree) - np.count_nonzero(late["task"] == task)]
        known.append(search.tree.reward[untold].copy())
        work.append((task, Segments(untold, untold, untold)))
        search.tree.reward[untold] = np.nan
        ends = np.concatenate([leaves, hits["leaf"][hits["task"] == task]])
        search.restore(blocks[-1].meta["searches"][task], ends)
    return work, known


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
    searches = [method.start(Problem(i, spec, root_key(config["seed"], i), Share(), each)) for i in range(len(prompts))]
    if blocks:
        rebuild(searches, blocks, 0)
    over, late = config["status"] == "finished", config.get("out_of_time", False)
    tasks = []
    for i, (prompt, search) in enumerate(zip(prompts, searches, strict=True)):
        context = Context(method=method, config=config, task=i, over=over, out_of_time=late)
        readout = search.readout()
        readout.extra |= Pilot(**config["pilot"]).diagnostics()
        readout.warnings += [config["departs"]] if "departs" in config else []
        tasks.append(TaskResult(prompt, search.tree, readout, float(search.lam), search.status, _no_samples, context))
    cost = Cost(**blocks[-1].meta["cost"]) if blocks else Cost()
    return SearchResult(tasks, cost, [b.meta["history"] for b in blocks])


def _no_samples(nodes: NDArray[np.int64]) -> Any:
    raise StoreError(f"{len(nodes)} samples were asked of a run read without its kernel: use treesearch.resume")


def build_method(config: dict[str, Any]) -> Method:
    """A method from its saved name and fields.

    Raises:
        StoreError: a method or a field that this version does not know.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "name"}
    if config["name"] not in METHODS:
        raise StoreError(unknown("method", config["name"], METHODS))
    try:
        return METHODS[config["name"]](**fields)
    except TypeError as error:
        raise StoreError(f"the run's {config['name']} has settings this version does not know: {error}") from error
