"""One search over many workers, on Ray: models and rewards run on actors, the tree and the decisions stay here.

    driver    Session -> RayEngine: queue of rows -> `dispatch.deal` -> bundles of whole segments
    worker    one process, one device: a `bundles.Station` per search; answers with states, log p/q, rewards
    scorer    optional processes that only score; a `_Rewards` batches, caches and retries in front of them

A bundle under way is a lease. A worker that dies, hangs or leaves with its node gives its leases back, and they are
done again elsewhere: noise is keyed by path, so with the same draws. Evaluations lost so count as `repeated_nfe`.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import queue
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.util
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from treesearch import host
from treesearch.backends.base import Kernel, Shared, describe
from treesearch.budget import Cost
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.distributed.bundles import Bundle, Counters, Reply, Station, as_numpy, as_tensor
from treesearch.distributed.sharing import BUNDLE_SECONDS, deal, level, smooth, water_fill, whole_batches
from treesearch.engine.asking import decode, without_graph
from treesearch.engine.asking import encode as encode_prompts
from treesearch.engine.model import Model
from treesearch.engine.retrace import retrace
from treesearch.engine.segments import Arrival, Ids, Leg, Segments, leg, sideways
from treesearch.engine.states import LostStates, StateStore, forget
from treesearch.errors import KernelError, StoreError, TreeSearchError, choose, ended
from treesearch.interrupts import interrupts_deferred
from treesearch.registry.registry import Recipe, place
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.numeric import is_number, is_whole
from treesearch.rewards.values import anew

log = logging.getLogger("treesearch")

AHEAD = 2  # bundles under way at a worker: one that runs and one that follows without a gap
BUNDLE_BYTES = 2**28  # states that a bundle may bring home
FETCH_SECONDS = 60.0  # for an answer that Ray reported ready
PULSE_SECONDS = 60.0  # within which a process says how it is, however busy its machine
LOOPBACK = "127.0.0.1"
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
SOCKET_BYTES = 103 - 70  # of a folder below which Ray's sockets keep within a system's limit for their names
STORE_SHARE, STORE_LEAST = 0.3, 80 * 2**20  # of the memory that Ray's object store may take, and at least
STORE_ON_DISK = 10**10 - 1  # bytes from which on Ray refuses a store that shared memory does not hold


class WorkerError(TreeSearchError):
    """Workers could not do the work: what failed, how often, and with which inputs."""


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class _Setup:
    """What a process needs to know of a search. References keep large things out of it until they are needed."""

    search: int
    kernel: tuple[int, list[Any]] | None  # (number, [reference])
    reward: tuple[int, list[Any]] | None
    sample: bool  # whether rewards see samples
    prompts: Sequence[Any] | None = None
    encoded: dict[str, Any] | None = None
    batch_size: int = 64
    batch_invariant: bool = False
    guide_scores: bool = False  # a guide's rewards are the search's
    angle: float = 0.0  # of sideways edges


@dataclass(frozen=True)
class _Raised:
    """An exception as it travels: pickled, and in words for those that are no longer themselves on the other side."""

    text: str
    note: str
    pickled: bytes | None

    @staticmethod
    def of(error: BaseException) -> _Raised:
        """With the traceback that only its own process knows."""
        error = ended(error)  # SystemExit and KeyboardInterrupt are meant for the process that they are raised in
        text = "".join(traceback.format_exception_only(error)).strip()
        note = "on a worker:\n" + "".join(traceback.format_exception(error)[:-1]).rstrip()
        return _Raised(text, note, _pickled(error))

    def error(self) -> Exception:
        """What the driver raises: the exception itself where it survived, otherwise a `WorkerError` that names it."""
        error: Any = WorkerError(self.text)
        if self.pickled is not None:
            with suppress(Exception):  # of a module that is not here
                error = pickle.loads(self.pickled)
        error.add_note(self.note)
        return error


def _pickled(error: Exception) -> bytes | None:
    """Bytes that give the same exception again, None where there are none."""
    with suppress(Exception):
        data = pickle.dumps(error)
        again = pickle.loads(data)
        return data if type(again) is type(error) and str(again) == str(error) else None
    return None


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a process that answers with `_Raised` in place of raising; what Ray raises is Ray's to carry."""

    @wraps(method)
    def answer(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except RayError:
            raise
        except BaseException as error:
            return _Raised.of(error)

    return answer


class _Clock:
    """How long a thread has been at what it does, in seconds in which it could have worked.

    Waiting for a core does not count: a slow machine is no reason to call a process hung.
    """

    def __init__(self) -> None:
        self._thread, self._since, self._waited = 0, time.monotonic(), 0.0

    def beat(self) -> None:
        """This thread begins with something new."""
        thread = threading.get_native_id()
        self._thread, self._since, self._waited = thread, time.monotonic(), host.waited(thread)

    def seconds(self) -> float:
        """Since the last beat; any thread may ask."""
        return time.monotonic() - self._since - (host.waited(self._thread) - self._waited)


@dataclass(frozen=True)
class _Torch:
    """Torch's settings of the driver's process, which a kernel may depend on."""

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)

    def apply(self) -> None:
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic)


class _Process:
    """What workers and scorers share: threads, a device, kernels and rewards that are loaded once."""

    def __init__(self, threads: int, settings: _Torch) -> None:
        torch.set_num_threads(threads)
        settings.apply()
        self._clock = _Clock()
        on_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        self.device = "cuda" if on_gpu else None
        self._loaded: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def hello(self) -> dict[str, Any]:
        """Who this is."""
        name = torch.cuda.get_device_name() if self.device else "cpu"
        node = ray.get_runtime_context().get_node_id()
        return {"pid": os.getpid(), "node": node, "device": name, "gpu_ids": [str(g) for g in ray.get_gpu_ids()]}

    def pulse(self) -> float:
        """Seconds that the thread which computes has been at its present step."""
        return self._clock.seconds()

    def _load(self, what: str, found: tuple[int, list[Any]]) -> Any:
        """A kernel or reward, built from its recipe or fetched from the object store; the last two stay loaded."""
        number, reference = found
        if (what, number) not in self._loaded:
            made = ray.get(reference[0])
            if isinstance(made, Recipe):
                made = made.kernel(self.device) if what == "kernel" else as_reward(made.reward(self.device))
            elif what == "kernel":
                made = place(made, self.device)
            self._loaded[what, number] = made
            while sum(kind == what for kind, _ in self._loaded) > 2:
                self._loaded.pop(next(key for key in self._loaded if key[0] == what))
        self._loaded.move_to_end((what, number))
        return self._loaded[what, number]


