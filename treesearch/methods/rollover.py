"""Rollover budget forcing: candidates at each level until one beats the record, the unused ones go to the next level.

    draw `initial` x_T, keep the one of best endpoint prediction, r* = its reward, quota = q
    at each scheduled level, from the x_t that was kept:
        draw candidates one after another
        the first with r(x̂_0) > r*      r* = its reward, keep it, quota = q + what is left
        none within the quota            keep the best of them,   quota = q          (r* stays)
    at the last level all that is left of the quota is drawn: the budget is forced to be used

Greedy: its samples are not draws of π, and no Z is estimated; with quota = 1 they are plain rollouts. Candidates of one
x_t share its evaluation, so that one between the levels s and t costs s - t NFE, and a descent with `initial` = quota
about quota·T in all, however the quota moves; reward calls: initial + quota·(levels - 1). Descents follow one another
until the budget is spent; every x_0 is kept, `best` is the answer.

Source: Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing (Kim et al., 2025),
its algorithm; `initial` and the forced last level as in its code. Deviations: levels may be several steps apart; the
last candidates are samples x_0, scored as such, instead of endpoint predictions one step before. Its conversion of
flows to stochastic chains is a property of the kernel here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core.tree import ROOT
from treesearch.methods.base import Greedy, Problem, Unit
from treesearch.methods.descent import DescentSearch, Ids, Move, Plan, best_of, prices
from treesearch.methods.settings import as_schedule, check_whole, scored_levels

KIM = Paper(
    "inproceedings",
    "kim2025inference",
    "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing",
    "Kim, Jaihoon and Yoon, Taehoon and Hwang, Jisung and Sung, Minhyuk",
    "Advances in Neural Information Processing Systems",
    2025,
)


@dataclass(frozen=True, kw_only=True)
class RolloverBudget(Greedy):
    """Rollover budget forcing (RBF).

    Args:
        quota: candidates that each level gets.
        initial: draws of x_T; None for as many as the quota.
        schedule: levels t at which candidates are compared; None for five equally spaced, x_0 included.
        beside: descents that run side by side; the result depends on it.
    """

    name = "rollover"
    papers = (KIM,)

    quota: int = 4
    initial: int | None = None
    schedule: tuple[int, ...] | None = None
    beside: int = 16

    def __post_init__(self) -> None:
        check_whole(quota=self.quota, initial=self.initial, beside=self.beside)
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "x_0 is what is compared in the end"))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last."""
        return scored_levels(self.schedule, spec)

    def draws(self, quota: int) -> int:
        """Draws of x_T of a descent with the given quota."""
        return quota if self.initial is None else min(quota, self.initial) if quota < self.quota else self.initial

    def plans(self, spec: Spec) -> list[Plan]:
        """Descents by their quota: each level draws one, the others may be rolled over to the dearest level below."""
        levels = self.levels(spec)
        first, *step = prices(levels, spec.num_steps)
        dearest = sum(max(step[i:]) for i in range(len(step)))
        return [
            Plan(q, self.draws(q) * first + sum(step) + (q - 1) * dearest, self.draws(q) + q * len(step))
            for q in range(self.quota, 0, -1)
        ]

    def unit(self, spec: Spec) -> Unit:
        least = self.plans(spec)[-1]
        return Unit("one rollout", least.nfe, least.reward_calls)

    def start(self, problem: Problem) -> RolloverSearch:
        return RolloverSearch(self, problem)


class Rollover:
    """One descent.

    Args:
        levels: the schedule.
        initial: draws of x_T.
        quota: candidates that each later level gets.
    """

    done = False

    def __init__(self, levels: tuple[int, ...], initial: int, quota: int) -> None:
        self.levels, self.quota, self.left = levels, quota, initial
        self.at, self.source, self.record = 0, ROOT, -math.inf
        self.tried: list[tuple[int, float]] = []

    def moves(self) -> list[Move]:
        forced = self.at in (0, len(self.levels) - 1)
        return [Move(self.source, (self.levels[self.at],))] * (self.left if forced else 1)

    def tell(self, reached: list[Ids], reward: NDArray[np.float64]) -> None:
        self.tried += [(int(nodes[-1]), float(r)) for nodes, r in zip(reached, reward, strict=True)]
        self.left -= len(reached)
        node = best_of(*zip(*self.tried, strict=True))
        value = dict(self.tried)[node]
        beaten = value > self.record
        if self.left and not beaten:
            return
        self.record = max(self.record, value)
        self.left = self.quota + (self.left if beaten else 0)
        self.source, self.tried, self.at = node, [], self.at + 1
        self.done = self.at == len(self.levels)

    def keep(self) -> list[int]:
        if self.done:
            return []
        best = [best_of(*zip(*self.tried, strict=True))] if self.tried else []
        return [node for node in (self.source, *best) if node != ROOT]


class RolloverSearch(DescentSearch):
    """Descents, a group at a time."""

    def __init__(self, method: RolloverBudget, problem: Problem) -> None:
        super().__init__(problem, method.plans(problem.spec), method.beside)
        self.method, self.levels = method, method.levels(problem.spec)

    def make(self, size: int) -> Rollover:
        return Rollover(self.levels, self.method.draws(size), size)
