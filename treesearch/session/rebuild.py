"""A search from its records: the searches as they stood when the last wave was recorded, and the result of a run that
is only read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.budget import Cost, Share
from treesearch.core.noise import root_key
from treesearch.engine.segments import Segments
from treesearch.errors import StoreError, unknown
from treesearch.methods import METHODS
from treesearch.methods.base import MEMORY, Method, Problem, Search, Status, loaded
from treesearch.results.certificate import Context
from treesearch.results.result import Absent, SearchResult, TaskResult
from treesearch.runs.checks import check_state
from treesearch.runs.log import Block, grow
from treesearch.session.calibrate import Pilot

UNPROMPTED = "neither the kernel nor the reward takes prompts: here they change nothing but the noise"
UNDECODED = Absent("this run was read without its kernel: use treesearch.resume")


def rebuild(
    searches: Sequence[Search], blocks: list[Block], lag: int
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
            grow(search.tree, nodes[order[bounds[task] : bounds[task + 1]]])
            leaves = np.flatnonzero(search.tree.t == 0)
            # With a lag, the straight run had selected the next wave before the last one was told.
            untold = leaves[leaves >= len(search.tree) - np.count_nonzero(late["task"] == task)]
            known.append(search.tree.reward[untold].copy())
            work.append((task, Segments(untold, untold, untold)))
            search.tree.reward[untold] = np.nan
            ends = np.concatenate([leaves, hits["leaf"][hits["task"] == task]])
            state = blocks[-1].meta["searches"][task]
            check_state(state, search.state(), len(search.tree))
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


def read_result(config: dict[str, Any], blocks: list[Block]) -> SearchResult:
    """The result of a recorded run without its kernel: everything but the decoded samples."""
    prompts, shape = config["prompts"] or [None], tuple(config["state_shape"])
    noisy = tuple(t not in config.get("deterministic", ()) for t in range(config["num_steps"] + 1))
    valued = config.get("valued", False)
    spec = Spec(config["num_steps"], shape, shape, noisy, torch.device("cpu"), torch.float32, None, valued=valued)
    spec = spec._replace(draft_times=tuple(config.get("draft_times", ())), draft_ratio=config.get("draft_ratio", 1.0))
    method = build_method(config["method"])
    each = config.get("memory", MEMORY) // len(prompts)
    with _replayed(0):
        searches = [
            method.start(Problem(i, spec, root_key(config["seed"], i), Share(), each)) for i in range(len(prompts))
        ]
    if blocks:
        rebuild(searches, blocks, 0)
    over, late = config["status"] == "finished", config.get("out_of_time", False)
    for search, name in zip(searches, config.get("ended", ()), strict=False):
        search.status = _status(name) if config["status"] != "running" else search.status
    tasks, cost = [], Cost(**blocks[-1].meta["cost"]) if blocks else Cost()
    for i, (prompt, search) in enumerate(zip(prompts, searches, strict=True)):
        context = Context(method=method, config=config, task=i, over=over, out_of_time=late, cost=cost)
        readout = search.readout()
        readout.extra |= Pilot(**config["pilot"]).diagnostics()
        readout.extra |= {"measured": config["measured"]} if "measured" in config else {}
        readout.warnings += [config["departs"]] if "departs" in config else []
        readout.warnings += [UNPROMPTED] if config.get("unprompted") else []
        readout.warnings += itertools.chain.from_iterable(config.get("remarks", [])[i : i + 1])
        tasks.append(TaskResult(prompt, search.tree, readout, float(search.lam), search.status, UNDECODED, context))
    return SearchResult(tasks, cost, [b.meta["history"] for b in blocks])


def _status(name: str) -> Status:
    if name not in Status.__members__:
        raise StoreError(f"run.json says that a search ended as {name!r}: choose from {', '.join(Status.__members__)}")
    return Status[name]


def build_method(config: dict[str, Any]) -> Method:
    """A method from its saved name and fields.

    Raises:
        StoreError: a method or a field that this version does not know, or a value that the method refuses.
    """
    name, given = config["name"], {k: v for k, v in config.items() if k != "name"}
    if (cls := (loaded() | METHODS).get(name)) is None:
        raise StoreError(unknown("method", name, METHODS) + "; one of your own must be imported first")
    known = [f.name for f in fields(cls)]
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
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"the run's {name} cannot be made: {error}") from error