class _Worker(_Process):
    """Holds a kernel and runs bundles, those of the moment in shared passes. One thread computes, the others wait."""

    def __init__(self, threads: int, settings: _Torch) -> None:
        super().__init__(threads, settings)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stations: dict[int, Station] = {}
        self._answers: dict[tuple[int, int], Future[Any]] = {}
        self._said: list[str] = []  # since the last report
        threading.Thread(target=self._serve, args=(threads,), daemon=True).start()

    def run(
        self, setup: list[Any], search: int, bundle: Bundle
    ) -> tuple[tuple[Reply | _Raised, dict[str, Any] | None], Any, Any]:
        """Run a bundle; (its reply, or what it raised, and what the worker has to report, states, samples)."""
        answer: Future[Any] = Future()
        self._inbox.put(partial(self._submit, setup, search, bundle, answer))
        try:
            reply, report = answer.result()
        except BaseException as error:  # as a value: Ray would print it, and wrap it
            return (_Raised.of(error), None), None, None
        states, samples = reply.states, reply.samples
        return (replace(reply, states=None, samples=None), report), states, samples

    @_answering
    def retrace(
        self, setup: list[Any], search: int, task: int, legs: list[Leg], x: NDArray[Any] | None
    ) -> NDArray[Any]:
        """The state at the end of a path, from a state or (x = None) from the prior."""

        def walk() -> NDArray[Any]:
            model = self._station(setup, search).model
            state = None if x is None else as_tensor(x, model.spec.dtype)
            for way in legs:
                state = retrace(model, task, way, state, Cost())
            assert state is not None
            return as_numpy(state)

        return self._do(walk)

    @_answering
    def score(self, setup: list[Any], search: int, task: Ids, x: NDArray[Any]) -> NDArray[np.float64]:
        """Rewards of samples x_0."""

        def run() -> NDArray[np.float64]:
            station = self._station(setup, search)
            return station.engine.score(task, as_tensor(x, station.model.spec.dtype))

        return self._do(run)

    @_answering
    def describe(self, found: tuple[int, list[Any]]) -> Any:
        """Specification of a kernel with its class name."""

        def look() -> Any:
            made = self._load("kernel", found)
            return describe(made), type(made).__name__

        return self._do(look)

    @_answering
    def describe_reward(self, found: tuple[int, list[Any]]) -> Any:
        """What a stand-in for a reward must know."""
        return self._do(lambda: _of_reward(self._load("reward", found)))

    @_answering
    def remarks(self, found: tuple[int, list[Any]], prompts: Sequence[Any]) -> list[list[str]]:
        """What a reward says of prompts."""
        return self._do(lambda: self._load("reward", found).remarks_on(prompts))

    @_answering
    def encode(self, found: tuple[int, list[Any]], prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning of the prompts, on the CPU."""
        return self._do(lambda: _on_cpu(encode_prompts(self._load("kernel", found), prompts)))

    @_answering
    def decode(self, found: tuple[int, list[Any]], x: NDArray[Any]) -> Any:
        """Samples of states, on the CPU."""

        def run() -> Any:
            kernel = self._load("kernel", found)
            spec = describe(kernel)
            samples = decode(kernel, as_tensor(x, spec.dtype).to(spec.device))
            return samples.cpu() if isinstance(samples, torch.Tensor) else samples

        return self._do(run)

    def close(self, search: int) -> None:
        """Forget a search."""

        def forget() -> None:
            if (station := self._stations.pop(search, None)) is not None:
                station.close()
            for key in [key for key in self._answers if key[0] == search]:
                self._answers.pop(key).set_exception(WorkerError("the search was closed"))

        self._do(forget)

    def _do(self, work: Callable[[], Any]) -> Any:
        """Have the computing thread do something, and wait for it."""
        answer: Future[Any] = Future()
        self._inbox.put(lambda: _settle(answer, work))
        return answer.result()

    def _serve(self, threads: int) -> None:
        """The computing thread; without it nobody would ever be answered, so its end is that of the process."""
        torch.set_num_threads(threads)  # a setting of each thread
        try:
            while True:
                self._turn()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _turn(self) -> None:
        """Takes what has come, then one pass of every station that has work."""
        while not self._inbox.empty() or all(s.idle for s in self._stations.values()):
            work = self._inbox.get()
            self._clock.beat()
            work()
        for search, station in list(self._stations.items()):
            if not station.idle:
                self._clock.beat()
                self._step(search, station)

    def _submit(self, setup: list[Any], search: int, bundle: Bundle, answer: Future[Any]) -> None:
        try:
            self._station(setup, search).submit(bundle)
            self._answers[search, bundle.number] = answer
        except BaseException as error:
            answer.set_exception(ended(error))

    def _step(self, search: int, station: Station) -> None:
        size = station.model.batch_size
        try:
            done = station.step()
        except BaseException as error:  # not the kernel's or the reward's: what their answers hold cannot be sent
            done = [(number, error) for of, number in self._answers if of == search]
            station.close()
        if station.model.batch_size < size:
            self._said.append(f"out of memory: batches of {station.model.batch_size} rows from now on, not {size}")
        for number, outcome in done:
            answer = self._answers.pop((search, number))
            if isinstance(outcome, Reply):
                answer.set_result((outcome, self._report(station)))
            else:
                answer.set_exception(outcome)

    def _report(self, station: Station) -> dict[str, Any]:
        said, self._said = self._said, []
        memory = torch.cuda.max_memory_allocated() if self.device else host.resident()
        counters = replace(station.counters)
        return {"counters": counters, "batch_size": station.model.batch_size, "memory": memory, "said": said}

    def _station(self, setup: list[Any], search: int) -> Station:
        if search not in self._stations:
            of: _Setup = ray.get(setup[0])
            assert of.kernel is not None
            self._stations[search] = Station(
                self._load("kernel", of.kernel),
                None if of.reward is None else self._load("reward", of.reward),
                sample=of.sample,
                prompts=of.prompts,
                encoded=of.encoded,
                batch_size=of.batch_size,
                batch_invariant=of.batch_invariant,
                guide_scores=of.guide_scores,
                angle=of.angle,
            )
        return self._stations[search]


def _settle(answer: Future[Any], work: Callable[[], Any]) -> None:
    """Give a future what some work comes to."""
    try:
        with without_graph():
            found = work()
        answer.set_result(found)
    except BaseException as error:
        answer.set_exception(ended(error))


def _on_cpu(encoded: dict[str, Any]) -> dict[str, Any]:
    """Conditioning as it travels."""

    def move(value: Any) -> Any:
        if isinstance(value, Shared):
            return Shared(move(value.value))
        return value.cpu() if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in encoded.items()}


class _Scorer(_Process):
    """Scores samples; a failing reward is asked again, with growing pauses."""

    def __init__(self, threads: int, settings: _Torch) -> None:
        super().__init__(threads, settings)
        self._setups: dict[int, _Setup] = {}

    @_answering
    def describe_reward(self, found: tuple[int, list[Any]]) -> Any:
        """What a stand-in for a reward must know."""
        return _of_reward(self._load("reward", found))

    @_answering
    def remarks(self, found: tuple[int, list[Any]], prompts: Sequence[Any]) -> list[list[str]]:
        """What a reward says of prompts."""
        return self._load("reward", found).remarks_on(prompts)

    @_answering
    @without_graph()
    def score(
        self,
        setup: list[Any],
        search: int,
        parts: list[tuple[list[Any], Any, list[int]]],
        tasks: list[int],
        tries: int,
        again: bool = False,
    ) -> tuple[NDArray[np.float64], int, int]:
        """(rewards, samples really scored, attempts) of named rows of several bundles; `again` by no cache."""
        self._clock.beat()
        if search not in self._setups:
            self._setups = {search: ray.get(setup[0])}
        of = self._setups[search]
        assert of.reward is not None
        reward: Reward = self._load("reward", of.reward)
        samples = _gather([(ray.get(reference[0]), dtype, rows) for reference, dtype, rows in parts], self.device)
        prompts = None if of.prompts is None else [of.prompts[i] for i in tasks]
        before = reward.calls() if reward.calls else 0
        for attempt in range(1, tries + 1):
            self._clock.beat()
            try:
                with anew() if again else nullcontext():
                    values = reward(samples, prompts)
            except RewardError as error:
                if error.rows or error.__cause__ is None or attempt == tries:
                    raise
                time.sleep(0.1 * 2**attempt)
                continue
            calls = reward.calls() - before if reward.calls else len(tasks)
            return values.numpy(), calls, attempt
        raise AssertionError("unreachable")


def _gather(parts: list[tuple[Any, Any, list[int]]], device: str | None) -> Any:
    """Samples of several bundles as one batch."""
    if isinstance(parts[0][0], np.ndarray) and parts[0][1] is None:
        return np.concatenate([samples[rows] for samples, _, rows in parts])
    if parts[0][1] is None:
        return [samples[i] for samples, _, rows in parts for i in rows]
    batch = torch.cat([as_tensor(samples, dtype)[torch.tensor(rows, device="cpu")] for samples, dtype, rows in parts])
    return batch if device is None else batch.to(device)


# --------------------------------------------------------------------------------------------------------------- pool


@dataclass(eq=False)
class _Actor:
    """A process of the pool, as the driver sees it."""

    number: int
    handle: Any
    ready: Any  # reference to its hello, None once it has come
    started: float
    info: dict[str, Any] = field(default_factory=dict)
    leases: list[_Lease] = field(default_factory=list)
    began: float = 0.0  # when it began the oldest of them
    alone: bool = False  # runs a bundle that failed before
    searches: set[int] = field(default_factory=set)
    pulse: Any = None  # reference to an answer of its `pulse`
    asked: float = 0.0  # when it was asked for one

    @property
    def free(self) -> bool:
        """Whether it takes another bundle."""
        return self.ready is None and not self.alone and len(self.leases) < AHEAD

    def done(self, lease: _Lease) -> None:
        """A lease has ended."""
        self.leases.remove(lease)
        self.alone, self.began = False, time.monotonic()

    def hangs(self, limit: float) -> bool:
        """Whether it has been at one step for longer than `limit` seconds, by its own clock: asked now, heard later."""
        now = time.monotonic()
        if self.pulse is None:
            if now - self.asked > min(1.0, limit / 4):
                self.pulse, self.asked = self.handle.pulse.remote(), now
            return False
        if not ray.wait([self.pulse], timeout=0)[0]:
            return now - self.asked > max(limit, PULSE_SECONDS)
        pulse, self.pulse = self.pulse, None
        try:
            seconds: Any = ray.get(pulse, timeout=FETCH_SECONDS)
            return seconds > limit
        except (RayError, GetTimeoutError):  # it died: its work will tell
            return False


@dataclass(eq=False)
class _Lease:
    """A bundle under way."""

    engine: RayEngine
    number: int
    rows: list[tuple[_Job, Ids]]
    nfe: float
    steps: float  # of its longest row
    refs: tuple[Any, Any, Any]  # reply, states, samples
    failures: int = 0


class RayWorkers:
    """Workers on Ray for `search(..., workers=)`; also a context manager, which keeps them for several searches.

    Args:
        num_workers: processes that hold a kernel each.
        gpus_per_worker: GPUs each of them asks Ray for; fractions share one.
        cpus_per_worker: CPUs each asks for, and its threads; by default 1, or 0 beside a GPU.
        reward_workers: processes that hold the reward alone; 0 scores where samples are made.
        gpus_per_reward_worker, cpus_per_reward_worker: as for workers.
        address: of a Ray cluster ("auto", "host:port"); None uses the one this process is connected to, or starts one
            on this machine.
        on_interrupt: what Ctrl-C does to the waves under way: "drop" them, or "drain": finish, record, then stop.
        max_failures: how often a bundle may fail before the search does.
        hang_seconds: time at one step (a pass, a load) beyond ten times the expected one after which a worker is
            replaced. It counts by the worker's own clock, without the time for which it waits for a core.
        start_seconds: time within which a first worker must be ready.
        reward_seconds: time a reward may take for a batch before its worker is replaced, by the same clock.
        reward_tries: attempts at a batch of rewards, with growing pauses.
        reward_window: seconds that samples wait for others to be scored with.
        reward_cache: rewards remembered by the content of samples, 0 for none; only with `reward_workers`.
        dashboard: start Ray's dashboard, on this machine's loopback address.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        num_workers: int,
        gpus_per_worker: float = 0,
        *,
        cpus_per_worker: float | None = None,
        reward_workers: int = 0,
        gpus_per_reward_worker: float = 0,
        cpus_per_reward_worker: float | None = None,
        address: str | None = None,
        on_interrupt: str = "drop",
        max_failures: int = 5,
        hang_seconds: float = 300.0,
        start_seconds: float = 300.0,
        reward_seconds: float = 120.0,
        reward_tries: int = 4,
        reward_window: float = 0.02,
        reward_cache: int = 65_536,
        dashboard: bool = False,
    ) -> None:
        whole = {"num_workers": num_workers, "max_failures": max_failures, "reward_tries": reward_tries}
        for name, value in whole.items():
            if not is_whole(value):
                raise ValueError(f"{name} is {value!r}, expected a positive whole number")
        for name, value in {"reward_workers": reward_workers, "reward_cache": reward_cache}.items():
            if not is_whole(value, 0):
                raise ValueError(f"{name} is {value!r}, expected a whole number >= 0")
        for name, value in {
            "gpus_per_worker": gpus_per_worker,
            "gpus_per_reward_worker": gpus_per_reward_worker,
        }.items():
            if not is_number(value, 0) or (value > 1 and not float(value).is_integer()):
                raise ValueError(f"{name} is {value!r}, expected a fraction of a GPU or a whole number of them")
        for name, value in {
            "hang_seconds": hang_seconds,
            "start_seconds": start_seconds,
            "reward_seconds": reward_seconds,
        }.items():
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        if not (is_number(reward_window, 0) and reward_window < math.inf):
            raise ValueError(f"reward_window is {reward_window!r}, expected seconds >= 0")
        choose("on_interrupt", on_interrupt, ("drop", "drain"))
        self.num_workers, self.reward_workers = num_workers, reward_workers
        self.gpus_per_worker, self.gpus_per_reward_worker = gpus_per_worker, gpus_per_reward_worker
        if gpus_per_reward_worker and not reward_workers:
            raise ValueError("gpus_per_reward_worker is for reward_workers, of which there are none")
        self.cpus_per_worker = _cpus("cpus_per_worker", cpus_per_worker, gpus_per_worker)
        self.cpus_per_reward_worker = _cpus("cpus_per_reward_worker", cpus_per_reward_worker, gpus_per_reward_worker)
        self.address, self.on_interrupt, self.dashboard = address, on_interrupt, dashboard
        self.max_failures, self.hang_seconds, self.start_seconds = max_failures, hang_seconds, start_seconds
        self.reward_seconds, self.reward_tries = reward_seconds, reward_tries
        self.reward_window, self.reward_cache = reward_window, reward_cache
        self._pool: _Pool | None = None
        self._entered = 0

    def __repr__(self) -> str:
        gpus = f", gpus_per_worker={self.gpus_per_worker:g}" if self.gpus_per_worker else ""
        scorers = f", reward_workers={self.reward_workers}" if self.reward_workers else ""
        return f"RayWorkers({self.num_workers}{gpus}{scorers})"

    def __enter__(self) -> RayWorkers:
        if self._entered == 0:
            self._pool = _Pool(self)
        self._entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if self._entered == 0 and self._pool is not None:
            pool, self._pool = self._pool, None
            pool.shutdown()

    @property
    def pool(self) -> _Pool:
        """The processes.

        Raises:
            WorkerError: none are running.
        """
        if self._pool is None:
            raise WorkerError("these workers are not running: use `with workers:` around what needs them")
        return self._pool

    def kernel(self, recipe: Recipe) -> Kernel:
        """A stand-in for a kernel that only workers build."""
        return _RemoteKernel(self, recipe)

    def reward(self, recipe: Recipe) -> Reward:
        """A stand-in for a reward that only workers build."""
        found = self.pool.share("reward", recipe)
        actors = self.pool.scorers if self.reward_workers else self.pool.workers
        known = self.pool.ask(actors, lambda a: a.describe_reward.remote(found))

        def remarks(prompts: Sequence[Any]) -> list[list[str]]:
            return self.pool.ask(actors, lambda a: a.remarks.remote(found, prompts))

        return Reward(_Elsewhere(recipe), remarks=remarks, **known)

    def engine(
        self, model: Model, trees: Sequence[Tree], states: StateStore, cost: Cost, *, keep_inner: bool = True
    ) -> RayEngine:
        """An engine of the interface of `treesearch.engine.engine.Engine` that computes on these workers."""
        return RayEngine(self, model, trees, states, cost, keep_inner=keep_inner)


