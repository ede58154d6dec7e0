"""Which method to take where none is named.

draws    TreeSampling     draws of π with an unbiased Z and its error at every budget, nothing to tune
         BestOfN          where every step below x_T is deterministic: there is nothing to branch
best     TreeSearch       the best sample for the fewest evaluations
         NoiseSearch      where every step below x_T is deterministic: only x_T is left to search
"""

from __future__ import annotations

from typing import NamedTuple

from treesearch.backends.base import Spec
from treesearch.errors import choose
from treesearch.methods.base import Method
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.noise_search import NoiseSearch
from treesearch.methods.tree_sampling import TreeSampling
from treesearch.methods.tree_search import TreeSearch

GOALS = ("draws", "best")


class Advice(NamedTuple):
    """A method and why it is the one."""

    method: Method
    why: str


def advise(spec: Spec, goal: str = "draws") -> Advice:
    """The method to take for a kernel.

    Args:
        spec: of the kernel.
        goal: "draws" from π, or the "best" sample.

    Raises:
        ValueError: another goal.
    """
    choose("goal", goal, GOALS)
    if spec.branchable(spec.num_steps):
        if goal == "draws":
            return Advice(TreeSampling(), "draws of π, and log Z without bias")
        return Advice(TreeSearch(), "the best sample for the fewest evaluations; its samples are no draws of π")
    if goal == "draws":
        return Advice(BestOfN(), "every step of this kernel is deterministic, there is nothing to branch")
    return Advice(NoiseSearch(), "every step of this kernel is deterministic, only its x_T can be searched")
