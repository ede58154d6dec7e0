"""Depth-first search: go down, and back up when the endpoint prediction is not good enough.

    at each scheduled level t:  draw x_t, v = r(x̂_0(x_t)), enter it in the buffer of its level
    v >= δ_t                      go on down from x_t
    v <  δ_t, backtracks left     go back `depth` levels and draw again from there
    v <  δ_t, none left           go on down from the best x_t in the buffer of its level

Adaptive: a lucky descent costs T, an unlucky one up to `backtracks` redraws more. Greedy: its samples are not draws of
π, and no Z is estimated; with δ = -∞ they are plain rollouts. Descents are independent and follow one another until the
budget is spent; every x_0 is kept, `best` is the answer.

Going up. The paper adds noise to x_t to get to a higher level s. Here the descent goes back to its own x_s and draws a
new path from it: no kernel needs a forward process, discrete chains included, and the tree stays a tree. In a chain
whose marginals are those of its forward process, x_s given x_t has the law of that noise, so that a first backtrack
starts from the same law in both; later ones of the same branch start from the same x_s here, from a new one there.
Above the first level both draw a new x_T. Cost: going back from level t to x_s costs s - t NFE, as its transition was
kept; renoising costs one more.

δ is a number, one number a level, or None: the quantile q of the rewards that the descents of earlier groups saw at
that level (ours; the paper sets δ by hand for each task), so that it needs no unit. The first group then accepts all.

Source: Inference-time Scaling of Diffusion Models through Classical Search (Zhang et al., 2025), depth-first search; as
in its code the buffers are those of one descent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core.tree import NONE, ROOT
from treesearch.methods.base import Greedy, Problem, Unit
from treesearch.methods.descent import DescentSearch, Ids, Move, Plan, prices
from treesearch.methods.settings import as_schedule, check_whole, scored_levels
from treesearch.rewards.numeric import is_number, is_whole

ZHANG = Paper(
    "article",
    "zhang2025inference",
    "Inference-time Scaling of Diffusion Models through Classical Search",
    "Zhang, Xiangcheng and Lin, Haowei and Ye, Haotian and Zou, James and Ma, Jianzhu and Liang, Yitao and Du, Yilun",
    "arXiv preprint arXiv:2505.23614",
    2025,
)


@dataclass(frozen=True, kw_only=True)
class DepthFirst(Greedy):
    """Depth-first search with backtracking.

    Args:
        threshold: δ in units of the reward: one number, or one for each level of the schedule, descending; None for a
            quantile of what was seen.
        quantile: that quantile.
        backtracks: redraws of one descent.
        depth: scheduled levels that a backtrack goes up; 1 draws a sibling.
        schedule: levels t that are scored; None for five equally spaced, x_0 included.
        beside: descents that run side by side; the result depends on it.
    """

    name = "depth_first"
    papers = (ZHANG,)

    threshold: float | tuple[float, ...] | None = None
    quantile: float = 0.5
    backtracks: int = 8
    depth: int = 1
    schedule: tuple[int, ...] | None = None
    beside: int = 16

    def __post_init__(self) -> None:
        check_whole(depth=self.depth, beside=self.beside)
        if not is_whole(self.backtracks, 0):
            raise ValueError(f"backtracks is {self.backtracks!r}, expected a whole number >= 0")
        if not is_number(self.quantile, 0, 1):
            raise ValueError(f"quantile is {self.quantile!r}, expected 0..1")
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not all(delta is None or is_number(delta) for delta in given):
            raise ValueError(f"threshold is {self.threshold!r}, expected numbers")
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "x_0 is what is compared in the end"))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last.

        Raises:
            ValueError: thresholds do not match it.
        """
        levels = scored_levels(self.schedule, spec)
        if isinstance(self.threshold, tuple) and len(self.threshold) != len(levels):
            raise ValueError(
                f"threshold has {len(self.threshold)} numbers, expected {len(levels)}: one for each of the levels "
                f"{', '.join(map(str, levels))}"
            )
        return levels

    def plans(self, spec: Spec) -> list[Plan]:
        """Descents by the backtracks that they may take."""
        levels = self.levels(spec)
        step = prices(levels, spec.num_steps)
        back = max(sum(step[max(0, i - self.depth + 1) : i + 1]) for i in range(len(levels)))
        sizes = range(self.backtracks, -1, -1)
        return [Plan(k, spec.num_steps + k * back, len(levels) + k * min(self.depth, len(levels))) for k in sizes]

    def unit(self, spec: Spec) -> Unit:
        return Unit.rollout(spec, len(self.levels(spec)))

    def start(self, problem: Problem) -> DepthFirstSearch:
        return DepthFirstSearch(self, problem)


class Dive:
    """One descent.

    Args:
        levels: the schedule.
        thresholds: δ of each of them.
        left: backtracks.
        depth: levels that each goes up.
    """

    done = False

    def __init__(self, levels: tuple[int, ...], thresholds: list[float], left: int, depth: int) -> None:
        self.levels, self.thresholds, self.left, self.depth = levels, thresholds, left, depth
        self.path: list[int] = []
        self.best = [(NONE, -math.inf)] * len(levels)
        self.seen: list[list[float]] = [[] for _ in levels]

    def moves(self) -> list[Move]:
        return [Move(self.path[-1] if self.path else ROOT, (self.levels[len(self.path)],))]

    def tell(self, reached: list[Ids], reward: NDArray[np.float64]) -> None:
        node, value, at = int(reached[0][-1]), float(reward[0]), len(self.path)
        self.seen[at].append(value)
        if self.best[at][0] == NONE or value > self.best[at][1]:
            self.best[at] = node, value
        if value < self.thresholds[at] and self.left:
            self.left -= 1
            self.path = self.path[: max(0, at - self.depth + 1)]
            return
        self.path.append(node if value >= self.thresholds[at] else self.best[at][0])
        self.done = len(self.path) == len(self.levels)

    def keep(self) -> list[int]:
        kept = [*self.path, *(node for node, _ in self.best[:-1] if node != NONE)]
        return [] if self.done else kept


class DepthFirstSearch(DescentSearch):
    """Dives, a group at a time."""

    def __init__(self, method: DepthFirst, problem: Problem) -> None:
        super().__init__(problem, method.plans(problem.spec), method.beside)
        self.method, self.levels = method, method.levels(problem.spec)
        self.seen: list[list[float]] = [[] for _ in self.levels]

    def make(self, size: int) -> Dive:
        return Dive(self.levels, self._thresholds(), size, self.method.depth)

    def conclude(self, group: Sequence[Dive]) -> None:
        for dive in group:
            for seen, more in zip(self.seen, dive.seen, strict=True):
                seen += more

    def _thresholds(self) -> list[float]:
        given = self.method.threshold
        if given is None:
            q = self.method.quantile
            return [float(np.quantile(s, q, method="lower")) if s else -math.inf for s in self.seen]
        return list(given) if isinstance(given, tuple) else [float(given)] * len(self.levels)
