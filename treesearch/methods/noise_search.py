"""Noise search: climb in the space of the initial noise, by whole rollouts of a pivot's neighbours.

    draw `initial` x_T, denoise them; the best is the pivot
    each round:  z_i = cos θ z + sin θ ε_i,  i = 1..N        neighbours of the pivot's noise z, again N(0, I)
                 denoise x_T = prior(z_i), score x_0
                 the best becomes the pivot if it beats the pivot
    after `rounds` rounds: begin again from fresh draws

Zero-order search; θ = π/2 makes every neighbour a fresh draw, which is random search, best-of-N. Greedy: its samples
are not draws of π, and no Z is estimated. One sample costs T NFE and one reward call. Every x_0 is kept, `best` is the
answer. Published for deterministic chains, where x_T decides x_0. On a stochastic chain a neighbour's later steps have
noise of their own: θ = 0 then repeats x_T and not x_0, and a pivot may owe its reward to that noise.

The tree shows the climb: a neighbour is a child of its pivot at the same level T. Which round a sample belongs to
follows from its number alone, so that a larger budget goes on where a smaller one ended, in mid-round or not.

Source: Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps (Ma et al., 2025), random search and
zero-order search. Deviations: neighbours at an angle θ instead of a distance, so that they stay typical draws of the
prior; the pivot stays where no neighbour beats it, so that its reward never falls; restarts and `initial` > 1 are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core.noise import child_keys
from treesearch.core.tree import ROOT
from treesearch.engine.segments import Segments
from treesearch.errors import StoreError
from treesearch.methods.base import NO_NODES, Ids, Method, Problem, Readout, Search, Spent, Status, Unit
from treesearch.methods.claims import GREEDY, Bias, Claims, Flag
from treesearch.methods.descent import best_of
from treesearch.methods.settings import check_whole
from treesearch.rewards.numeric import is_number

MA = Paper(
    "article",
    "ma2025inference",
    "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps",
    "Ma, Nanye and Tong, Shangyuan and Jia, Haolin and Hu, Hexiang and Su, Yu-Chuan and Zhang, Mingda and Yang, "
    "Xuan and Li, Yandong and Jaakkola, Tommi and Jia, Xuhui and Xie, Saining",
    "arXiv preprint arXiv:2501.09732",
    2025,
)

NEIGHBOURS = Flag(
    Bias.NOISE_NEIGHBOURS,
    "samples are neighbours of a pivot that was chosen for its reward: they are no draws of p, and not independent",
)


@dataclass(frozen=True, kw_only=True)
class NoiseSearch(Method):
    """Zero-order search over the initial noise.

    Args:
        neighbours: N, samples of a round.
        theta: θ, angle in radians between the noise of a pivot and of its neighbours, 0..π/2; their correlation is
            cos θ.
        initial: draws of x_T that a climb begins with.
        rounds: rounds of a climb before the next one begins; None for a single climb.
    """

    name = "noise_search"
    papers = (MA,)

    neighbours: int = 4
    theta: float = 0.3
    initial: int = 1
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_whole(neighbours=self.neighbours, initial=self.initial, rounds=self.rounds)
        if not is_number(self.theta, 0, math.pi / 2):
            raise ValueError(f"theta is {self.theta!r}, expected an angle of 0..π/2 radians")

    @property
    def claims(self) -> Claims:
        flags = (GREEDY,) if self.theta == math.pi / 2 else (GREEDY, NEIGHBOURS)
        return Claims(flags=flags, weighs=False, no_interval="greedy: no Z is estimated")

    def unit(self, spec: Spec) -> Unit:
        """The least that one task costs.

        Raises:
            ValueError: the prior is a single state.
        """
        if not spec.stochastic[0]:
            raise ValueError(
                "the kernel's prior is deterministic (stochastic[0] is False): every x_T is the same, so there is no "
                "initial noise to search; use a method that branches below it, such as DiffusionTreeSearch"
            )
        return Unit.rollout(spec)

    def round_of(self, sample: int) -> Round:
        """The round that a sample belongs to."""
        length = None if self.rounds is None else self.initial + self.rounds * self.neighbours
        climb, at = (0, sample) if length is None else divmod(sample, length)
        begin = sample - at
        if at < self.initial:
            return Round(climb, begin, begin + self.initial, fresh=True)
        begin += self.initial + (at - self.initial) // self.neighbours * self.neighbours
        return Round(climb, begin, begin + self.neighbours, fresh=False)

    def start(self, problem: Problem) -> NoiseClimb:
        return NoiseClimb(self, problem)


class Round(NamedTuple):
    """Samples begin..end - 1: draws of the prior that begin a climb (fresh), or neighbours of its pivot."""

    climb: int
    begin: int
    end: int
    fresh: bool


class NoiseClimb(Search):
    """One task. Sample i has the nodes 1 + 2i, at level T, and 2 + 2i, its x_0."""

    def __init__(self, method: NoiseSearch, problem: Problem) -> None:
        super().__init__(problem, angle=method.theta)
        self.method, self.num_steps = method, problem.num_steps
        self.pivot, self.moves = ROOT, 0

    def ask(self, capacity: int) -> Segments:
        del capacity  # a wave is what is left of a round
        done = (len(self.tree) - 1) // 2
        now = self.method.round_of(done)
        count = min(now.end - done, self.left.units(self.num_steps, 1))
        if count <= 0:
            self.status = Status.BUDGET
            return Segments(NO_NODES, NO_NODES, NO_NODES)
        source = ROOT if now.fresh else self.pivot
        first = self._append(source, count)
        return Segments(np.full(count, source), first, first + 1)

    @property
    def spent(self) -> Spent:
        done = (len(self.tree) - 1) // 2
        return Spent(done * self.num_steps, done, done)

    def tell(self, segments: Segments) -> None:
        self.tree.value[segments.last] = self.tree.reward[segments.last]
        self._conclude(int(segments.last[-1]) // 2)

    def frontier(self) -> Ids:
        return NO_NODES  # neighbours are made from the noise of their lineage

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        """Repeat the climb on the recorded rewards; the recorded parents must be the ones they lead to."""
        del state, ends
        leaves, at = self.tree.leaves, 0
        if not np.array_equal(self.tree.t[1:], np.tile([self.num_steps, 0], len(leaves))):
            raise StoreError("the recorded levels are not those of a climb: damaged run")
        self.tree.value[leaves] = self.tree.reward[leaves]
        while at < len(leaves):
            now = self.method.round_of(at)
            at = min(now.end, len(leaves))
            source = ROOT if now.fresh else self.pivot
            if (self.tree.parent[1 + 2 * np.arange(now.begin, at)] != source).any():
                raise StoreError("the recorded parents are not the ones the recorded rewards lead to: damaged run")
            self._conclude(at)

    def readout(self) -> Readout:
        leaves = self.tree.leaves
        climbs = self.method.round_of(len(leaves) - 1).climb + 1 if len(leaves) else 0
        return Readout.greedy(leaves, climbs=climbs, pivot_moves=self.moves)

    def _conclude(self, done: int) -> None:
        """With so many samples told: at the end of a round, the best of it and the pivot is the pivot."""
        last = self.method.round_of(done - 1)
        if last.end != done:
            return
        new = 1 + 2 * np.arange(last.begin, last.end)
        among = new if last.fresh else np.concatenate([[self.pivot], new])
        best = best_of(among.tolist(), self.tree.reward[among + 1].tolist())
        self.moves += not last.fresh and best != self.pivot
        self.pivot = best

    def _append(self, source: int, count: int) -> Ids:
        """Add samples: a child of the source at level T and its x_0, which share a key; returns the former."""
        tree, begin = self.tree, int(self.tree.children[source])
        keys = child_keys(
            tree.key[[source]], int(tree.t[source]), np.arange(begin, begin + count), at_root=source == ROOT
        )
        first = len(tree) + 2 * np.arange(count)
        parent = np.stack([np.full(count, source), first], 1).ravel()
        tree.append(parent, np.tile([self.num_steps, 0], count), np.repeat(keys, 2))
        return first
