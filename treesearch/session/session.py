"""One search from its beginning to its result: budget, λ, run folder and engine, then the waves of its loop."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from treesearch.backends.base import Kernel, Measured, describe, fingerprint, optional
from treesearch.budget import Budget, Cost
from treesearch.core.noise import root_key
from treesearch.core.weights import F64
from treesearch.engine.asking import encode, without_graph
from treesearch.engine.engine import Engine
from treesearch.engine.model import Model, knows
from treesearch.engine.states import MemoryStates, StateStore
from treesearch.interrupts import first_interrupt, interrupts_are_ours, interrupts_unwrapped
from treesearch.methods.base import AUTO, Method, Problem, Search, Status
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.population import planned_memory
from treesearch.results.certificate import Context
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward, refuse_unseen
from treesearch.runs.folder import Run, check_vacant
from treesearch.runs.log import Block
from treesearch.session.calibrate import Pilot, choose_lambda
from treesearch.session.clock import Clock
from treesearch.session.fetch import Fetch
from treesearch.session.frontier import Frontier
from treesearch.session.interfaces import Options, Runner, Snapshot, Workers
from treesearch.session.limits import check_budget, share
from treesearch.session.loop import Loop
from treesearch.session.rebuild import UNPROMPTED, rebuild
from treesearch.session.recorder import Recorder
from treesearch.session.verify import Verification
from treesearch.session.wave import Wave
from treesearch.version import __version__

PREVIEWED = "rewards above t = 0 are of approximate previews, those of the samples are not"


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
        self.states: StateStore
        self.spec = describe(kernel)
        knows(kernel, self.spec, reward)  # refuses values of another reward before anything is begun
        refuse_unseen(reward, self.spec.sample_range)
        self.keys = [root_key(seed, task, stream_id) for task in range(self.num_tasks)]
        self.pilot, self.memory = Pilot(), planned_memory()
        self.recorder = Recorder()
        self.searches: list[Search] = []
        self.loop: Loop
        self.doubts: list[str] = []  # what resuming could not make sure of
        self._encoded = encoded
        self._found_out: Measured | None = None
        self._told_of: list[list[str]] | None = None
        self._stopped = False

    @property
    def num_tasks(self) -> int:
        return 1 if self.prompts is None else len(self.prompts)

    @property
    def committed(self) -> int:
        """NFE without which what has begun is not finished, an even share for every task."""
        most = max((search.committed for search in self.searches), default=0)
        return Cost(**self.pilot.cost).nfe + most * len(self.searches) if most else 0

    @property
    def cost(self) -> Cost:
        """Spent so far on what is recorded."""
        return self.recorder.cost

    @property
    def lost(self) -> str | None:
        """What became of a run folder that is gone."""
        return self.recorder.lost

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
        self._measured()
        self._remarks()
        if self.method.lam == AUTO:
            if store is not None:
                check_vacant(store)  # refuses before the pilot is paid for
            self._pilot()
        if store is not None:
            content = {} if self.spec.fingerprint is not None else {"kernel_code": fingerprint.of(self.kernel)}
            self.recorder.run = Run.create(store, self.config() | content, beside)
        try:
            self._begin(self._states(0), 0)
        except BaseException:
            self.close("interrupted")
            raise

    def check_budget(self) -> None:
        """Raises:
        BudgetError: no budget, or one below a unit of the method for each task.
        """
        check_budget(self.method, self.spec, self.budget, self.num_tasks)

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
            **({} if self.spec.base_law is None else {"base_law": self.spec.base_law}),
            **({"valued": True} if self.spec.valued else {}),
            **(self._drafting() if getattr(self.method, "draft", None) else {}),
            **({"measured": {"nfe": self._measured().nfe}} if self._measured().nfe else {}),
            "reward": self.reward.name,
            "reward_settings": self.reward.settings,
            "reward_code": self.reward.code,
            "kernel": optional(self.kernel, "class_name", type(self.kernel).__name__),
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
    def restore(self, run: Run, blocks: list[Block]) -> None:
        """Take up a run where its log ends; recorded rewards decide, nothing is computed again."""
        self.pilot = Pilot(**run.config["pilot"])
        self.memory = run.config.get("memory", self.memory)
        self.recorder.take_up(run, blocks)
        self._remarks()
        used = blocks[-1].meta["slots"] if blocks else 0
        self._begin(self._states(used), used)
        self.loop.next = len(blocks)
        if not blocks:
            return
        again = Wave(len(blocks) - 1, [], [], [], [], known=[])
        again.work, again.known = rebuild(self.searches, blocks, self.method.lag)
        if self.method.lag and len(blocks[-1].nodes):
            self.loop.under_way.append(again)

    @without_graph()
    @interrupts_unwrapped()
    def verify(self) -> None:
        """Compute a little of what the run has recorded again, see `treesearch.session.verify`.

        Raises:
            StoreError: the kernel or the reward does not reproduce it.
        """
        assert self.recorder.run is not None
        trees = [search.tree for search in self.searches]
        again = Verification(self.recorder.run, self.kernel, self.spec, self.reward, self.engine, self.states, trees)
        self.doubts += again()

    def waves(self, told: Callable[[], None] | None = None) -> Generator[Snapshot]:
        """Run until the budget is spent, one snapshot a wave.

        Where the engine drains, a first Ctrl-C stops the asking and takes effect once what is under way has arrived.

        Args:
            told: given, a first Ctrl-C ends the search after the waves under way instead of raising KeyboardInterrupt,
                and calls this; a second one raises. Only where nobody else has said what Ctrl-C does.
        """
        status = "interrupted"
        try:
            with self._interrupts(told):
                records = iter(self.loop)
                while (record := _next(records)) is not None:
                    if not self._stopped:
                        yield self._snapshot(record)
            status = "stopped" if any(s.status == Status.STOPPED for s in self.searches) else "finished"
        finally:
            self.close(status)

    def _interrupts(self, told: Callable[[], None] | None) -> AbstractContextManager[None]:
        """What Ctrl-C does to the waves."""
        if told is None or not interrupts_are_ours():
            return first_interrupt(self.loop.stop) if self.engine.drains else nullcontext()

        def end() -> None:
            self.loop.stop()
            told()

        return first_interrupt(end, raises=False)

    def _snapshot(self, record: dict[str, Any]) -> Snapshot:
        best, cost = self.recorder.best, self.cost.copy()
        return Snapshot(record["wave"], best, cost, record, self.result, self.budget.nfe, self.stop)

    def stop(self) -> None:
        """End the search after the wave that is yielded; what is under way already arrives and is recorded."""
        self._stopped = True
        self.loop.stop()

    def close(self, status: str | None = None) -> None:
        """Let go of the run folder and the workers; without a status the run keeps its own."""
        ended = [search.status.name for search in self.searches]
        self.recorder.close(status, ended, out_of_time=bool(self.searches) and self.loop.out_of_time)
        if self.searches:
            self.engine.close()

    @without_graph()
    @interrupts_unwrapped()
    def result(self) -> SearchResult:
        """Everything so far."""
        tasks, config, trees = [], self.config(), [search.tree for search in self.searches]
        for i, search in enumerate(self.searches):
            prompt = None if self.prompts is None else self.prompts[i]
            readout = search.readout()
            readout.extra |= self.pilot.diagnostics()
            if "measured" in config:
                readout.extra["measured"] = config["measured"]
            if self.method.mode == "async":
                readout.extra["staleness"] = {"mean": self.loop.staleness.mean(), "max": self.loop.staleness.most}
            if workers := self.engine.stats():
                readout.extra["workers"] = workers
            if self.spec.previews and not self.spec.valued and (~np.isnan(search.tree.reward[search.tree.t > 0])).any():
                readout.warnings.append(PREVIEWED)
            if self.spec.departs is not None:
                readout.warnings.append(self.spec.departs)
            readout.warnings += [UNPROMPTED] * self.unprompted + self._remarks()[i] + self.doubts
            if self.lost is not None:
                readout.warnings.append(self.lost)
            fetch = Fetch(i, trees, self.kernel, self.spec, self.engine, self.states, self.options.batch_size)
            context = self._context(config, i)
            tasks.append(TaskResult(prompt, search.tree, readout, float(search.lam), search.status, fetch, context))
        return SearchResult(tasks, self.cost.copy(), list(self.recorder.history), self.recorder.path)

    def _context(self, config: dict[str, Any], task: int) -> Context:
        """What a task's certificate needs beside its read-out."""
        saved = self.recorder.saved
        return Context(
            cost=self.cost.copy(),
            method=self.method,
            config=config,
            task=task,
            over=self.searches[task].status not in (Status.RUNNING, Status.STOPPED)
            or saved.get("status") == "finished",
            out_of_time=self.loop.out_of_time or (saved.get("status") != "running" and saved.get("out_of_time", False)),
        )

    def _begin(self, states: StateStore, slots: int) -> None:
        """Start every task's search on what the pilot left of the budget."""
        left = share(self.budget, self.pilot, self.num_tasks)
        each = self.memory // self.num_tasks
        searches = [self.method.start(Problem(i, self.spec, key, left, each)) for i, key in enumerate(self.keys)]
        self.states, self.recorder.slots = states, slots
        trees = [s.tree for s in searches]
        model = Model(
            self.kernel,
            self.spec,
            self.reward,
            prompts=self.prompts,
            encoded=self._conditioning() | self._measured().cond,
            batch_size=self.options.batch_size,
            batch_invariant=self.options.batch_invariant,
            angle=trees[0].angle,
        )
        make = Engine if self.workers is None else self.workers.engine
        self.engine = make(model, trees, states, self.cost, keep_inner=self.options.keep_states != "none")
        self.loop = Loop(
            searches,
            self.engine,
            self.method,
            self.recorder,
            Frontier(searches, states) if self.options.keep_states == "frontier" else None,
            clock=self._clock(),
            reward=self.reward.name,
        )
        self.searches = searches  # last: what is begun has an engine to close

    def _clock(self) -> Clock | None:
        """What limits the waves by their time, where the budget has seconds."""
        if self.budget.seconds is None:
            return None
        return Clock(self.budget.seconds, self.recorder, self.engine, self.method.unit(self.spec))

    def _conditioning(self) -> dict[str, Any]:
        """The encoded prompts; encoding happens once a search."""
        if self._encoded is None:
            self._encoded = {} if self.prompts is None else encode(self.kernel, self.prompts)
        return self._encoded

    def _measured(self) -> Measured:
        """What the kernel found out about itself; it is asked once a search."""
        if self._found_out is None:
            found: Measured | None = optional(self.kernel, "measured")
            self._found_out = Measured({}, 0) if found is None else found
        return self._found_out

    def _drafting(self) -> dict[str, Any]:
        """What decides the prices of drafts."""
        return {"draft_ratio": self.spec.draft_ratio, "draft_times": list(self.spec.draft_times)}

    def _remarks(self) -> list[list[str]]:
        """What the reward says of each task's prompt; it is asked once a search."""
        if self._told_of is None:
            self._told_of = [[]] if self.prompts is None else self.reward.remarks_on(self.prompts)
        return self._told_of

    @property
    def unprompted(self) -> bool:
        """Whether there are prompts that nothing takes."""
        return self.prompts is not None and not self._conditioning() and not self.reward.prompted

    def _states(self, used: int) -> StateStore:
        if (run := self.recorder.run) is not None:
            return run.open_states(self.spec.state_shape, self.spec.dtype, used)
        return MemoryStates(self.spec.state_shape, self.spec.dtype)

    def _pilot(self) -> None:
        """Draw a pilot with noise of its own, choose λ from it, and freeze both."""
        self.pilot, lam = choose_lambda(self._draw_pilot, self.budget, self.num_tasks, self.spec.num_steps)
        self.method = replace(self.method, lam=lam)
        self.recorder.cost = Cost(**self.pilot.cost)

    def _draw_pilot(self, n: int) -> tuple[list[F64], list[F64], Cost]:
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


@without_graph()
@interrupts_unwrapped()
def _next(records: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next record, None at the end: modes that hold while it is made end with it."""
    return next(records, None)
