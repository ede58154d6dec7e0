"""search, stream and resume."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from treesearch.backends.base import Kernel, optional
from treesearch.budget import Budget
from treesearch.errors import BudgetError
from treesearch.methods.base import Method
from treesearch.registry.recipe import Recipe
from treesearch.report.outputs import write_outputs
from treesearch.report.progress import Progress, shown
from treesearch.results.result import SearchResult
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.values import as_prompts
from treesearch.runs.folder import Run
from treesearch.runs.identity import check_same
from treesearch.session.interfaces import Callback, Options, Snapshot, Workers
from treesearch.session.rebuild import build_method
from treesearch.session.session import Session

PATIENCE = 0.5  # seconds of a search that nobody asked to see the progress of, before it is shown


def stream(
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    method: Method,
    *,
    prompts: Sequence[Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    batch_size: int = 64,
    keep_states: str = "all",
    batch_invariant: bool = False,
    workers: Workers | None = None,
    store: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Snapshot]:
    """`search`, wave by wave: an iterator of `Snapshot`; `snapshot.stop()`, or to stop iterating, ends the search."""
    options = Options(batch_size, keep_states, batch_invariant)
    _check_store(store)
    with ExitStack() as running:
        running.enter_context(_running(workers))
        session = make_session(kernel, reward, method, prompts, budget or Budget(), seed, options, workers, callbacks)
        session.start(store)
        snapshots = _hold(session, callbacks, running.pop_all())
        next(snapshots)
        return snapshots


def search(
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    method: Method,
    *,
    prompts: Sequence[Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    batch_size: int = 64,
    keep_states: str = "all",
    batch_invariant: bool = False,
    workers: Workers | None = None,
    store: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    outputs: bool = False,
) -> SearchResult:
    """Search for samples of π(x_0) ∝ p(x_0) exp(λ r(x_0)), or for the best ones.

    Args:
        kernel: the model, a `treesearch.backends.base.Kernel`, or a `ts.Recipe` for one.
        reward: a `Reward`, a function of n samples (and `prompts`, if it takes them) that returns n numbers, or a
            `ts.Recipe` for one. With workers an object travels to them once; a recipe is built by each of them.
        method: BestOfN, FeynmanKac, TreeSampling, TreeSearch, DiffusionTreeSampling, BeamSearch, ...
        prompts: one task each, in shared batches: a list, an array, a column of a table, in order of iteration; None is
            one task, and the reward gets prompts=None.
        budget: of the whole search, split evenly over tasks; None for methods that know their size.
        seed: of all noise, 0..2^64-1. Same seed, same draws, whatever the batch size.
        batch_size: rows of a forward pass.
        keep_states: "all", "frontier" or "none"; dropped states are recomputed from their keys (`Options`).
        batch_invariant: pad every pass to batch_size rows.
        workers: `ts.RayWorkers(...)`, or None to compute in the calling process. The tree is the same.
        store: folder to record the run in; `resume` goes on from it.
        callbacks: called with a `Snapshot` after every wave. One that returns False, raises StopIteration or calls
            `snapshot.stop()` ends the search there, as if it were interrupted: `resume` goes on. Waves that are under
            way already (lag, workers, mode="async") arrive first. Other answers mean nothing. One that has a method
            `finish` is called with the result at the end, with None if the search raises: `treesearch.loggers`.
        progress: whether a line on stderr tells how far it is; None where that is a terminal or a notebook.
        outputs: whether the run folder gets what the command line leaves in it for people: a card, pictures and the
            best samples as files. It decodes those samples.

    Ctrl-C ends the search after the waves that are under way and returns what there is, with the status "stopped by
    request"; a second one raises KeyboardInterrupt at once. It does so in the main thread, unless the program has a
    handler of its own.

    Raises:
        ValueError: outputs without a store.
        BudgetError: no budget, or one below a unit of the method; the message names the minimum.
        RewardError, KernelError: a reward or kernel broke its contract.
        StoreError: the folder holds a run already, or cannot be written.
    """
    options = Options(batch_size, keep_states, batch_invariant)
    _check_store(store)
    if outputs and store is None:
        raise ValueError("outputs=True without a store: name a folder to write them to")
    with _running(workers):
        session = make_session(kernel, reward, method, prompts, budget or Budget(), seed, options, workers, callbacks)
        session.start(store)
        return _run(session, callbacks, progress, outputs=outputs)


def resume(
    store: str | os.PathLike[str],
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    *,
    budget: Budget | None = None,
    batch_size: int = 64,
    workers: Workers | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    outputs: bool = False,
) -> SearchResult:
    """Go on with a run, interrupted or finished; `budget` replaces the old one and counts from the run's start.

    Method, seed, prompts, T, state shape and fingerprint come from the run and must match the kernel's; batch size
    and budget are free. A kernel without a fingerprint has one stored edge computed again, and three recorded samples
    are scored again; the budget does not pay for either. Ctrl-C, `progress`
    and `outputs` as in `search`.

    Raises:
        StoreError: no run, another format, or something that must not change has; the message names the key.
    """
    _check_callbacks(callbacks)
    if not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store is {store!r}, expected the path of a run folder")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"budget is {budget!r}, expected ts.Budget(nfe=...), seconds, reward_calls or iterations")
    with _running(workers):
        session = open_session(store, kernel, reward, budget=budget, batch_size=batch_size, workers=workers)
        return _run(session, callbacks, progress, outputs=outputs)


def open_session(
    store: str | os.PathLike[str],
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    *,
    budget: Budget | None = None,
    batch_size: int = 64,
    workers: Workers | None = None,
    look: bool = False,
) -> Session:
    """A session that stands where a run folder's log ends; see `resume`. `look` is for reading only: it takes no lock
    and changes nothing."""
    run, blocks = Run.open(store, look=look)
    session = None
    try:
        config = run.config
        options = Options(batch_size, config["options"]["keep_states"], config["options"]["batch_invariant"])
        budget = budget or Budget(**config["budget"])
        method = build_method(config["method"])
        session = make_session(kernel, reward, method, config["prompts"], budget, config["seed"], options, workers)
        check_same(config, session.config())
        session.restore(run, blocks)
        if budget.nfe is not None and session.cost.nfe > budget.nfe and not look:
            raise BudgetError(
                f"the run has spent {session.cost.nfe} NFE, more than Budget(nfe={budget.nfe}): give more"
            )
        if budget.nfe is not None and session.committed > budget.nfe and not look:
            raise BudgetError(
                f"a population has begun, which takes the run to {session.committed} NFE, more than "
                f"Budget(nfe={budget.nfe}): give at least {session.committed}"
            )
        if not look:
            session.verify()
            run.go_on(status="running", budget=asdict(budget), options=asdict(options))
    except BaseException:
        run.close(run.config["status"])
        if session is not None:
            session.close()
        raise
    return session


def make_session(
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    method: Method,
    prompts: Sequence[Any] | None,
    budget: Budget,
    seed: int,
    options: Options,
    workers: Workers | None,
    callbacks: Sequence[Callback] = (),
) -> Session:
    if isinstance(method, type) or not hasattr(method, "start"):
        made = (
            f"{method.__name__}()"
            if isinstance(method, type)
            else "BestOfN(), FeynmanKac(), DiffusionTreeSampling(), ..."
        )
        raise TypeError(f"method is {method!r}, expected an object: ts.{made}")
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is {budget!r}, expected ts.Budget(nfe=...), seconds, reward_calls or iterations")
    _check_callbacks(callbacks)
    prompts = as_prompts(prompts)
    if prompts is not None and not prompts:
        raise ValueError("prompts is empty: give at least one, or None for an unconditional search")
    settings: dict[str, Any] = {"prompts": prompts, "budget": budget, "seed": _seed(seed), "options": options}
    return Session(_kernel(kernel, workers), _reward(reward, workers), method, workers=workers, **settings)


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    if not all(map(callable, callbacks if isinstance(callbacks, (list, tuple)) else [None])):
        raise TypeError(f"callbacks is {callbacks!r}, expected a list of functions of a Snapshot")


def _seed(seed: Any) -> int:
    try:
        if isinstance(seed, (bool, np.bool_)):
            raise TypeError
        return operator.index(seed)
    except TypeError as error:
        raise TypeError(f"seed is {seed!r}, expected a whole number") from error


def _check_store(store: Any) -> None:
    if store is not None and not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store is {store!r}, expected the path of a folder, or None")


def _kernel(given: Kernel | Recipe, workers: Workers | None) -> Kernel:
    if not isinstance(given, Recipe):
        return given
    return given.kernel() if workers is None else workers.kernel(given)


def _reward(given: Reward | Callable[..., Any] | Recipe, workers: Workers | None) -> Reward:
    if not isinstance(given, Recipe):
        return as_reward(given)
    return as_reward(given.reward()) if workers is None else workers.reward(given)


def _running(workers: Workers | None) -> AbstractContextManager[Any]:
    if workers is not None and not hasattr(workers, "engine"):
        raise TypeError(f"workers is {workers!r}, expected ts.RayWorkers(num_workers, ...) or None")
    return nullcontext() if workers is None else workers


def _run(session: Session, callbacks: Sequence[Callback], progress: bool | None, *, outputs: bool) -> SearchResult:
    """Drive a session to its end, with a line that tells how far it is; then write what people look at."""
    after = PATIENCE if progress is None else 0.0
    about = {"weighed": not session.method.claims.greedy, "texts": bool(optional(session.kernel, "writes", False))}
    with Progress(type(session.method).__name__, quiet=not shown(progress), error=True, after=after, **about) as line:
        for snapshot in snapshots(session, callbacks, told=line.ending):
            line(snapshot)
        result = session.result()
        if not line.quiet:
            line.settle(sum(task.diagnostics["ess"] for task in result.tasks))
    if outputs and result.store is not None:  # None where the folder is gone
        write_outputs(result, result.store)
    return result


def snapshots(
    session: Session, callbacks: Sequence[Callback], told: Callable[[], None] | None = None
) -> Iterator[Snapshot]:
    """A session's waves, each shown to the callbacks, and at the end the result to those that have a `finish`."""
    with _finishing(session, callbacks), closing(session.waves(told)) as waves:
        for snapshot in waves:
            answers = [_ends(callback, snapshot) for callback in callbacks]
            if any(answers):
                snapshot.stop()
            yield snapshot


