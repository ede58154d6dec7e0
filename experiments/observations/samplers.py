"""Samplers of a posterior by name: published rules as they stand, and exact ones by search.

Published rules have no weights: their draws are a law of their own, and neither more of them nor weights bring it to
the posterior. The others weigh their draws for p(x) N(y; A x, tolerance²), and say log p(y).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import treesearch as ts
from experiments.observations.tasks import Task, residual
from treesearch.backends import mnist
from treesearch.backends.guidance import DPS, TDS, FlowChef, Spread, Steered, spread
from treesearch.methods.base import Method
from treesearch.rewards import Reward

CHEF_STEPS = 10  # M
PILOT = 256  # rollouts that tell how misses go together
ENOUGH = 128  # independent draws of a published rule: more change no figure
PROPOSAL = 0.3  # DPS as a proposal: a step in lengths of the noise


@dataclass(frozen=True)
class Bed:
    """The shipped MNIST model at some number of steps.

    Args:
        num_steps: T.
    """

    num_steps: int

    @cached_property
    def kernel(self) -> Any:
        """With noise at every step but the last."""
        return mnist(num_steps=self.num_steps)

    @cached_property
    def still(self) -> Any:
        """Without."""
        return mnist(num_steps=self.num_steps, eta=0.0)

    @cached_property
    def spread(self) -> Spread:
        """r_t from 64 rollouts."""
        return spread(self.kernel, correlated=False)

    @cached_property
    def correlated(self) -> Spread:
        """How misses go together."""
        return spread(self.kernel, n=PILOT, correlated=True)

    @property
    def levels(self) -> tuple[int, ...]:
        """Where populations are weighed: everywhere but at x_T and before the last step, which has no noise."""
        return (*range(self.num_steps - 1, 1, -1), 0)


@cache
def bed(num_steps: int) -> Bed:
    """One for each T, so that pilots run once."""
    return Bed(num_steps)


@dataclass(frozen=True)
class Sampler:
    """A sampler.

    Args:
        title: for people.
        kernel: what it searches, of a bed, a task and an observation.
        exact: whether its weights count; otherwise it is taken as published.
        trees: waves of trees in place of one population, of those that are exact.
        backward: backward passes of an evaluation.
    """

    title: str
    kernel: Callable[[Bed, Task, Reward], Any]
    exact: bool = True
    trees: bool = False
    backward: int = 0

    def particles(self, of: Bed, work: int) -> int:
        """How many samples NFE + 2 · backward passes of so many pay for, and no more than are of use."""
        paid = work // (of.num_steps * (1 + 2 * self.backward))
        return paid if self.exact else min(paid, ENOUGH)

    def method(self, of: Bed, n: int) -> Method:
        """For n samples."""
        if not self.exact:
            return ts.BestOfN(n=n)
        return ts.TreeSampling() if self.trees else ts.FeynmanKac(num_particles=n, schedule=of.levels)


def _steered(of: Bed, task: Task, y: Reward) -> Any:
    return Steered(of.kernel, y, spread=of.spread)


def _correlated(of: Bed, task: Task, y: Reward) -> Any:
    return Steered(of.kernel, y, spread=of.correlated)


def _projected(of: Bed, task: Task, y: Reward) -> Any:
    return Steered(of.kernel, y, rule="paper")


def _chef(of: Bed, task: Task, y: Reward) -> Any:
    return FlowChef(of.still, residual(y), scale=0.25 / task.largest, steps=CHEF_STEPS)


def _dps(of: Bed, task: Task, y: Reward) -> Any:
    return DPS(of.kernel, residual(y), scale=task.dps, normalise="residual")


def _leaning(of: Bed, task: Task, y: Reward) -> Any:
    return DPS(of.kernel, y, scale=PROPOSAL, normalise="gradient")


SAMPLERS = {
    "fk steered": Sampler("FK on Steered, r_t", _steered),
    "fk correlated": Sampler("FK on Steered, correlated", _correlated),
    "trees correlated": Sampler("TreeSampling on Steered, correlated", _correlated, trees=True),
    "fk": Sampler("FK on endpoints", lambda of, task, y: of.kernel),
    "tds": Sampler("TDS", lambda of, task, y: TDS(of.kernel, y), backward=1),
    "dps proposal": Sampler("FK on DPS", _leaning, backward=1),
    "steered": Sampler("Steered, published", _projected, exact=False),
    "flowchef": Sampler("FlowChef, published", _chef, exact=False),
    "dps": Sampler("DPS, published", _dps, exact=False, backward=1),
}
