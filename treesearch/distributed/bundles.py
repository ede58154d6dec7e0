"""Bundles: whole segments of a search that travel to where a kernel lives, and what comes back.

A bundle holds what the rows need and nothing of the tree: keys (noise is made where it is used), levels, the states
that rows start from. The reply brings the states at branching levels, log p/q and rewards.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.budget import Cost
from treesearch.core.tree import NONE, ROOT
from treesearch.engine.segments import Ids, Leg


@dataclass
class Bundle:
    """Rows of one search, as contiguous arrays; row i passes `passed[i]` nodes, whose levels stand together.

    Args:
        number: of the bundle; older ones go first.
        task, key, hold, draft: of each row, (n,).
        t: level of the node that it starts from, T + 1 at the root, (n,).
        again: whether the evaluation of that node was paid for before, (n,).
        passed: nodes it passes, (n,).
        levels: t of those nodes, row by row, (passed.sum(),).
        name: number in the search's tree of the last one, for messages, (n,).
        start: row of `states` that it starts from, NONE at the root and with a held transition, (n,).
        states: (k, *state).
        kept: (bundle, row) whose transition at the station it draws from, NONE for none, (n, 2).
        legs: for rows whose state is not stored, the ways to walk before, from `start` or the prior.
        lineages: for rows that begin at a neighbour of the node they leave, the keys that make its state.
        forget: bundles whose transitions are needed no more.
    """

    number: int
    task: Ids
    key: NDArray[np.uint64]
    t: Ids
    again: NDArray[np.bool_]
    hold: NDArray[np.bool_]
    draft: Ids
    passed: Ids
    levels: Ids
    name: Ids
    start: Ids
    states: NDArray[Any] | None
    kept: Ids
    legs: dict[int, list[Leg]] = field(default_factory=dict)
    lineages: dict[int, NDArray[np.uint64]] = field(default_factory=dict)
    forget: tuple[int, ...] = ()


class Ledger:
    """The nodes of a bundle, in the columns that an engine knows: the root, where each row starts, what it passes."""

    def __init__(self, bundle: Bundle, top: int) -> None:
        n, m = len(bundle.t), len(bundle.levels)
        self.t = np.concatenate([[top], bundle.t, bundle.levels])
        self.key = np.zeros(1 + n + m, np.uint64)
        self.key[1 + n :] = np.repeat(bundle.key, bundle.passed)
        self.parent = np.full(1 + n + m, NONE)
        self.slot = np.full(1 + n + m, NONE, np.int64)
        self.log_w = np.zeros(1 + n + m)
        self.reward = np.full(1 + n + m, np.nan)
        self.reward[1 : 1 + n][bundle.again] = 0.0
        self.source = np.where(bundle.t == top, ROOT, 1 + np.arange(n))
        self.last = n + np.cumsum(bundle.passed)
        self.first = self.last - bundle.passed + 1
        self._lineages = bundle.lineages

    def __getitem__(self, task: int) -> Ledger:
        """Tasks share it: their rows are numbered through."""
        return self

    def lineage(self, node: int) -> NDArray[np.uint64]:
        """Of the node that row `node` - 1 leaves."""
        return self._lineages[node - 1]


@dataclass
class Reply:
    """What a bundle came to.

    Args:
        number: of the bundle.
        log_w: Σ log p/q since the node before, for each node passed.
        stored: whether its state is among `states`, for each node passed.
        reward: (n,); NaN in rows whose rewards are given elsewhere.
        cost: what it took.
        states: (k, *state) of stored nodes, in order; sent apart from the rest.
        samples: what the reward is to see, in order of the rows whose rewards are given elsewhere; sent apart.
        dtype: of the samples, where they are tensors.
        digests: what tells samples (and their prompts) apart, None where nothing does.
    """

    number: int
    log_w: NDArray[np.float64]
    stored: NDArray[np.bool_]
    reward: NDArray[np.float64]
    cost: Cost
    states: NDArray[Any] | None
    samples: Any = None
    dtype: torch.dtype | None = None
    digests: list[bytes | None] = field(default_factory=list)


@dataclass
class Counters:
    """What a station has done so far."""

    seconds: float = 0.0  # in passes and scoring
    passes: int = 0
    rows: int = 0  # evaluated in them, padding excluded
    room: int = 0  # passes times batch size
    full_rows: int = 0  # those of passes without room to spare
    full_seconds: float = 0.0

    def less(self, other: Counters) -> Counters:
        """What was added since."""
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Report:
    """What a worker says of itself with a reply."""

    counters: Counters  # of the search's station
    batch_size: int
    memory: int | None  # bytes at most so far, None where nothing is known
    said: list[str]  # since its last report


def size(of: Bundle | Reply) -> int:
    """Bytes of the arrays of a bundle or a reply."""
    return sum(value.nbytes for value in vars(of).values() if isinstance(value, np.ndarray))


def as_numpy(x: Tensor) -> NDArray[Any]:
    """A contiguous array of the same bytes; bfloat16, which NumPy lacks, as int16."""
    x = x.detach().cpu().contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def as_tensor(x: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The tensor that `as_numpy` was given, sharing memory; not to be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        out = torch.from_numpy(x)
    return out.view(torch.bfloat16) if dtype == torch.bfloat16 else out