def _cpus(name: str, asked: float | None, gpus: float) -> float:
    cpus = (0 if gpus else 1) if asked is None else asked
    if not is_number(cpus, 0):
        raise ValueError(f"{name} is {asked!r}, expected a number >= 0")
    return cpus


@dataclass(frozen=True)
class _Elsewhere:
    """The function of a reward that only workers have."""

    recipe: Recipe

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Any:
        raise WorkerError("this reward was given as a recipe and runs on workers only")


class _RemoteKernel:
    """A kernel's attributes here, its network on the workers; decodes there, or here once they are gone."""

    def __init__(self, workers: RayWorkers, recipe: Recipe) -> None:
        self._workers, self.recipe = workers, recipe
        found = workers.pool.share("kernel", recipe)
        spec, self.class_name = workers.pool.ask(workers.pool.workers, lambda a: a.describe.remote(found))
        self.num_steps, self.state_shape, self.noise_shape = spec.num_steps, spec.state_shape, spec.noise_shape
        self.stochastic, self.dtype, self.fingerprint = spec.stochastic, spec.dtype, spec.fingerprint
        self.rows_per_nfe, self.backward_per_nfe = spec.rows_per_nfe, spec.backward_per_nfe
        self.rewards_per_nfe, self.preview = spec.rewards_per_nfe, spec.previews or None
        self.departs = spec.departs
        self._here: Any = None

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        pool = self._workers.pool
        found = pool.share("kernel", self.recipe)
        return pool.ask(pool.workers, lambda a: a.encode.remote(found, list(prompts)))

    def decode(self, x0: torch.Tensor) -> Any:
        if self._workers._pool is None:
            return self._local().decode(x0)
        pool = self._workers.pool
        found = pool.share("kernel", self.recipe)
        return pool.ask(pool.workers, lambda a: a.decode.remote(found, as_numpy(x0)))

    def prior(self, noise: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self._local().prior(noise, cond)

    def transition(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Any:
        return self._local().transition(x, t, cond)

    def _local(self) -> Any:
        if self._here is None:
            self._here = self.recipe.kernel()
        return self._here


class _Pool:
    """The processes of `RayWorkers`, and the one place where their answers are awaited."""

    def __init__(self, workers: RayWorkers) -> None:
        self.of = workers
        self.owns_ray, self._folder = not ray.is_initialized(), None
        if self.owns_ray and workers.address is not None:
            _knock(workers.address)
            ray.init(address=workers.address, **QUIET)
        elif self.owns_ray:
            self._folder = _start_ray(workers)
        self._worker, self._scorer = ray.remote(_Worker), ray.remote(_Scorer)
        self._numbers = iter(range(10**9))
        self.engines: list[RayEngine] = []
        self.restarts = 0
        self._shared: OrderedDict[tuple[str, int], tuple[Any, int, Any]] = OrderedDict()
        # By kernel and batch size: each worker's evaluations a second in full batches, and whose batches were full.
        self.speeds: dict[tuple[int, int], tuple[dict[int, float], set[int]]] = {}
        self.workers = [self._start_worker() for _ in range(workers.num_workers)]
        self.scorers = [self._start_scorer() for _ in range(workers.reward_workers)]

    def shutdown(self) -> None:
        """End every process; Ray too, if it was started for them."""
        for actor in (*self.workers, *self.scorers):
            ray.kill(actor.handle)
        self.workers, self.scorers, self._shared = [], [], OrderedDict()
        if self.owns_ray:
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def share(self, what: str, made: Any) -> tuple[int, list[Any]]:
        """(number, [reference]) of a kernel or reward, put into the object store once; the last four are kept."""
        key = (what, id(made))
        if key not in self._shared:
            try:
                reference = ray.put(made)
            except Exception as error:
                raise WorkerError(
                    f"this {what} cannot travel to workers, give a ts.Recipe(factory, ...) that builds it there: "
                    f"{_pickling(error)}"
                ) from error
            self._shared[key] = made, next(self._numbers), reference
            while len(self._shared) > 4:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        _, number, reference = self._shared[key]
        return number, [reference]

    def ask(self, actors: list[_Actor], call: Any) -> Any:
        """The answer of any one of these processes to a small question; asked again if it dies."""
        last: Exception | None = None
        for _ in range(self.of.max_failures):
            actor = self._any_ready(actors)
            try:
                answer = ray.get(call(actor.handle), timeout=self.of.start_seconds)
            except RayTaskError as error:
                raise _cause(error) from None
            except (RayError, GetTimeoutError) as error:
                last = error
                self._lost(actor, error)
                continue
            if isinstance(answer, _Raised):
                raise answer.error()
            return answer
        raise WorkerError(f"{self.of.max_failures} workers died of the same question: {_brief(last)}")

    def _any_ready(self, actors: list[_Actor]) -> _Actor:
        while not (ready := [a for a in actors if a.ready is None]):
            self._greet(timeout=1.0)
            self._check_start()
        return min(ready, key=lambda a: len(a.leases))

    def _check_start(self) -> None:
        """Raises:
        WorkerError: none of the workers, or of the scorers, came up in time.
        """
        of = self.of
        for kind, actors, cpus, gpus in (
            ("worker", self.workers, of.cpus_per_worker, of.gpus_per_worker),
            ("reward worker", self.scorers, of.cpus_per_reward_worker, of.gpus_per_reward_worker),
        ):
            if not actors or any(a.ready is None for a in actors):
                continue
            if time.monotonic() - min(a.started for a in actors) > of.start_seconds:
                raise WorkerError(
                    f"no {kind} was up within {of.start_seconds:g} s: each asks for {cpus:g} CPUs and {gpus:g} GPUs, "
                    f"and the cluster has {_devices(ray.cluster_resources())}, of them free "
                    f"{_devices(ray.available_resources())}: ask for less, or give more start_seconds"
                )

    def _greet(self, timeout: float) -> None:
        """Let processes that have come up join."""
        waiting = {a.ready: a for a in (*self.workers, *self.scorers) if a.ready is not None}
        if waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
            for reference in ready:
                self._join(waiting[reference])

    def _join(self, actor: _Actor) -> None:
        try:
            actor.info = ray.get(actor.ready, timeout=FETCH_SECONDS)
            actor.ready = None
        except RayTaskError as error:
            raise WorkerError(f"a worker could not start: {_cause(error)}") from error
        except (RayError, GetTimeoutError) as error:
            log.warning("a worker died before it was ready (%s): starting another", type(error).__name__)
            self.replace(actor)

    def replace(self, actor: _Actor) -> None:
        """Start another process in the place of one that is lost."""
        self.restarts += 1
        ray.kill(actor.handle)
        if actor in self.workers:
            self.workers[self.workers.index(actor)] = self._start_worker()
        elif actor in self.scorers:
            self.scorers[self.scorers.index(actor)] = self._start_scorer()

    def _start_worker(self) -> _Actor:
        return self._start(self._worker, self.of.cpus_per_worker, self.of.gpus_per_worker)

    def _start_scorer(self) -> _Actor:
        return self._start(self._scorer, self.of.cpus_per_reward_worker, self.of.gpus_per_reward_worker)

    def _start(self, kind: Any, cpus: float, gpus: float) -> _Actor:
        threads = max(1, int(cpus))
        handle = kind.options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=AHEAD + 4
        ).remote(threads, _Torch())
        return _Actor(next(self._numbers), handle, handle.hello.remote(), time.monotonic())

    @interrupts_deferred()
    def pump(self) -> None:
        """Send what can be sent, wait for one answer or for something to be due, and take in all that is there."""
        for engine in self.engines:
            engine.dispatch()
        refs: dict[Any, Any] = {a.ready: a for a in (*self.workers, *self.scorers) if a.ready is not None}
        refs |= {lease.refs[0]: lease for a in self.workers for lease in a.leases}
        services = [engine.rewards for engine in self.engines if engine.rewards is not None]
        refs |= {call.ref: call for service in services for call in service.calls}
        due = min([1.0, *(service.due() for service in services)])
        if not refs:
            time.sleep(min(due, 0.05))
        found, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0) if refs else ([], [])
        if not found and (landing := [engine for engine in self.engines if engine.landing]):
            landing[0].land()
            return
        if not found and refs:
            found, _ = ray.wait(list(refs), num_returns=1, timeout=due)
        for reference in found:
            of = refs[reference]
            if isinstance(of, _Actor):
                self._join(of)
            elif isinstance(of, _Lease):
                self._take(of)
            else:
                of.of.take(of)
        for service in services:
            service.watch()
        self._watch()
        self._check_start()

    def _take(self, lease: _Lease) -> None:
        """An answer to a bundle: a reply, or a failure."""
        actor = next((a for a in self.workers if lease in a.leases), None)
        if actor is None:  # its worker was replaced meanwhile
            return
        try:
            reply, report = ray.get(lease.refs[0], timeout=FETCH_SECONDS)
        except RayActorError as error:
            self._lost(actor, error)
        except (RayError, GetTimeoutError) as error:  # the answer was lost with its node
            actor.done(lease)
            lease.engine.lost(lease, error, blame=False)
        else:
            actor.done(lease)
            if isinstance(reply, Reply):
                lease.engine.received(lease, actor, reply, report)
            else:
                lease.engine.failed(lease, actor, reply.error())

    def _lost(self, actor: _Actor, error: Exception) -> None:
        """A worker is gone: its leases are given again."""
        log.warning("worker %d is gone (%s): its work is done again", actor.number, type(error).__name__)
        leases, actor.leases = actor.leases, []
        self.replace(actor)
        for lease in leases:
            lease.engine.lost(lease, error, blame=True)

    def _watch(self) -> None:
        """Replace workers that hang: no answer for too long, and no step forward either."""
        now = time.monotonic()
        for actor in [a for a in self.workers if a.leases]:
            limit = self.of.hang_seconds + 10 * actor.leases[0].engine.expected(actor)
            if now - actor.began > limit and actor.hangs(limit):
                self._lost(actor, WorkerError(f"no answer for {now - actor.began:.0f} s"))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables of the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray gives a node the machine's address, and then listens on all of them; it turns down a loopback address that it
    is told of. So the function that it asks answers with one."""
    asked, ray.util.get_node_ip_address = ray.util.get_node_ip_address, lambda *args: LOOPBACK
    try:
        with _environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"):  # the same for the processes that it starts
            yield
    finally:
        ray.util.get_node_ip_address = asked


def _start_ray(workers: RayWorkers) -> str | None:
    """Start a Ray on this machine for these workers alone; returns a folder that is to be removed with it.

    Raises:
        WorkerError: it would listen to other machines.
    """
    cpus = workers.num_workers * workers.cpus_per_worker + workers.reward_workers * workers.cpus_per_reward_worker
    if cpus > host.cores():
        log.warning("%g CPUs are asked for and %d are there: workers share them", cpus, host.cores())
    folder = _socket_folder()
    settings = {"RAY_USAGE_STATS_ENABLED": "0"} | {
        "RAY_worker_niceness": "0",  # Ray's 15 leaves workers behind anything else that runs
        "RAY_enable_worker_prestart": "0",  # no processes that wait for tasks: there are only actors
    }
    settings |= {name: os.environ[name] for name in settings if name in os.environ}  # the user knows better
    if folder is not None:
        settings["RAY_TMPDIR"] = folder
    with _environment(**settings), _on_loopback():
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(cpus)),
            object_store_memory=_store_bytes(),
            include_dashboard=workers.dashboard,
            dashboard_host=LOOPBACK,
            **QUIET,
        )
    if (found := ray.nodes()[0]["NodeManagerAddress"]) != LOOPBACK:
        ray.shutdown()
        raise WorkerError(
            f"this version of Ray would listen on {found} for its private cluster: start one yourself with `ray start "
            "--head` and name its address, or call ray.init() first"
        )
    return folder


def _store_bytes() -> int | None:
    """Size of the object store by what this process may use, where Ray sees the machine; None leaves it to Ray."""
    if (allowed := host.memory()) is None:
        return None
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return int(max(STORE_LEAST, min(STORE_SHARE * allowed, max(STORE_ON_DISK, 0.95 * shared))))


def _socket_folder() -> str | None:
    """A folder for Ray's sockets, whose names may have about a hundred bytes; None where Ray's own choice will do.

    Raises:
        WorkerError: no folder with a short name can be written to.
    """
    if os.name == "nt":
        return None
    linux = sys.platform == "linux"
    chosen = os.environ.get("RAY_TMPDIR") or (linux and os.environ.get("TMPDIR")) or "/tmp"
    if len(os.fsencode(chosen)) <= SOCKET_BYTES and os.access(chosen, os.W_OK):
        return None
    for short in ("/tmp", "/var/tmp", "/dev/shm"):
        with suppress(OSError):
            return tempfile.mkdtemp(prefix="ts", dir=short)
    raise WorkerError(
        f"Ray needs a folder for its sockets, with a name of at most {SOCKET_BYTES} bytes: {chosen} is longer or "
        "cannot be written to, and neither can /tmp: set RAY_TMPDIR to one"
    )


def _devices(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs of a cluster, for messages."""
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _pickling(error: Exception) -> str:
    """What cannot be pickled, without Ray's inspection of it."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [
        line[line.lower().index("can") :] for line in lines if "can't pickle" in line.lower().replace("cannot", "can't")
    ]
    return (said or lines or [type(error).__name__])[0]


def _knock(address: str) -> None:
    """Raises:
    WorkerError: nothing listens at host:port, where Ray itself would try for minutes.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
    except OSError as error:
        raise WorkerError(
            f"no Ray at {address} ({error}): start one with `ray start --head`, or give no address to use this machine"
        ) from error


