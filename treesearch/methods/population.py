"""Populations that walk down the levels together: the loop that Feynman-Kac steering and beam search share.

    evaluate the transition at a level -> score its endpoint -> `steer` decides the ancestors -> offspring draw apart

A population of K particles costs exactly K·T NFE: the evaluation that scores a level is the one its offspring draw
from. The terminal level scores x_0 itself and never resamples. With `rollouts` a level scores a sample instead: each
particle is rolled out to x_0 with the noise of its own key, the rollout hangs below it in the tree, and its offspring
draw afresh; a particle then costs T + Σ t over the levels above 0. With `draft` it scores the end of a draft, on noise
of its own: a value that had seen the noise of the offspring would be none. Several populations run side by side in
groups whose size is fixed, so that no result depends on the batch size; what is left of a budget makes a last, smaller
one.

A population of no given size is as large as the budget pays for and as fits the memory planned for it. The plan is
`MEMORY` for all tasks together, or less where a share of what the process may take at all (`treesearch.host`) is less.
What is free at the moment has no say: equal seeds give equal numbers. Runs record the plan and resume with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from treesearch import host
from treesearch.backends.base import Spec
from treesearch.budget import INFINITE
from treesearch.citations import Paper
from treesearch.core.noise import Stream, child_keys, uniforms
from treesearch.core.tree import ROOT
from treesearch.core.weights import F64
from treesearch.engine.segments import Segments
from treesearch.errors import StoreError
from treesearch.methods.base import MEMORY, NO_NODES, Ids, Problem, Search, Spent, Status, Unit
from treesearch.methods.groups import packed, unpacked

GROUP_ROWS = 256  # particles that run side by side, in whole populations
TIMED_SIZE = 64  # size of a population where only the clock limits it
MEMORY_SHARE = 0.25  # of the memory that the process may take

DEL_MORAL = Paper(
    "article",
    "delmoral2006sequential",
    "Sequential Monte Carlo Samplers",
    "Del Moral, Pierre and Doucet, Arnaud and Jasra, Ajay",
    "Journal of the Royal Statistical Society: Series B",
    2006,
)


class Steer(Protocol):
    """One population's decisions."""

    def step(self, level: int, reward: F64, log_w: F64, uniforms: Callable[[], F64]) -> Ids | None:
        """Ancestors (K,) after a level, increasing, or None to go on as they are.

        Args:
            level: position in the schedule; the last one is terminal and its answer is not used.
            reward: r of the endpoints or rollouts, of x_0 at the terminal level, (K,).
            log_w: log p/q since the last level, (K,).
            uniforms: K + 1 uniforms of this population and level.
        """
        ...


@dataclass
class Population:
    """A population: its decisions, and its leaves once it is finished."""

    steer: Any
    nodes: Ids
    ancestors: Ids | None = None


