"""Beam search: keep the best endpoints, branch each of them.

At each scheduled level the `beam_width` particles of highest endpoint reward survive and get `branching` offspring
each. Greedy: it maximises the reward of endpoint predictions, its samples are not draws of π and no Z is estimated.
Cost: beam_width·branching·T NFE a beam.

Source: Inference-time Text-to-Video Alignment with Diffusion Latent Beam Search (Oshima et al., 2025), without its
look-ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.core.weights import F64
from treesearch.methods import population
from treesearch.methods.base import NOT_OF_PI, Problem, Readout, Unit, as_levels, branch_levels, check_whole
from treesearch.methods.claims import GREEDY_TREE


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Beam search over endpoint predictions.

    Args:
        beam_width: particles that survive a level.
        branching: offspring of each.
        schedule: levels t that are scored; None for five equally spaced, x_0 included.
    """

    beam_width: int = 4
    branching: int = 4
    schedule: tuple[int, ...] | None = None

    lag = 0
    mode = "wave"
    independent = False
    lam = 0.0
    claims = GREEDY_TREE

    def __post_init__(self) -> None:
        check_whole(beam_width=self.beam_width, branching=self.branching)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", as_levels("schedule", self.schedule))
            if 0 not in self.schedule:
                raise ValueError(f"schedule {list(self.schedule)} lacks 0: x_0 is what is compared in the end")

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last."""
        return branch_levels(self.schedule, spec, top=False, what="schedule")

    def unit(self, spec: Spec) -> Unit:
        return population.unit(spec, self.beam_width * self.branching, self.levels(spec))

    def start(self, problem: Problem) -> BeamSearcher:
        return BeamSearcher(self, problem)


@dataclass
class Beam:
    """Greedy truncation of one population."""

    width: int

    def step(self, level: int, reward: F64, log_w: F64, uniforms: Callable[[], F64]) -> NDArray[np.int64]:
        del level, log_w, uniforms
        best = np.sort(np.argsort(-reward, kind="stable")[: self.width])
        copies, extra = divmod(len(reward), len(best))
        return np.repeat(best, copies + (np.arange(len(best)) < extra))


class BeamSearcher(population.PopulationSearch):
    """Beams, one after another."""

    lam = 0.0

    def __init__(self, method: BeamSearch, problem: Problem) -> None:
        size, levels = method.beam_width * method.branching, method.levels(problem.spec)
        super().__init__(problem, size, levels, lambda k: Beam(min(method.beam_width, k)))

    def readout(self) -> Readout:
        nodes = [p.nodes for p in self.finished]
        leaves = np.concatenate(nodes) if nodes else np.empty(0, np.int64)
        return Readout(leaves, np.zeros(len(leaves)), warnings=[NOT_OF_PI])
