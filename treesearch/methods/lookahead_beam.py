"""Beam search with look-ahead: candidates are judged by the rewards of rollouts, not of endpoint predictions.

    draw width·branching x_T and roll each out to x_0
    at each branching level t, from the top:
        keep the `width` states x_t whose rollouts ended in the highest rewards
        roll out branching - 1 more continuations of each; its own rollout is the first

Greedy: its samples are not draws of π, and no Z is estimated. A rollout is one honest draw of x_0 given x_t, so the
score is not over-confident at high noise as endpoint predictions are, but it is noisy; the best reward never falls,
since a state stays with the rollout that it was kept for. Cost: (width·branching·T + Σ_t width·(branching - 1)·t) NFE
and one reward call a rollout, over the branching levels t. Beams follow one another until the budget is spent. With
width = branching = 1 they are plain rollouts. `BeamSearch` is the same search by endpoint predictions.

Source: Inference-time Text-to-Video Alignment with Diffusion Latent Beam Search (Oshima et al., 2025). Deviations: its
look-ahead is a few deterministic DDIM steps on a coarser grid, which a kernel of one grid does not have: here the chain
itself is rolled out; and the rollout is kept as the first offspring, which saves its cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.core.tree import ROOT
from treesearch.methods.base import NO_NODES, Greedy, Ids, Problem, Unit
from treesearch.methods.beam import OSHIMA
from treesearch.methods.descent import DescentSearch, Move, Plan
from treesearch.methods.settings import as_levels, check_whole, node_levels


@dataclass(frozen=True, kw_only=True)
class LookaheadBeam(Greedy):
    """Beam search over rollouts.

    Args:
        beam_width: states that survive a level.
        branching: continuations of each.
        branch_at: levels t at which they branch; None for five equally spaced, the prior (T) included.
        beside: beams that run side by side; the result depends on it.
    """

    name = "lookahead_beam"
    papers = (OSHIMA,)

    beam_width: int = 4
    branching: int = 4
    branch_at: tuple[int, ...] | None = None
    beside: int = 4

    def __post_init__(self) -> None:
        check_whole(beam_width=self.beam_width, branching=self.branching, beside=self.beside)
        object.__setattr__(self, "branch_at", as_levels("branch_at", self.branch_at))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The branching levels for a kernel, descending."""
        return node_levels(self.branch_at, spec)

    def plans(self, spec: Spec) -> list[Plan]:
        """Beams by (width, branching): narrower ones, then one state with fewer offspring."""
        levels = self.levels(spec)
        shapes = [(w, self.branching) for w in range(self.beam_width, 0, -1)]
        shapes += [(1, b) for b in range(self.branching - 1, 0, -1)]
        plans = []
        for i, (w, b) in enumerate(shapes):
            nfe = w * b * spec.num_steps + w * (b - 1) * sum(levels)
            plans.append(Plan(i, nfe, w * b + w * (b - 1) * len(levels)))
        return plans

    def unit(self, spec: Spec) -> Unit:
        self.levels(spec)
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> LookaheadBeamSearch:
        return LookaheadBeamSearch(self, problem)


class Lookahead:
    """One beam.

    Args:
        levels: where it branches, 0 appended.
        width, branching: states that survive a level, and continuations of each.
    """

    done = False

    def __init__(self, levels: tuple[int, ...], width: int, branching: int) -> None:
        self.levels, self.width, self.branching = levels, width, branching
        self.at = -1  # the level, counted from the top, from which rollouts were made last; -1 is the root
        self.beam: list[Ids] = []  # paths of the survivors, one node a level
        self.scores: list[float] = []

    def moves(self) -> list[Move]:
        if self.at < 0:
            return [Move(ROOT, self.levels)] * (self.width * self.branching)
        below = self.levels[self.at + 1 :]
        return [Move(int(path[self.at]), below) for path in self.beam for _ in range(self.branching - 1)]

    def tell(self, reached: list[Ids], reward: NDArray[np.float64]) -> None:
        fresh = self.branching - 1
        above = [self.beam[i // fresh][: self.at + 1] if self.at >= 0 else NO_NODES for i in range(len(reached))]
        paths = [*self.beam, *(np.concatenate(both) for both in zip(above, reached, strict=True))]
        scores = [*self.scores, *map(float, reward)]
        best = np.argsort(-np.array(scores), kind="stable")[: self.width]
        self.beam, self.scores = [paths[i] for i in best], [scores[i] for i in best]
        self.at += 1
        self.done = not fresh or self.at == len(self.levels) - 1

    def keep(self) -> list[int]:
        return [int(node) for path in self.beam for node in path[max(self.at, 0) : -1]]  # may branch at any level below


class LookaheadBeamSearch(DescentSearch):
    """Beams, a group at a time."""

    def __init__(self, method: LookaheadBeam, problem: Problem) -> None:
        super().__init__(problem, method.plans(problem.spec), method.beside)
        self.method, self.levels = method, (*method.levels(problem.spec), 0)

    def make(self, size: int) -> Lookahead:
        narrower = self.method.beam_width - size
        if narrower >= 1:
            return Lookahead(self.levels, narrower, self.method.branching)
        return Lookahead(self.levels, 1, self.method.branching + narrower - 1)
