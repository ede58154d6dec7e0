"""What a session is told and what it tells: options, snapshots, and the protocols of what computes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Kernel
from treesearch.budget import Cost
from treesearch.core.tree import Tree
from treesearch.engine.model import Model
from treesearch.engine.segments import Arrival, Segments
from treesearch.engine.states import StateStore
from treesearch.errors import TreeSearchError, choose
from treesearch.results.result import SearchResult
from treesearch.rewards.base import Reward

Callback = Callable[["Snapshot"], Any]
KEEP = ("all", "frontier", "none")


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


class Runner(Protocol):
    """What computes: `treesearch.engine.engine.Engine` here, or one that sends the work elsewhere."""

    ahead: int

    @property
    def lanes(self) -> int: ...
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
    def under_way(self) -> Cost: ...
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
