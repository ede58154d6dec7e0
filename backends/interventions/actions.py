"""Interventions as actions: which setting of them rules, drawn anew at some levels, so that a tree search chooses it.

    state      (x_t, a), a in the last row of the state: a row of the table of actions
    t ∈ levels and the prior:   a ~ uniform over the actions;   else a stays
    x_s ~ p(· | x_t, a)         with the settings that a names: an action rules from the next step on

Which heads, which direction, which concept, which memory, how strong: a row of the table says it of every intervention
around the kernel. Siblings of a tree that branches at `levels` differ in their action, also on a chain without noise
(η = 0), which cannot branch otherwise; UCT over them (`MCTS`, `DiffusionTreeSearch`) is a search over interventions, by
the budget, certificate, resume and workers of any other. The law of x_0 is a mixture over sequences of actions, and
log Z is of it; around a `Proposal` it is that of p, and the weights are exact.

Source: Monte Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), section 3, meta-actions; here of the
network's insides, where the paper has guidance levels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, optional
from treesearch.backends.interventions.base import CHOSEN, law_of
from treesearch.backends.wrappers.labelled import Labelled, LabelledStep, unpack
from treesearch.rewards.numeric import is_whole

MOST = 256


@final
@dataclass(frozen=True)
class Actions(Labelled):
    """A kernel of interventions whose states know which of their settings rules.

    Args:
        kernel: of interventions, `Intervened` or around one.
        levels: t at which a new action is drawn, as a rule `branch_at` of the search.
        only: the actions: rows of settings, a number for each intervention, innermost first, 0 is off. None are all
            combinations.

    Raises:
        TypeError: a kernel without interventions.
        ValueError: levels or settings out of range, actions twice, or more than 256 combinations.
    """

    levels: tuple[int, ...]
    only: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self._choices:
            raise TypeError(
                f"{type(self.kernel).__name__} has no interventions to choose among: wrap softpag(...), hspace(...) or "
                "the like"
            )
        self._check_levels()
        self._check_rows()

    choices = ()
    untouched = None

    @property
    def base_law(self) -> str | None:
        """Whose law p is; None where it is the model's own."""
        inner = optional(self.kernel, "base_law")
        levels = ", ".join(str(t) for t in sorted(self.levels, reverse=True))
        drawn = f"one of {len(self.rows)} actions drawn with the root and at t = {levels}"
        return None if inner is None else f"{law_of(self.kernel)}, {drawn}"

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The actions, as rows of settings."""
        if self.only is not None:
            return tuple(map(tuple, self.only))
        return tuple(itertools.islice(itertools.product(*(range(len(c) + 1) for c in self._choices)), MOST + 1))

    @property
    def names(self) -> tuple[str, ...]:
        """What the actions are called."""
        return tuple(self._name(row) for row in self.rows)

    @property
    def table(self) -> tuple[float, ...]:
        return tuple(map(float, range(len(self.rows))))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> LabelledStep:
        """The law of (x_s, a)."""
        rest, a = unpack(x)
        chosen = self._settings_of.to(a.device)[a.long()]
        law = self.kernel.transition(rest, t, {**(cond or {}), CHOSEN: chosen})
        return LabelledStep(law, a, self._fresh(t), self._values(x))

    @property
    def _choices(self) -> tuple[tuple[str, ...], ...]:
        return optional(self.kernel, "choices", ())

    @cached_property
    def _settings_of(self) -> Tensor:
        """Settings (S, interventions) of the actions."""
        return torch.tensor(self.rows, dtype=torch.long, device="cpu")

    def _name(self, row: tuple[int, ...]) -> str:
        named = [names[i - 1] for names, i in zip(self._choices, row, strict=True) if i]
        return " + ".join(named) or "none"

    def _check_rows(self) -> None:
        if len(self.rows) > MOST:
            raise ValueError(f"there are more than {MOST} combinations of settings: name some, only=((1, 0), (0, 2))")
        most = tuple(len(names) for names in self._choices)
        for row in self.rows:
            if len(row) != len(most) or not all(is_whole(i, 0, n) for i, n in zip(row, most, strict=True)):
                raise ValueError(f"action {row} is no row of settings: {len(most)} numbers, at most {most}")
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError("actions are none, or one of them twice")
