"""Rewards of rewards: functions of the values of one or two that read the same samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from treesearch.rewards.values import RewardError

Remarks = Callable[[Sequence[Any]], list[list[str]]]
"""Called on prompts, returns for each the sentences that its task's warnings take up."""


class Term(Protocol):
    """A reward, as far as its place in an expression goes."""

    @property
    def name(self) -> str: ...
    @property
    def calls(self) -> Callable[[], int] | None: ...
    @property
    def remarks(self) -> Remarks | None: ...
    def attached(self, samples: Any, prompts: Sequence[Any] | None = None) -> Tensor: ...


class Joined:
    """A function of the values of one reward or of two, which read the same samples."""

    def __init__(
        self, name: str, parts: tuple[Term, ...], apply: Callable[..., Tensor], *, may_forbid: bool = False
    ) -> None:
        self.name, self.parts, self.apply, self.may_forbid = name, parts, apply, may_forbid
        self.scored = 0

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        before = [part.calls() if part.calls else 0 for part in self.parts]
        terms = [part.attached(samples, prompts) for part in self.parts]
        self.scored += max(part.calls() - b if part.calls else 0 for part, b in zip(self.parts, before, strict=True))
        values = self.apply(*terms)
        self._check(values, terms)
        return values

    def calls(self) -> int:
        """Samples really scored so far, by the part that scored more."""
        return self.scored

    def _check(self, values: Tensor, terms: list[Tensor]) -> None:
        """Refuse what finite terms cannot mean.

        Raises:
            RewardError: NaN or +inf, or -inf although no term forbids the sample; the message names the terms.
        """
        forbidden = torch.stack([term.isinf() for term in terms]).any(0)
        bad = values.isnan() | (values == math.inf) | (values.isinf() & ~forbidden & (not self.may_forbid))
        if not bad.any():
            return
        rows = bad.nonzero().flatten().tolist()
        of = " and ".join(f"{p.name} = {float(v[rows[0]]):g}" for p, v in zip(self.parts, terms, strict=True))
        raise RewardError(
            f"{self.name} is {float(values[rows[0]])} where {of} ({len(rows)} of {len(values)} rows, first row "
            f"{rows[0]}): scale or clip this term before it is combined",
            rows,
        )


def joint_remarks(parts: Sequence[Term]) -> Remarks | None:
    """What all of them say of prompts, the same sentence once."""
    asked = [part.remarks for part in parts if part.remarks is not None]

    def each(prompts: Sequence[Any]) -> list[list[str]]:
        said = zip(*(ask(prompts) for ask in asked), strict=True)
        return [list(dict.fromkeys(itertools.chain.from_iterable(one))) for one in said]

    return each if asked else None
