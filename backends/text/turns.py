"""Records that are written a field at a time, and which field comes next as what a tree branches by.

    f = the field that is begun, else f ~ uniform over those that are not written yet
    the first k masks of f are revealed, then the others; once no field is open, those behind the record
    log p(x_s | x_t) = log Σ_f 1/F Π_i p(x_i | x_t)  over the f whose k positions are those that were revealed

    k = ⌈masks / steps left⌉: with as many steps for each field, fields are written one after another

What is written first is what the other fields are told. Siblings of a tree differ in the field and in what stands in
it, so that a search over them is one over the order of fields.

Source of the scaffold: Unveiling the Potential of Diffusion Large Language Model in Controllable Generation (Xiong et
al., 2025); the order is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Tokens, Wrapper, uniform
from treesearch.backends.base.tokens import NOWHERE
from treesearch.backends.text.kernel import FREE, KNOWN


@runtime_checkable
class Record(Protocol):
    """What is asked of a `Scaffold`: its fields, and conditioning with the structure in it."""

    @property
    def fields(self) -> Sequence[Any]: ...

    def known(self, cond: Cond, n: int) -> dict[str, Any]: ...


@final
@dataclass(frozen=True, eq=False)
class FieldOrder(Wrapper):
    """A scaffold whose fields are written in turn, whichever drawn first.

    Args:
        kernel: a `Scaffold`; the order of reveals of its own kernel is not used.

    Raises:
        TypeError: another kernel.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Record):
            raise TypeError(f"field_order is for a scaffold, got {type(self.kernel).__name__}: use scaffold(...) first")

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One normal a token, and one for the field."""
        return (self.kernel.state_shape[0] + 1,)

    @property
    def departs(self) -> str:
        """Why its chain is another law than the model's."""
        return "fields are written in turn, in an order drawn at random: a law of its own, not masked diffusion's"

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return self.kernel.prior(noise[:, :-1], cond)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Turn:
        law = self.kernel.transition(x, t, cond)
        free = self.kernel.known(cond, len(x))[KNOWN].to(x.device) == FREE
        return Turn(law, firsts(law.at != NOWHERE, numbered(free), t, len(self.kernel.fields)))


def numbered(free: Tensor) -> Tensor:
    """Number of the field that positions are in (n, L), by runs of those that are in some; -1 where in none."""
    begins = free & ~torch.nn.functional.pad(free, (1, 0))[:, :-1]
    return torch.where(free, begins.long().cumsum(1) - 1, -1)


def firsts(masked: Tensor, field: Tensor, t: Tensor, count: int) -> Tensor:
    """Positions that are revealed where a field comes first, (n, F, L) bool, none for fields that may not.

    What is in no field, once none is open, is revealed as if it were the first's.

    Args:
        masked: positions that are still masked (n, L) bool.
        field: which field they are in (n, L); -1, or F and above, in none.
        t: steps left (n,).
        count: F.
    """
    k = -(-masked.sum(1) // t)
    found, begun = [], []
    for f in range(count):
        own, others = masked & (field == f), masked & (field != f)
        size = own.sum(1, keepdim=True)
        rank = torch.where(own, own.cumsum(1), size + others.cumsum(1))
        found.append(masked & (rank <= k[:, None]) & (size > 0))
        begun.append((size > 0).any(1) & (~masked & (field == f)).any(1))
    within = (field >= 0) & (field < count)
    found[0] |= masked & (masked.cumsum(1) <= k[:, None]) & ~(masked & within).any(1, keepdim=True)
    started = torch.stack(begun, 1)
    return torch.stack(found, 1) & (started | ~started.any(1, keepdim=True))[..., None]


@final
@dataclass(frozen=True)
class Turn:
    """The law of a step that writes on at one of several fields.

    Args:
        law: of tokens, whose own reveals are not used.
        firsts: positions that are revealed where a field comes first (n, F, L), none of fields that may not.
    """

    law: Tokens
    firsts: Tensor

    @property
    def endpoint(self) -> Tensor:
        return self.law.endpoint

    @property
    def open(self) -> Tensor:
        """Fields that may come first, (n, F) bool."""
        return self.firsts.any(2)

    def sample(self, noise: Tensor) -> Tensor:
        open_ = self.open
        picked = (uniform(noise[:, -1]).to(open_.device) * open_.sum(1)).long().clamp(max=open_.sum(1) - 1)
        ranked = open_.long().cumsum(1) - 1
        chosen = (open_ & (ranked == picked[:, None])).long().argmax(1)  # the first of none: nothing is masked
        return self._given(chosen).sample(noise[:, :-1])

    def endpoints(self, noise: Tensor) -> Tensor:
        """Draws of x_0 (n, L) from the network's law of each position that may change."""
        return self.law.endpoints(noise[:, :-1])

    def log_prob(self, x: Tensor) -> Tensor:
        open_, n = self.open, len(x)
        each = []
        for f in range(open_.shape[1]):
            log_p = self._given(torch.full((n,), f, device=open_.device)).log_prob(x)
            each.append(torch.where(open_[:, f], log_p, -math.inf))
        written = ~open_.any(1)
        found = torch.stack(each, 1).logsumexp(1) - open_.sum(1).clamp_min(1).double().log()
        return torch.where(written, self._given(torch.zeros_like(written, dtype=torch.int64)).log_prob(x), found)

    def log_weight(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def take(self, rows: Tensor) -> Turn:
        return Turn(self.law.take(rows), self.firsts[rows.to(self.firsts.device)])

    def _given(self, chosen: Tensor) -> Tokens:
        """The law of tokens where a field (n,) comes first."""
        now = self.firsts[torch.arange(len(chosen), device=chosen.device), chosen]
        return replace(self.law, at=torch.where(now, self.law.at, NOWHERE), jump=torch.ones_like(self.law.jump))