@contextmanager
def _finishing(session: Session, callbacks: Sequence[Callback]) -> Iterator[None]:
    """Tells callbacks that wait for it the result, None where the search raised."""
    waiting = [callback.finish for callback in callbacks if hasattr(callback, "finish")]  # type: ignore[attr-defined]
    result = None
    try:
        yield
        result = session.result() if waiting else None
    except GeneratorExit:  # whoever iterates has seen enough
        result = session.result() if waiting else None
        raise
    finally:
        with ExitStack() as ending:
            for finish in waiting:
                ending.callback(finish, result)


def _ends(callback: Callback, snapshot: Snapshot) -> bool:
    """Whether a callback asks for the end of the search, by False or by StopIteration."""
    try:
        answer = callback(snapshot)
    except StopIteration:
        return True
    except GeneratorExit as error:
        raise RuntimeError(f"callback {callback!r} raised GeneratorExit") from error
    return isinstance(answer, (bool, np.bool_)) and not answer


def _hold(session: Session, callbacks: Sequence[Callback], running: AbstractContextManager[Any]) -> Iterator[Any]:
    """The snapshots, with workers that end when the iterator does; a first step that yields nothing enters it."""
    with running:
        try:
            yield None
        except GeneratorExit:  # left before its first wave
            session.close("interrupted")
            raise
        yield from snapshots(session, callbacks)