def _brief(error: Exception | None) -> str:
    """The first line of an error: Ray's go on about the system."""
    return str(error).partition("\n")[0]


def _cause(error: RayTaskError) -> Exception:
    """What was raised on the worker, with its remote traceback as a note."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
    if cause is not error:
        cause.add_note(f"on a worker:\n{error.traceback_str}" if hasattr(error, "traceback_str") else str(error))
    return cause


# ------------------------------------------------------------------------------------------------------------- engine


@dataclass(eq=False)
class _Job:
    """The rows of one wave, in order of its work."""

    wave: int
    task: Ids
    source: Ids
    first: Ids
    last: Ids
    hold: NDArray[np.bool_]
    t: Ids  # level of the source
    nfe: NDArray[np.float64]
    kept: Ids  # (worker, bundle, row) of the transition it draws from, NONE for none, (n, 3)
    queued: NDArray[np.bool_]
    left: int
    uses: set[tuple[int, int]]  # (worker, bundle) whose transitions are of no use after it
    cost: Cost = field(default_factory=Cost)


class RayEngine:
    """Runs segments on workers; the interface of `treesearch.engine.engine.Engine`.

    Args:
        workers: running `RayWorkers`.
        model: what workers are to hold; its kernel and reward are the objects, or stand-ins for recipes.
        trees, states, cost, keep_inner: as of an `Engine`.
    """

    ahead = 1

    def __init__(
        self,
        workers: RayWorkers,
        model: Model,
        trees: Sequence[Tree],
        states: StateStore,
        cost: Cost,
        *,
        keep_inner: bool = True,
    ) -> None:
        self.workers, self.pool, self.spec, self.trees, self.states = workers, workers.pool, model.spec, trees, states
        self.cost, self.batch_size, self.keep_inner, self.prompts = cost, model.batch_size, keep_inner, model.prompts
        pool, kernel, reward = self.pool, model.kernel, model.reward
        self.search = next(pool._numbers)
        shared = pool.share("kernel", kernel.recipe if isinstance(kernel, _RemoteKernel) else kernel)
        recipe = reward.fn.recipe if isinstance(reward.fn, _Elsewhere) else reward
        judge = pool.share("reward", recipe)
        away = workers.reward_workers > 0
        setup = _Setup(
            self.search,
            shared,
            None if away else judge,
            reward.input == "sample",
            None if model.prompts is None else list(model.prompts),
            _on_cpu(model.encoded),
            model.batch_size,
            model.batch_invariant,
            guide_scores=not away and model.guide_scores,
            angle=model.angle,
        )
        self._setup, self._model, self.sample = [ray.put(setup)], shared, setup.sample
        scoring = replace(setup, kernel=None, encoded=None, reward=judge)
        self.rewards = _Rewards(self, [ray.put(scoring)]) if away else None
        self._numbers = iter(range(10**12))
        self._jobs: list[_Job] = []
        self._again: deque[tuple[list[tuple[_Job, Ids]], int]] = deque()  # bundles that failed, and how often
        self._arrived: list[tuple[_Job, Ids]] = []
        self._kept: dict[int, list[tuple[Ids, Ids]]] = {}  # by task: nodes, (worker, bundle, row)
        self.landing: deque[tuple[Any, Ids, Ids]] = deque()  # references to states, and the (task, node) of each
        self._forget: dict[int, list[int]] = {}  # by worker: bundles whose transitions are needed no more
        self._speeds, self._full = pool.speeds.setdefault((shared[0], self.batch_size), ({}, set()))
        self._even: dict[int, float] = {}  # the same without noise
        self._level()
        self._seen: dict[int, Any] = {}  # by worker: its latest report
        self._began = time.monotonic()
        self._final: dict[str, Any] | None = None
        self._warned: set[str] = set()  # what kernels raised
        self._depth, self._samples = 0.0, 0
        self._bytes_in = self._bytes_out = self._stolen = self._lost_bundles = 0
        pool.engines.append(self)

    @property
    def capacity(self) -> int:
        """Rows that give every worker a bundle."""
        return sum(self._bundle_rows(a, self.spec.num_steps) for a in self.pool.workers)

    @property
    def drains(self) -> bool:
        """Whether Ctrl-C lets the waves under way arrive."""
        return self.workers.on_interrupt == "drain"

    @interrupts_deferred()
    def submit(self, wave: int, work: Sequence[tuple[int, Segments]]) -> None:
        """Queue a wave of (task, segments) and send what workers have room for."""
        if not work:
            return
        # Also of transitions that nothing draws from: their lineages died out.
        held = self._bundles_held(task for task, _ in work)
        parts = [self._rows(task, segments) for task, segments in work]
        uses = held - self._bundles_held(self._kept)
        columns: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        n = len(columns["task"])
        self._jobs.append(_Job(wave, queued=np.ones(n, np.bool_), left=n, uses=uses, **columns))
        self.dispatch()

    def finish(self, wave: int) -> Cost:
        """Wait until every row of the wave is scored; returns what it cost."""
        spent = Cost()
        for job in [j for j in self._jobs if j.wave == wave]:
            while job.left:
                self.pool.pump()
            spent.add(self._land(job))
        self._arrived = [(j, rows) for j, rows in self._arrived if j.wave != wave]
        return spent

    def collect(self) -> list[Arrival]:
        """Wait until some rows are scored; all that are, instead of `finish`."""
        while self._jobs and not self._arrived:
            self.pool.pump()
        arrived, self._arrived = self._arrived, []
        landed = {id(j): self._land(j) for j in [j for j in self._jobs if not j.left]}
        return [Arrival(j.wave, rows, landed.pop(id(j), None)) for j, rows in reversed(arrived)][::-1]

    def path(self, task: int, node: int, above: int) -> torch.Tensor:
        """The state of a node, computed again from the stored state of its ancestor `above` or (the root) the prior."""
        if self not in self.pool.engines:
            raise StoreError(f"node {node} of task {task} is to be computed again, but its workers are gone: resume")
        tree, legs = self.trees[task], self._legs(task, node, above)
        x = None if above == ROOT else as_numpy(self.states.get(tree.slot[[above]])[0])
        pool = self.pool
        state = pool.ask(pool.workers, lambda a: a.retrace.remote(self._setup, self.search, task, legs, x))
        levels = slice(int(tree.t[node]) + 1, min(int(tree.t[above]), self.spec.num_steps) + 1)
        steps = levels.stop - levels.start
        self.cost.repeated_nfe += steps
        self.cost.rows += steps * self.spec.rows_per_nfe
        self.cost.backward_nfe += sum(self.spec.backward_per_nfe[levels])
        return as_tensor(state, self.spec.dtype)

    def score(self, task: Ids, x: torch.Tensor) -> NDArray[np.float64]:
        """Rewards (n,) of samples x_0 (n, *state) that were scored and paid for before."""
        pool, states = self.pool, as_numpy(x)
        if self.rewards is None:
            return pool.ask(pool.workers, lambda a: a.score.remote(self._setup, self.search, task, states))
        samples: Any = x
        if self.sample:
            samples = pool.ask(pool.workers, lambda a: a.decode.remote(self._model, states))
        return self.rewards.score(task, samples)

    def backlog(self) -> float:
        """Seconds until a worker would begin new work."""
        waiting = [self._busy(a) for a in self.pool.workers if a.ready is None]
        return min(waiting, default=0.0) if self._even else 0.0

    def expected(self, actor: _Actor) -> float:
        """Seconds that a worker's leases should take; 0 before anything was measured."""
        return self._seconds(actor) if self._even else 0.0

    @interrupts_deferred()
    def close(self) -> None:
        """Let the workers forget this search."""
        if self not in self.pool.engines:
            return
        self._final = self.stats()
        self.pool.engines.remove(self)
        for actor in self.pool.workers:
            actor.leases = [lease for lease in actor.leases if lease.engine is not self]
            actor.alone = False
            if self.search in actor.searches:
                actor.searches.discard(self.search)
                actor.handle.close.remote(self.search)
        self._jobs, self._setup, self.rewards = [], [], None

    def _rows(self, task: int, segments: Segments) -> dict[str, NDArray[Any]]:
        """Columns of a job for the rows of one task."""
        tree, n = self.trees[task], len(segments.first)
        t = tree.t[segments.source].astype(np.int64)
        beside = sideways(tree, segments)
        # Its transition was evaluated.
        paid = (segments.source != ROOT) & ~np.isnan(tree.reward[segments.source]) & ~beside
        nfe = np.minimum(t, self.spec.num_steps) - tree.t[segments.last] + segments.hold - paid
        kept = np.full((n, 3), NONE)
        for nodes, where in self._kept.pop(task, []):
            at = np.searchsorted(nodes, segments.source).clip(max=len(nodes) - 1)
            found = (nodes[at] == segments.source) & ~beside
            kept[found] = where[at[found]]
            if (stay := np.isin(nodes, segments.keep)).any():
                self._kept.setdefault(task, []).append((nodes[stay], where[stay]))
        return {
            "task": np.full(n, task),
            "source": segments.source,
            "first": segments.first,
            "last": segments.last,
            "hold": np.full(n, segments.hold),
            "t": t,
            "nfe": nfe.astype(float),
            "kept": kept,
        }

    def _bundles_held(self, tasks: Iterable[int]) -> set[tuple[int, int]]:
        """(worker, bundle) of the transitions of tasks."""
        held = [where for task in tasks for _, where in self._kept.get(task, [])]
        return {(int(w), int(b)) for where in held for w, b in np.unique(where[:, :2], axis=0)}

    def _land(self, job: _Job) -> Cost:
        self._jobs.remove(job)
        for worker, bundle in job.uses:
            self._forget.setdefault(worker, []).append(bundle)
        return job.cost

    # ------------------------------------------------------------------------------------------------------- dispatch

    def dispatch(self) -> None:
        """Send bundles to workers that have room."""
        if self.rewards is not None:
            self.rewards.send()
        while self._again:
            rows, failures = self._again[0]
            able = [a for a in self.pool.workers if a.free and not (failures and a.leases)]
            if not able:
                break
            self._again.popleft()
            self._lend(min(able, key=self._busy), rows, failures)
        jobs = [j for j in self._jobs if j.queued.any()]
        free = [a for a in self.pool.workers if a.free]
        if not jobs or not free:
            return
        queued = [(j, np.flatnonzero(j.queued)) for j in jobs]
        cost = np.maximum(1e-3, np.concatenate([j.nfe[rows] for j, rows in queued]))
        home = np.concatenate([j.kept[rows, 0] for j, rows in queued])
        self._depth, self._samples = self._depth + len(cost), self._samples + 1
        ready = [a for a in self.pool.workers if a.ready is None and not a.alone]
        row = float(cost.mean())
        speed = np.array([self._speed(a) for a in ready])
        backlog = np.array([self._busy(a) for a in ready])
        most = np.array([self._bundle_rows(a, row) * row for a in ready])
        shares = np.minimum(water_fill(cost.sum(), backlog, speed), most)
        if cost.sum() >= self.batch_size * row:
            shares = whole_batches(shares, self.batch_size * row)
        mine = dict(zip(ready, shares, strict=True))
        given = deal(cost, home, [a.number for a in free], np.array([mine[a] for a in free]))
        start = np.cumsum([0, *(len(rows) for _, rows in queued)])
        for actor in free:
            mine = [
                (j, rows[given[a:b] == actor.number]) for (j, rows), a, b in zip(queued, start, start[1:], strict=False)
            ]
            mine = [(j, rows) for j, rows in mine if len(rows)]
            if mine:
                for job, rows in mine:
                    job.queued[rows] = False
                    self._stolen += int(((job.kept[rows, 0] != NONE) & (job.kept[rows, 0] != actor.number)).sum())
                self._lend(actor, mine, 0)

    def _bundle_rows(self, actor: _Actor, row: float) -> int:
        """Rows of `row` evaluations each that a bundle for this worker may have: whole batches, at least one, no more
        than what it does in `BUNDLE_SECONDS` and than fits."""
        batches = int(self._even.get(actor.number, 0.0) * BUNDLE_SECONDS / row / self.batch_size)
        fits = BUNDLE_BYTES // max(1, self.spec.state_bytes) // self.batch_size
        return max(1, min(batches, fits)) * self.batch_size

    def _busy(self, actor: _Actor) -> float:
        """Seconds until a worker has done what it was given."""
        return max(0.0, self._seconds(actor) - (time.monotonic() - actor.began)) if actor.leases else 0.0

    def _seconds(self, actor: _Actor) -> float:
        """What a worker takes for its leases: they share passes, and no row is faster than a pass a step."""
        nfe = sum(lease.nfe for lease in actor.leases)
        return max(nfe, max(lease.steps for lease in actor.leases) * self.batch_size) / self._speed(actor)

    def _speed(self, actor: _Actor) -> float:
        """Evaluations a second in full batches, without noise; like the others' before it was measured."""
        return self._even.get(actor.number, _mean(self._even.values(), 1.0))

    def _lend(self, actor: _Actor, rows: list[tuple[_Job, Ids]], failures: int) -> None:
        """Send rows to a worker as one bundle."""
        bundle = self._bundle(actor, rows)
        refs = actor.handle.run.options(num_returns=3).remote(self._setup, self.search, bundle)
        nfe = float(sum(j.nfe[r].sum() for j, r in rows))
        steps = float(max(j.nfe[r].max() for j, r in rows))
        actor.searches.add(self.search)
        actor.alone = failures > 0
        actor.began = actor.began if actor.leases else time.monotonic()
        actor.leases.append(_Lease(self, bundle.number, rows, nfe, steps, tuple(refs), failures))
        self._bytes_out += _size(bundle)

    def _bundle(self, actor: _Actor, parts: list[tuple[_Job, Ids]]) -> Bundle:
        """The rows as they travel."""

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(job, name)[rows] for job, rows in parts])

        task, source, first, last = (column(name) for name in ("task", "source", "first", "last"))
        n, kept = len(task), column("kept")
        here = kept[:, 0] == actor.number
        passed = last - first + 1
        key, again = np.empty(n, np.uint64), np.zeros(n, np.bool_)
        nodes, levels = _ranges(first, passed), np.empty(int(passed.sum()), np.int64)
        owner, slot = np.repeat(task, passed), np.full(n, NONE)
        legs, lineages, start = {}, {}, np.full(n, NONE)
        beside = np.zeros(n, np.bool_)
        for i in np.unique(task):
            tree, mine = self.trees[i], task == i
            key[mine] = tree.key[first[mine]]
            again[mine] = (source[mine] != ROOT) & ~np.isnan(tree.reward[source[mine]])
            levels[owner == i] = tree.t[nodes[owner == i]]
            beside[mine] = tree.t[first[mine]] == tree.t[source[mine]]
            lineages |= {int(row): tree.lineage(int(source[row])) for row in np.flatnonzero(mine & beside)}
            wanted = mine & ~here & (source != ROOT) & ~beside
            if self.landing and (tree.slot[source[wanted]] == NONE).any():
                self.settle()
            slot[wanted] = tree.slot[source[wanted]]
            for row in np.flatnonzero(wanted & (slot == NONE)):
                slot[row], legs[int(row)] = self._detour(int(i), int(source[row]))
        from_state = slot != NONE
        states = None
        if from_state.any():
            slots, start[from_state] = np.unique(slot[from_state], return_inverse=True)
            try:
                states = as_numpy(self.states.get(slots))
            except LostStates as lost:
                forget(lost, [tree.slot for tree in self.trees])
                return self._bundle(actor, parts)
        kept = np.where(here[:, None], kept[:, 1:], NONE)
        return Bundle(
            number=next(self._numbers),
            task=task,
            key=key,
            t=column("t"),
            again=again,
            hold=column("hold"),
            passed=passed,
            levels=levels,
            name=last,
            start=start,
            states=states,
            kept=kept,
            legs=legs,
            lineages=lineages,
            forget=tuple(self._forget.pop(actor.number, ())),
            keep_inner=self.keep_inner,
        )

    def _detour(self, task: int, node: int) -> tuple[int, list[Leg]]:
        """(slot of the nearest stored ancestor or NONE, legs from there) of a node whose state is not stored."""
        tree, above = self.trees[task], int(self.trees[task].parent[node])
        while above != ROOT and tree.slot[above] == NONE:
            above = int(tree.parent[above])
        return NONE if above == ROOT else int(tree.slot[above]), self._legs(task, node, above)

    def _legs(self, task: int, node: int, above: int) -> list[Leg]:
        """The edges from an ancestor down to a node."""
        tree, legs = self.trees[task], []
        while node != above:
            legs.append(leg(tree, node, self.spec.num_steps))
            node = int(tree.parent[node])
        return legs[::-1]

    # -------------------------------------------------------------------------------------------------------- answers

    def received(self, lease: _Lease, actor: _Actor, reply: Reply, report: dict[str, Any]) -> None:
        """Enter a reply into the trees."""
        self._learn(actor, report)
        self._bytes_in += _size(reply)
        task, first, last, hold = (
            np.concatenate([getattr(j, name)[rows] for j, rows in lease.rows])
            for name in ("task", "first", "last", "hold")
        )
        passed = last - first + 1
        nodes, owner = _ranges(first, passed), np.repeat(task, passed)
        if reply.stored.any():
            self.landing.append((lease.refs[1], owner[reply.stored], nodes[reply.stored]))
        for i in np.unique(task):
            tree, mine = self.trees[i], owner == i
            tree.log_w[nodes[mine]] = reply.log_w[mine]
            if (stays := (task == i) & hold).any():
                rows = np.flatnonzero(stays)
                order = rows[np.argsort(last[rows])]
                where = np.column_stack([np.full(len(order), actor.number), np.full(len(order), lease.number), order])
                self._kept.setdefault(int(i), []).append((last[order], where))
        _charge(lease.rows, reply.cost)
        if self.rewards is not None:
            self.rewards.add(lease, reply)
            return
        begin = 0
        for job, rows in lease.rows:
            self.arrive(job, rows, reply.reward[begin : begin + len(rows)])
            begin += len(rows)

    @interrupts_deferred()
    def settle(self) -> None:
        """Bring home the states of all rows that have arrived."""
        while self.landing:
            self.land()

    def land(self) -> None:
        """Bring home the states of a bundle; while there is nothing else to do, so that no worker waits for it."""
        ref, owner, nodes = self.landing.popleft()
        try:
            states: Any = ray.get(ref, timeout=FETCH_SECONDS)
        except (RayError, GetTimeoutError) as error:
            log.warning("states of %d nodes were lost (%s): computed again", len(nodes), type(error).__name__)
            self._compute_again(owner, nodes)
            return
        self._bytes_in += states.nbytes
        slots = self.states.put(as_tensor(states, self.spec.dtype))
        for i in np.unique(owner):
            self.trees[i].slot[nodes[owner == i]] = slots[owner == i]

    def _compute_again(self, owner: Ids, nodes: Ids) -> None:
        """States whose rewards are known and that were lost with a machine."""
        for task, node in sorted(zip(owner.tolist(), nodes.tolist(), strict=True)):
            tree, above = self.trees[task], int(self.trees[task].parent[node])
            while above != ROOT and tree.slot[above] == NONE:
                above = int(tree.parent[above])
            tree.slot[node] = self.states.put(self.path(task, node, above)[None])[0]

    def arrive(self, job: _Job, rows: Ids, rewards: NDArray[np.float64]) -> None:
        """Rows of a wave have their rewards."""
        for i in np.unique(job.task[rows]):
            of = job.task[rows] == i
            self.trees[i].reward[job.last[rows[of]]] = rewards[of]
        job.left -= len(rows)
        self._arrived.append((job, rows))

    def _learn(self, actor: _Actor, report: dict[str, Any]) -> None:
        """Take in what a worker reports of itself."""
        for text in report["said"]:
            log.warning("worker %d: %s", actor.number, text)
        now, seen = report["counters"], self._seen.get(actor.number)
        new = now.less(seen["counters"]) if seen else now
        worker = actor.number
        if seen is None and worker not in self._speeds:  # the first bundle pays for loading and warming up
            new = Counters()
        if new.full_rows > 0:
            old = self._speeds.get(worker) if worker in self._full else None
            self._speeds[worker] = smooth(old, new.full_rows / new.full_seconds)
            self._full.add(worker)
        elif worker not in self._full and new.room > 0:  # a pass takes much the same time however many rows are in it
            self._speeds[worker] = smooth(self._speeds.get(worker), new.room / new.seconds)
        self._level()
        self._seen[actor.number] = report | {"node": actor.info["node"], "device": actor.info["device"]}

    def _level(self) -> None:
        """Speeds of the workers there are, without their noise."""
        there = [a.number for a in self.pool.workers if a.number in self._speeds]
        speeds = level(np.array([self._speeds[number] for number in there])) if there else []
        self._even = dict(zip(there, map(float, speeds), strict=True))

    def failed(self, lease: _Lease, actor: _Actor, error: Exception) -> None:
        """A bundle raised: broken contracts end the search, anything else is tried again.

        Raises:
            WorkerError: it failed too often.
        """
        if isinstance(error, (RewardError, KernelError, TypeError)):
            raise error
        lease.failures += 1
        if lease.failures >= self.workers.max_failures:
            error.add_note(f"{lease.failures} attempts at {self._inputs(lease)}")
            raise error
        name = type(error).__name__
        if (text := f"{name}: {_brief(error)}") not in self._warned:
            log.warning("worker %d: %s; the bundle is tried again", actor.number, text)
        self._warned.add(text)
        self._give_again(lease)

    def lost(self, lease: _Lease, error: Exception, *, blame: bool) -> None:
        """A bundle's worker or its answer is gone.

        Raises:
            WorkerError: that happened to this bundle too often.
        """
        lease.failures += blame
        if lease.failures >= self.workers.max_failures:
            raise WorkerError(
                f"{lease.failures} workers were lost over the same bundle, {self._inputs(lease)}: {_brief(error)}"
            ) from error
        self._give_again(lease)

    def _give_again(self, lease: _Lease) -> None:
        """Queue a bundle once more; one that failed in two halves, so that rows that kill end up alone."""
        self._lost_bundles += 1
        for job, rows in lease.rows:
            job.kept[rows] = NONE
        lease.rows[0][0].cost.repeated_nfe += int(lease.nfe)
        n = sum(len(rows) for _, rows in lease.rows)
        for part in _halves(lease.rows, n // 2) if lease.failures and n > 1 else [lease.rows]:
            self._again.append((part, lease.failures))

    def _inputs(self, lease: _Lease) -> str:
        """What a bundle was made of, for messages."""
        job, row = lease.rows[0][0], int(lease.rows[0][1][0])
        tasks = sorted({int(i) for j, r in lease.rows for i in j.task[r]})
        n = sum(len(r) for _, r in lease.rows)
        first = int(job.task[row])
        prompts = "" if self.prompts is None else f", prompts {[self.prompts[i] for i in tasks[:4]]!r}"
        return (
            f"{n} rows of tasks {tasks[:8]}{prompts}; the first from node {job.source[row]} (t = {job.t[row]}) to node "
            f"{job.last[row]} of task {first}, noise key {self.trees[first].key[job.first[row]]}"
        )

    # ---------------------------------------------------------------------------------------------------------- stats

    def stats(self) -> dict[str, Any]:
        """What the workers did: utilisation, batch fill, queue depth, bytes moved; by worker and in all."""
        if self._final is not None:
            return self._final
        wall = max(1e-9, time.monotonic() - self._began)
        by_worker = {
            number: {
                "node": seen["node"],
                "device": seen["device"],
                "busy": round(seen["counters"].seconds / wall, 4),
                "fill": round(seen["counters"].rows / max(1, seen["counters"].room), 4),
                "nfe": seen["counters"].rows,
                "nfe_per_second": round(seen["counters"].rows / max(1e-9, seen["counters"].seconds), 1),
                "batch_size": seen["batch_size"],
                "memory_mb": None if seen["memory"] is None else round(seen["memory"] / 2**20, 1),
            }
            for number, seen in self._seen.items()
        }
        found = self.summary() | {
            "stolen_rows": self._stolen,
            "bundles_given_again": self._lost_bundles,
            "processes_replaced": self.pool.restarts,
            "by_worker": by_worker,
        }
        if self.rewards is not None:
            of = self.rewards
            found["rewards"] = {"attempts": of.attempts, "cache_hits": of.hits, "workers_lost": of.lost}
        return found

    def summary(self) -> dict[str, Any]:
        """The figures of all workers together: for the history and the progress line."""
        wall = max(1e-9, time.monotonic() - self._began)
        counters = [seen["counters"] for seen in self._seen.values()]
        return {
            "workers": sum(a.ready is None for a in self.pool.workers),
            "busy": round(sum(c.seconds for c in counters) / wall / max(1, self.workers.num_workers), 4),
            "fill": round(sum(c.rows for c in counters) / max(1, sum(c.room for c in counters)), 4),
            "queue": round(self._depth / max(1, self._samples), 1),
            "mb_in": round(self._bytes_in / 1e6, 3),
            "mb_out": round(self._bytes_out / 1e6, 3),
        }


# ------------------------------------------------------------------------------------------------------------ rewards


@dataclass(eq=False)
class _Waiting:
    """Samples of a bundle that wait for their rewards."""

    lease: _Lease
    ref: Any  # to all samples of the bundle
    dtype: Any
    digests: Sequence[bytes | None]
    job: NDArray[np.object_]
    row: Ids  # within its job
    at: list[int]  # those still to be sent
    since: float  # when they came; later than now while they pause after a failure
    failures: int = 0

    @property
    def task(self) -> Ids:
        return np.array([job.task[row] for job, row in zip(self.job, self.row, strict=True)])

    def names(self, at: list[int]) -> list[str]:
        """What errors call samples."""
        trees, found = self.lease.engine.trees, [(self.job[i], self.row[i]) for i in at]
        nodes = [(int(job.task[row]), int(job.last[row])) for job, row in found]
        return [f"node {node} (t = {trees[task].t[node]}) of task {task}" for task, node in nodes]


@dataclass(eq=False)
class _Call:
    """Samples at a scorer."""

    of: _Rewards
    scorer: _Actor
    parts: list[tuple[_Waiting, list[int]]]
    ref: Any
    sent: float


class _Rewards:
    """The reward service of a search: samples of all its tasks wait in a window, equal ones are scored once.

    Args:
        engine: whose samples they are.
        setup: reference to what scorers need to know.
    """

    def __init__(self, engine: RayEngine, setup: list[Any]) -> None:
        self.engine, self.pool, self.limits, self._setup = engine, engine.pool, engine.workers, setup
        self.calls: list[_Call] = []
        self.attempts = self.hits = self.lost = 0
        self._waiting: list[_Waiting] = []
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._pending: dict[bytes, list[tuple[_Waiting, int]]] = {}  # samples equal to one that is being scored

    def add(self, lease: _Lease, reply: Reply) -> None:
        """Take the samples of a bundle."""
        row = np.concatenate([rows for _, rows in lease.rows])
        job = np.empty(len(row), object)
        job[:] = [job for job, rows in lease.rows for _ in rows]
        digests = reply.digests if self.limits.reward_cache else [None] * len(row)
        waiting = _Waiting(lease, lease.refs[2], reply.dtype, digests, job, row, [], time.monotonic())
        self._waiting.append(waiting)
        known = []
        for i, digest in enumerate(digests):
            if digest is not None and digest in self._cache:
                self._cache.move_to_end(digest)
                known.append((i, self._cache[digest]))
            elif digest is not None and digest in self._pending:
                self._pending[digest].append((waiting, i))
            else:
                waiting.at.append(i)
                if digest is not None:
                    self._pending[digest] = []
        self.hits += len(known)
        self._enter(waiting, [i for i, _ in known], [value for _, value in known])

    def score(self, task: Ids, samples: Any) -> NDArray[np.float64]:
        """Rewards of samples apart from those that wait, by any one scorer."""
        dtype = samples.dtype if isinstance(samples, torch.Tensor) else None
        ref = ray.put(as_numpy(samples) if isinstance(samples, torch.Tensor) else samples)
        parts, rows = [([ref], dtype, list(range(len(task))))], task.tolist()
        tries = self.limits.reward_tries
        found = self.pool.ask(
            self.pool.scorers, lambda a: a.score.remote(self._setup, self.engine.search, parts, rows, tries, True)
        )
        return found[0]

    def send(self) -> None:
        """Give scorers what waits, once it fills a batch or has waited for the window."""
        self._waiting = [w for w in self._waiting if w.at]
        for scorer in self._free():
            now, parts, room = time.monotonic(), [], self.engine.batch_size
            able = [w for w in self._waiting if w.at and w.since <= now]
            rows = sum(len(w.at) for w in able)
            if not rows or (rows < room and now < min(w.since for w in able) + self.limits.reward_window):
                return
            for waiting in able:
                if room > 0:
                    parts.append((waiting, waiting.at[:room]))
                    waiting.at = waiting.at[room:]
                    room -= len(parts[-1][1])
            sent = [([w.ref], w.dtype, at) for w, at in parts]
            tasks = [int(task) for w, at in parts for task in w.task[np.array(at)]]
            ref = scorer.handle.score.remote(self._setup, self.engine.search, sent, tasks, self.limits.reward_tries)
            self.calls.append(_Call(self, scorer, parts, ref, now))

    def _free(self) -> list[_Actor]:
        """Scorers that have nothing to do."""
        busy = {call.scorer for engine in self.pool.engines if engine.rewards for call in engine.rewards.calls}
        return [s for s in self.pool.scorers if s.ready is None and s not in busy]

    def due(self) -> float:
        """Seconds until there is something to send or to give up on."""
        now, times = time.monotonic(), []
        if self._free():  # otherwise an answer comes first
            times = [w.since + self.limits.reward_window - now for w in self._waiting if w.at]
        times += [max(0.1, call.sent + self.limits.reward_seconds - now) for call in self.calls]
        return max(0.0, min(times, default=1.0))

    def watch(self) -> None:
        """Ask others where a scorer hangs."""
        limit = self.limits.reward_seconds
        for call in [c for c in self.calls if time.monotonic() > c.sent + limit]:
            if call.scorer.hangs(limit):
                self._ask_again(call, WorkerError(f"no answer within {limit:g} s"))

    def take(self, call: _Call) -> None:
        """Enter the answer of a scorer.

        Raises:
            RewardError: the reward broke its contract, or raised at every attempt.
        """
        if call not in self.calls:
            return
        try:
            answer = ray.get(call.ref, timeout=FETCH_SECONDS)
        except RayTaskError as error:
            self.calls.remove(call)
            cause = _cause(error)
            if not isinstance(cause, ObjectLostError):
                raise self._named(call, cause) from None
            for waiting, at in call.parts:
                self._make_again(waiting, at, cause)
        except (RayError, GetTimeoutError) as error:
            self._ask_again(call, error)
        else:
            self.calls.remove(call)
            if isinstance(answer, _Raised):
                raise self._named(call, answer.error())
            values, calls, attempts = answer
            self.attempts += attempts
            begin = 0
            for waiting, at in call.parts:
                found = values[begin : begin + len(at)].tolist()
                begin += len(at)
                for job in dict.fromkeys(waiting.job[at]):  # what a cache of the reward's own saved is the last one's
                    mine = min(calls, int((waiting.job[at] == job).sum()))
                    job.cost.reward_calls, calls = job.cost.reward_calls + mine, calls - mine
                self._enter(waiting, at, found)
                for i, value in zip(at, found, strict=True):
                    self._remember(waiting.digests[i], value)

    def _enter(self, waiting: _Waiting, at: list[int], values: list[float]) -> None:
        """Rewards of samples: their rows have arrived."""
        for job in dict.fromkeys(waiting.job[at]):
            mine = waiting.job[at] == job
            self.engine.arrive(job, waiting.row[at][mine], np.array(values)[mine])

    def _remember(self, digest: bytes | None, value: float) -> None:
        if digest is None:
            return
        self._cache[digest] = value
        while len(self._cache) > self.limits.reward_cache:
            self._cache.popitem(last=False)
        for waiting, i in self._pending.pop(digest, []):
            self.hits += 1
            self._enter(waiting, [i], [value])

    @staticmethod
    def _named(call: _Call, error: Exception) -> Exception:
        """A reward's error with the nodes that it is about."""
        if not isinstance(error, RewardError):
            return error
        names = [name for waiting, at in call.parts for name in waiting.names(at)]
        rows = error.rows[:4] or range(min(4, len(names)))
        named = RewardError(f"{error} [{', '.join(names[i] for i in rows)}]", error.rows)
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        return named

    def _ask_again(self, call: _Call, error: Exception) -> None:
        """A scorer died or hung: another one is asked, after a pause that grows."""
        log.warning("reward worker %d is replaced: %s", call.scorer.number, _brief(error))
        self.calls.remove(call)
        self.pool.replace(call.scorer)
        self.lost += 1
        for waiting, at in call.parts:
            waiting.failures += 1
            if waiting.failures >= self.limits.reward_tries:
                raise WorkerError(
                    f"{waiting.failures} reward workers were lost over the same samples, "
                    f"{', '.join(waiting.names(at)[:4])}: {_brief(error)}"
                ) from error
            waiting.at = at + waiting.at
            waiting.since = time.monotonic() + 0.1 * 2**waiting.failures
            self._wait(waiting)

    def _make_again(self, waiting: _Waiting, at: list[int], error: Exception) -> None:
        """Samples were lost before they were scored: their rows are run again."""
        lost, waiting.at = sorted({*at, *waiting.at}), []
        for digest in [waiting.digests[i] for i in lost]:
            for other, i in self._pending.pop(digest, []) if digest is not None else []:
                other.at.append(i)
                self._wait(other)
        rows: list[tuple[_Job, Ids]] = [
            (job, waiting.row[lost][waiting.job[lost] == job]) for job in dict.fromkeys(waiting.job[lost])
        ]
        for job, mine in rows:
            job.cost.nfe -= int(job.nfe[mine].sum())  # it counts when it is run again
        nfe = float(sum(job.nfe[mine].sum() for job, mine in rows))
        self.engine.lost(replace(waiting.lease, rows=rows, nfe=nfe), error, blame=False)

    def _wait(self, waiting: _Waiting) -> None:
        if waiting not in self._waiting:
            self._waiting.append(waiting)


def _of_reward(reward: Reward) -> dict[str, Any]:
    """What is known of it without its function."""
    return {name: getattr(reward, name) for name in ("name", "input", "settings", "prompted", "code")}


def _mean(values: Iterable[float], otherwise: float) -> float:
    """Mean of numbers, of which there may be none."""
    found = list(values)
    return sum(found) / len(found) if found else otherwise


def _halves(parts: list[tuple[_Job, Ids]], n: int) -> list[list[tuple[_Job, Ids]]]:
    """The first n rows of a bundle, and the others."""
    first, second = [], []
    for job, rows in parts:
        first += [(job, rows[:n])] if n > 0 else []
        second += [(job, rows[n:])] if n < len(rows) else []
        n = max(0, n - len(rows))
    return [first, second]


def _charge(parts: list[tuple[_Job, Ids]], cost: Cost) -> None:
    """Enter a bundle's cost into the waves of its rows: evaluations exactly, the rest in proportion."""
    nfe = np.array([job.nfe[rows].sum() for job, rows in parts])
    count = np.array([len(rows) for _, rows in parts])
    for name in ("nfe", "rows", "backward_nfe", "repeated_nfe", "reward_calls", "decodes"):
        weight = count if name in ("reward_calls", "decodes") or not nfe.any() else nfe
        total = getattr(cost, name)
        upto = np.floor(total * np.cumsum(weight) / weight.sum() + 1e-9).astype(int)
        for (job, _), share in zip(parts, np.diff(upto, prepend=0), strict=True):
            setattr(job.cost, name, getattr(job.cost, name) + int(share))


def _ranges(first: Ids, counts: Ids) -> Ids:
    """first[0], first[0] + 1, ... counts[0] of them, then from first[1] on."""
    begin = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return begin + np.arange(len(begin))


def _size(of: Any) -> int:
    """Bytes of the arrays of a bundle or a reply."""
    return sum(value.nbytes for value in vars(of).values() if isinstance(value, np.ndarray))
