"""Attention that rows of one batch share: what an edited row takes from the row beside it, which has what is edited.

    evaluation    [pivots (m); rows (n)]       row i looks at pivot `pivot[i]`, or at none where that is -1
    network       blocks of it, ∅ first        under classifier-free guidance; or only some rows, see `taps.on_rows`

`roots.direct.Direct` puts pivots beside the rows of a search; a paper about what they share is a `Control`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Cond
from treesearch.backends.base.taps import rows_called
from treesearch.backends.interventions.heads import Network


class Places(NamedTuple):
    """Where rows and their pivots are in a network's batch, k rows that have a pivot there.

    Args:
        rows, pivots: positions in the batch (k,).
        which: of the n rows (k,).
    """

    rows: Tensor
    pivots: Tensor
    which: Tensor


@dataclass(frozen=True)
class Pairs:
    """The rows of an evaluation.

    Args:
        pivot: of each row (n,) on the host, 0..m - 1, or -1.
        pivots: m.
        t: levels of rows (n,) on the host.
        num_steps: T.
        cond: conditioning of rows.
    """

    pivot: Tensor
    pivots: int
    t: Tensor
    num_steps: int
    cond: Cond = None

    @property
    def step(self) -> Tensor:
        """Steps that each row has walked (n,), 0 for x_T."""
        return self.num_steps - self.t

    def places(self, like: Tensor, acts: Tensor, prompted: bool = False) -> Places:
        """Where they are in a network's batch, on its device.

        Args:
            like: a tensor of the batch.
            acts: which of the n rows are meant, bool (n,) on the host.
            prompted: leave rows of ∅ out.

        Raises:
            RuntimeError: a batch that is none of these rows.
        """
        n, part = self.pivots + len(self.t), rows_called()
        every = torch.arange(n, device="cpu")
        called = every if part is None else every[part.cpu()]
        copies, rest = divmod(len(like), len(called))
        if rest or copies not in (1, 2):
            raise RuntimeError(f"the network is called on {len(like)} rows for {len(called)} of an evaluation: which "
                               "is which?")  # fmt: skip
        place = torch.full_like(every, -1).scatter(0, called, torch.arange(len(called), device="cpu"))
        which = called[called >= self.pivots] - self.pivots
        which = which[acts[which] & (self.pivot[which] >= 0)]
        ours, theirs = place[self.pivots + which], place[self.pivot[which]]
        starts = [c * len(called) for c in range(copies)][copies - 1 if prompted else 0 :]
        parts = [torch.cat([each + start for start in starts]) for each in (ours, theirs)]
        return Places(*(each.to(like.device) for each in (*parts, which.repeat(len(starts)))))


class Control(ABC):
    """What rows take from their pivots: a frozen dataclass of settings."""

    needs_source = False  # whether it compares a row's prompt with its pivot's

    @abstractmethod
    def acts(self, step: Tensor, num_steps: int) -> Tensor:
        """Whether anything is shared after so many of T steps, bool against `step`."""

    @abstractmethod
    def on(self, network: Network, pairs: Pairs) -> AbstractContextManager[Any]:
        """A context in which rows take from their pivots; of pivots, and of rows without one, not a bit changes."""

    @abstractmethod
    def check(self, kernel: Any) -> None:
        """Refuse a kernel whose network this does not fit.

        Raises:
            TypeError: a kernel that names no network, or takes no prompts where they are compared.
            ValueError: a compiled network, or parts that are not there.
        """

    def rows(
        self, kernel: Any, encoded: dict[str, Any], sources: Sequence[str], prompts: Sequence[str]
    ) -> dict[str, Any]:
        """What it adds to conditioning, tensors with one row for each pair of a source and a prompt."""
        return {}


def steps_of(share: float, num_steps: int) -> int:
    """Whole steps of a share of T."""
    return math.floor(share * num_steps + 1e-9)  # .29 of 100 is 29


def put(values: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Values with other rows in places (k,)."""
    return values.index_copy(0, rows, new.to(values.dtype))
