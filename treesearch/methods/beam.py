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
from treesearch.citations import Paper
from treesearch.core.weights import F64
from treesearch.methods import population
from treesearch.methods.base import Greedy, Problem, Readout, Unit
from treesearch.methods.settings import as_schedule, check_whole, scored_levels

OSHIMA = Paper(
    "article",
    "oshima2025inference",
    "Inference-Time Text-to-Video Alignment with Diffusion Latent Beam Search",
    "Oshima, Yuta and Suzuki, Masahiro and Matsuo, Yutaka and Furuta, Hiroki",
    "arXiv preprint arXiv:2501.19252",
    2025,
)


@dataclass(frozen=True, kw_only=True)
class BeamSearch(Greedy):
    """Beam search over endpoint predictions.

    Args:
        beam_width: particles that survive a level.
        branching: offspring of each.
        schedule: levels t that are scored; None for five equally spaced, x_0 included.
    """

    name = "beam"
    papers = (OSHIMA,)

    beam_width: int = 4
    branching: int = 4
    schedule: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole(beam_width=self.beam_width, branching=self.branching)
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "x_0 is what is compared in the end"))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last."""
        return scored_levels(self.schedule, spec)

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

    def __init__(self, method: BeamSearch, problem: Problem) -> None:
        size, levels = method.beam_width * method.branching, method.levels(problem.spec)
        super().__init__(problem, size, levels, lambda k: Beam(min(method.beam_width, k)))

    def readout(self) -> Readout:
        nodes = [p.nodes for p in self.finished]
        leaves = np.concatenate(nodes) if nodes else np.empty(0, np.int64)
        return Readout.greedy(leaves)