class PopulationSearch(Search):
    """Runs populations one group after another.

    Args:
        problem: the task.
        size: K; None for one population as large as budget and memory allow.
        levels: the schedule, descending and ending in 0.
        steer: makes the decisions of a population from its size.
        rollouts: score a level by a rollout of each particle, in place of its endpoint.
        draft: score a level by a draft of so many evaluations from T, on noise of its own; 0 for none.
    """

    def __init__(
        self,
        problem: Problem,
        size: int | None,
        levels: tuple[int, ...],
        steer: Callable[[int], Any],
        *,
        rollouts: bool = False,
        draft: int = 0,
    ) -> None:
        super().__init__(problem)
        self.size, self.levels, self.make, self.rollouts, self.draft = size, levels, steer, rollouts, draft
        self.price = price(problem.spec, levels, rollouts=rollouts, draft=draft)
        self.finished: list[Population] = []
        self.group: list[Population] = []
        self.groups: list[list[int]] = []  # sizes of the populations begun, by group
        self.level = 0
        self.wanted = 0  # particles that the budget would have paid for side by side, where memory made them fewer

    @property
    def busy(self) -> bool:
        """Whether populations are on their way: only at their end do they have samples."""
        return bool(self.group)

    @property
    def committed(self) -> int:
        """NFE of the populations begun, to their end."""
        return self.price * sum(sum(group) for group in self.groups) if self.group else 0

    @property
    def spent(self) -> Spent:
        done = [k for group in self.groups for k in group]
        return Spent(self.price * sum(done), len(self.levels) * sum(done), len(done))

    def frontier(self) -> Ids:
        return np.concatenate([p.nodes for p in self.group]) if self.group else NO_NODES

    def ask(self, capacity: int) -> Segments:
        del capacity  # a level is one wave, whatever the batch size
        if not self.group and not self._begin(self._sizes()):
            self.status = Status.FINISHED if self._unlimited else Status.BUDGET
            return Segments(NO_NODES, NO_NODES, NO_NODES)
        parents, keys = self._offspring()
        each, level = self._nodes_each, self.levels[self.level]
        new = len(self.tree) + each * np.arange(len(parents))
        above = np.stack([parents, new], 1)[:, :each]  # a rollout's sample is the first child of its particle
        self.tree.append(above.ravel(), np.tile([level, 0][:each], len(parents)), np.repeat(keys, each))
        self._place(new)
        hold = each == 1 and level > 0
        return Segments(parents, new, new + each - 1, hold=hold, draft=self.draft if hold else 0)

    def tell(self, segments: Segments) -> None:
        last = self.level == len(self.levels) - 1
        offset = sum(len(g) for g in self.groups[:-1])
        for i, population in enumerate(self.group):
            nodes = population.nodes
            counter = (offset + i) * (self.problem.num_steps + 1) + self.levels[self.level]

            def draw(k: int = len(nodes), a: int = counter) -> F64:
                return uniforms(self.problem.key, k + 1, a, Stream.RESAMPLE)

            scored = nodes + self._nodes_each - 1
            reward, edge = self.tree.reward[scored], self.tree.log_w[nodes]
            if self.rollouts or last:
                self.tree.value[scored] = reward
            population.ancestors = population.steer.step(self.level, reward, edge, draw)
        self.level += 1
        if last:
            self.finished += self.group
            self.group = []

    def state(self) -> dict[str, Any]:
        return {"groups": packed(self.groups), "wanted": self.wanted}

    def restore(self, state: dict[str, Any], ends: Ids) -> None:
        """Repeat the decisions on the recorded rewards; the recorded parents must be the ones they lead to."""
        del ends
        at, self.wanted = 1, state["wanted"]
        if sum(k * count for group in state["groups"] for k, count in group) >= len(self.tree):
            raise StoreError("the recorded populations are larger than the tree: damaged run")
        for sizes in state["groups"]:
            self._begin(unpacked(sizes))
            while self.group and at < len(self.tree):
                parents, _ = self._offspring()
                new = np.arange(at, at + self._nodes_each * len(parents), self._nodes_each)
                levels = np.tile([self.levels[self.level], 0][: self._nodes_each], len(parents))
                found = self.tree.t[at : at + len(levels)]
                if not np.array_equal(self.tree.parent[new], parents) or not np.array_equal(found, levels):
                    raise StoreError(
                        "the recorded ancestors are not the ones the recorded rewards lead to: damaged run"
                    )
                at = int(new[-1]) + self._nodes_each
                self._place(new)
                self.tell(Segments(parents, new, new))

    def _begin(self, sizes: list[int]) -> bool:
        self.group = [Population(self.make(k), np.empty(k, np.int64)) for k in sizes]
        self.level = 0
        if sizes:
            self.groups.append(sizes)
        return bool(sizes)

    def _offspring(self) -> tuple[Ids, NDArray[np.uint64]]:
        """Parents and keys of the next nodes: the first child keeps its parent's key, further ones get their own."""
        sizes = [len(p.nodes) for p in self.group]
        if self.level == 0:
            before = sum(sum(g) for g in self.groups[:-1])
            ordinals = np.arange(before, before + sum(sizes))
            above = self.problem.num_steps + 1
            return np.full(sum(sizes), ROOT), child_keys(self.tree.key[:1], above, ordinals, at_root=True)
        parents = np.concatenate([p.nodes if p.ancestors is None else p.nodes[p.ancestors] for p in self.group])
        starts = np.concatenate([[True], parents[1:] != parents[:-1]])
        rank = np.arange(len(parents)) - np.maximum.accumulate(np.where(starts, np.arange(len(parents)), 0))
        rank += self.rollouts  # a particle's rollout has taken its first child's noise
        return parents, child_keys(self.tree.key[parents], self.levels[self.level - 1], rank)

    def _place(self, new: Ids) -> None:
        at = 0
        for population in self.group:
            population.nodes = new[at : at + len(population.nodes)]
            at += len(population.nodes)

    def _sizes(self) -> list[int]:
        """Sizes of the next group of populations that fit."""
        steps, calls = self.price, len(self.levels)
        if self._unlimited:
            return [] if self.groups or self.size is None else [self.size]
        left = self.left
        fits = min(left.nfe // steps, left.reward_calls // calls, left.in_time(steps, calls))
        size = min(self.size or self._largest(fits), fits)
        if size < 1 or left.iterations < 1:
            return []
        beside = min(max(1, GROUP_ROWS // size), left.iterations)
        sizes = [size] * min(beside, fits // size)
        rest = fits - sum(sizes)
        return [*sizes, rest] if len(sizes) < beside and 0 < rest < size else sizes

    @property
    def _nodes_each(self) -> int:
        """Nodes that a particle of this level adds: itself and, above x_0, its rollout's sample."""
        return 2 if self.rollouts and self.levels[self.level] > 0 else 1

    @property
    def _unlimited(self) -> bool:
        limits = (self.share.nfe, self.share.reward_calls, self.share.iterations)
        return not self.share.timed and min(limits) == INFINITE

    def _largest(self, fits: int) -> int:
        """K for one population of `fits` particles, or for several where memory or the clock asks for it."""
        if self.share.timed or self.share.nfe == self.share.reward_calls == INFINITE:
            return TIMED_SIZE
        populations = -(-fits // max(1, self._held(fits)))
        return -(-fits // max(1, populations))

    def _held(self, wanted: int) -> int:
        """How many of the particles wanted side by side the planned memory holds."""
        most = memory_cap(self.problem)
        if wanted > most:
            self.wanted = max(self.wanted, wanted)
        return min(wanted, most)

    def memory_warnings(self) -> list[str]:
        """What a reader must know of a population that memory made smaller."""
        if not self.wanted:
            return []
        most, planned = max(map(max, self.groups)), self.problem.memory / 2**20
        return [
            f"memory: populations of at most {most} particles, where the budget would pay for {self.wanted} side by "
            f"side: {planned:.0f} MiB are planned for them; give num_particles where the method has it, allow the "
            "process more memory, or spread the budget over fewer tasks"
        ]


def planned_memory() -> int:
    """Bytes for the populations of a search: `MEMORY`, or a share of a tighter limit, rounded down to a power of two.

    What `ulimit` leaves differs a little from one process to the next; the power of two hardly ever does.
    """
    allowed = host.memory()
    share = MEMORY if allowed is None else max(1, int(MEMORY_SHARE * allowed))
    return min(MEMORY, 1 << (share.bit_length() - 1))


def memory_cap(problem: Problem) -> int:
    """Particles that fit the task's memory: eight copies of a state each (state, law, noise, endpoint)."""
    return max(1, problem.memory // (8 * max(8, problem.spec.state_bytes)))


def price(spec: Spec, levels: tuple[int, ...], *, rollouts: bool = False, draft: int = 0) -> int:
    """NFE of one particle: the walk, and rollouts or drafts from every level above 0.

    Raises:
        ValueError: drafts that the kernel cannot make.
    """
    if draft and spec.valued:
        raise ValueError("the kernel declares values of its states, which drafts would only blur: leave draft out")
    drafts = spec.draft_prices(draft, held=True) if draft else (0,) * (spec.num_steps + 1)
    return spec.num_steps + rollouts * sum(levels) + sum(drafts[level] for level in levels if level > 0)


def unit(spec: Spec, size: int | None, levels: tuple[int, ...], *, rollouts: bool = False, draft: int = 0) -> Unit:
    """The least that populations cost: one of the given size, or a single particle."""
    k = size or 1
    each = price(spec, levels, rollouts=rollouts, draft=draft)
    return Unit(f"one population of {k}", k * each, k * len(levels))
