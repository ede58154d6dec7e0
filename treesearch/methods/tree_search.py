"""TreeSearch: finds the best sample by expected improvement under a nested random-effects model of the reward.

A node at depth l has the value V(x) = E[y(x_0) | x], y a monotone function of the reward, and the model says

    V(child at depth l) = V(x) + δ,   δ ~ N(0, τ_l²) independent,   V(leaf) = y

so τ_l² is the variance that is resolved between two branching levels. When a wave is told:

    y             normal scores of the rewards: rank within p, estimated from the tree
    τ_1²..τ_L²    restricted likelihood from the tree so far, whenever it has grown by a tenth
    m(x), v(x)    mean and variance of V(x) given all rewards: one sweep up the tree, one down
    V'            value of a new child of x ~ N(m(x), v(x) + τ²)
    index(x)      E[(V' - V* - margin)⁺] / (1 + n P(V' > V* + margin)) / (t NFE of a rollout from level t + overhead·T)

and the next wave expands the nodes of largest index. V* is m of the incumbent's own ancestor at the new child's level,
not the incumbent's reward: what refinement gained below that ancestor can be gained below a better child as well. The
n children that x has did not get there, though the model had expected n P of them to: the rate at which it is right
is shrunk by what was seen, (1 + 0) / (1 + n P). A node with k rollouts of this wave in flight counts as if they had
returned what was expected: n grows by k, m stays, v shrinks to v / (1 + k v / Σ τ² below). The share `fresh` of the NFE
goes to rollouts from the prior, whatever the model says.

What holds: after B NFE the tree contains at least ⌊fresh·B / T⌋ independent rollouts, the first ones of best-of-N
with the same seed (with looks others, as many), so its best is never below best-of-N's at that share of the budget,
however wrong the model. The model decides where to look, never what is returned. Nothing is proven about the index;
docs/tree_search.md has what was measured. Greedy: samples are not draws of π, no Z is estimated. Log p/q
of proposals are not looked at.

Source: expected improvement: Efficient Global Optimization of Expensive Black-Box Functions (Jones, Schonlau & Welch,
1998), eq. 15. Variance components: Maximum Likelihood Approaches to Variance Component Estimation and to Related
Problems (Harville, 1977), by the fixed point of Bayesian Interpolation (MacKay, 1992). Rollouts in flight: Kriging Is
Well-Suited to Parallelize Optimization (Ginsbourger, Le Riche & Carraro, 2010), the "kriging believer". The stage-wise
target V*, the shrunk rate (the posterior mean of a Gamma(1, 1) factor) and the scale of the rewards are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.methods.base import Greedy, Problem, Unit
from treesearch.methods.nested_search import NestedSearch
from treesearch.methods.settings import as_levels, check_draft, check_whole, node_levels
from treesearch.methods.tree_drafts import DraftingSearch
from treesearch.methods.tree_looks import LookingSearch
from treesearch.rewards.numeric import is_number

JONES = Paper(
    "article",
    "jones1998efficient",
    "Efficient Global Optimization of Expensive Black-Box Functions",
    "Jones, Donald R. and Schonlau, Matthias and Welch, William J.",
    "Journal of Global Optimization",
    1998,
)
GINSBOURGER = Paper(
    "incollection",
    "ginsbourger2010kriging",
    "Kriging Is Well-Suited to Parallelize Optimization",
    "Ginsbourger, David and Le Riche, Rodolphe and Carraro, Laurent",
    "Computational Intelligence in Expensive Optimization Problems",
    2010,
)


@dataclass(frozen=True, kw_only=True)
class TreeSearch(Greedy):
    """Expected improvement on a tree: the best sample for the fewest NFE.

    Args:
        branch_at: levels t that become nodes; None for ten equally spaced and, below T / 10, each .6 of the one above.
        wave: rollouts chosen at once; the result depends on it.
        fresh: least share of the NFE that goes to rollouts from the prior, 0..1; 1 is best-of-N.
        overhead: what a rollout costs beside its NFE, in units of T: small values spend more reward calls.
        looks: "endpoints" looks at endpoints on the way and stops where they promise little, as far as they have told
            something (`treesearch.methods.tree_looks`), for several times as many reward calls; "none" does not.
        draft: evaluations of a draft of new children, the promising of which are finished
            (`treesearch.methods.tree_drafts`); None for none.
    """

    name = "tree_search"
    papers = (JONES, GINSBOURGER)

    branch_at: tuple[int, ...] | None = None
    wave: int = 16
    fresh: float = 0.25
    overhead: float = 0.1
    looks: str = "none"
    draft: int | None = None

    def __post_init__(self) -> None:
        check_whole(wave=self.wave)
        if not is_number(self.fresh, 0, 1):
            raise ValueError(f"fresh is {self.fresh!r}, expected 0..1")
        if not (is_number(self.overhead, 0) and self.overhead < math.inf):
            raise ValueError(f"overhead is {self.overhead!r}, expected a number >= 0")
        if self.looks not in ("none", "endpoints"):
            raise ValueError(f"unknown looks {self.looks!r}: choose none or endpoints")
        check_draft(self.draft)
        if self.draft is not None and self.looks != "none":
            raise ValueError(f"draft is {self.draft} with looks={self.looks!r}: choose one of the two")
        object.__setattr__(self, "branch_at", as_levels("branch_at", self.branch_at))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """Branching levels for a kernel, descending.

        Raises:
            ValueError: a level out of range, or one below which every step is deterministic.
        """
        given = self.branch_at
        if given is None:
            given = [t for t in _default_levels(spec.num_steps) if spec.branchable(t)] or None
        return node_levels(given, spec)

    def unit(self, spec: Spec) -> Unit:
        levels = self.levels(spec)
        if self.draft is not None:
            spec.draft_prices(self.draft)
        return Unit.rollout(spec, 1 if self.looks == "none" else len(levels) + 1)

    def start(self, problem: Problem) -> NestedSearch:
        if self.draft is not None:
            return DraftingSearch(self, problem)
        return LookingSearch(self, problem) if self.looks == "endpoints" else NestedSearch(self, problem)


def _default_levels(num_steps: int) -> list[int]:
    levels = {max(1, round(num_steps * k / 10)) for k in range(1, 11)}
    step = 0.06 * num_steps
    while step >= 1:
        levels.add(round(step))
        step *= 0.6
    return sorted(levels | {1}, reverse=True)
