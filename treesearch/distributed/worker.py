"""A worker: one process, one device, a `Station` for each search that it works for."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from treesearch import host
from treesearch.backends.base import Measured, describe, optional
from treesearch.budget import Cost
from treesearch.distributed.bundles import Bundle, Reply, Report, as_numpy, as_tensor
from treesearch.distributed.process import Process, Setup, TorchSettings, of_reward, on_cpu
from treesearch.distributed.raised import Raised, answering
from treesearch.distributed.station import Station
from treesearch.engine.asking import decode, without_graph
from treesearch.engine.asking import encode as encode_prompts
from treesearch.engine.retrace import retrace
from treesearch.engine.segments import Ids, Leg
from treesearch.errors import WorkerError, ended


class Worker(Process):
    """Holds a kernel and runs bundles, those of the moment in shared passes. One thread computes, the others wait."""

    def __init__(self, threads: int, settings: TorchSettings) -> None:
        super().__init__(threads, settings)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stations: dict[int, Station] = {}
        self._answers: dict[tuple[int, int], Future[Any]] = {}
        self._said: list[str] = []  # since the last report
        threading.Thread(target=self._serve, args=(threads,), daemon=True).start()

    def run(self, setup: list[Any], search: int, bundle: Bundle) -> tuple[tuple[Reply, Report] | Raised, Any, Any]:
        """Run a bundle; ((its reply, what the worker has to report) or what it raised, states, samples)."""
        answer: Future[Any] = Future()
        self._inbox.put(partial(self._submit, setup, search, bundle, answer))
        try:
            reply, report = answer.result()
        except BaseException as error:  # as a value: Ray would print it, and wrap it
            return Raised.of(error), None, None
        states, samples = reply.states, reply.samples
        return (replace(reply, states=None, samples=None), report), states, samples

    @answering
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

    @answering
    def score(self, setup: list[Any], search: int, task: Ids, x: NDArray[Any]) -> NDArray[np.float64]:
        """Rewards of samples x_0."""

        def run() -> NDArray[np.float64]:
            station = self._station(setup, search)
            return station.engine.score(task, as_tensor(x, station.model.spec.dtype))

        return self._do(run)

    @answering
    def describe(self, found: tuple[int, list[Any]]) -> Any:
        """Specification of a kernel with its class name, and what is known of the reward that its steps know of."""

        def look() -> Any:
            made = self._load("kernel", found)
            scores = optional(made, "scores")
            return describe(made), type(made).__name__, None if scores is None else of_reward(scores)

        return self._do(look)

    @answering
    def describe_reward(self, found: tuple[int, list[Any]]) -> Any:
        """What a stand-in for a reward must know."""
        return self._do(lambda: of_reward(self._load("reward", found)))

    @answering
    def remarks(self, found: tuple[int, list[Any]], prompts: Sequence[Any]) -> list[list[str]]:
        """What a reward says of prompts."""
        return self._do(lambda: self._load("reward", found).remarks_on(prompts))

    @answering
    def encode(self, found: tuple[int, list[Any]], prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning of the prompts, on the CPU."""
        return self._do(lambda: on_cpu(encode_prompts(self._load("kernel", found), prompts)))

    @answering
    def measured(self, found: tuple[int, list[Any]]) -> Measured | None:
        """What a kernel finds out about itself."""
        return self._do(lambda: optional(self._load("kernel", found), "measured"))

    @answering
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

    def _report(self, station: Station) -> Report:
        said, self._said = self._said, []
        memory = torch.cuda.max_memory_allocated() if self.device else host.resident()
        return Report(replace(station.counters), station.model.batch_size, memory, said)

    def _station(self, setup: list[Any], search: int) -> Station:
        if search not in self._stations:
            of: Setup = ray.get(setup[0])
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
                keep_inner=of.keep_inner,
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
