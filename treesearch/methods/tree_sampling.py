"""Tree sampling: waves of splitting trees whose twists are soft values fitted to the waves before.

Wave k is a tree of n_k rollouts that walk down together. At each scheduled level, with ψ fitted to waves 1..k-1
(`treesearch.core.values`; in the first wave ψ = κ_t λ r̂):

    log w_i += ψ_t(r̂(x_t^i)) - ψ_s(r̂(x_s^i)) + Σ log p/q       s the level above; ψ = 0 above the first one
    if ESS(w) < .7 n:  log Ẑ += log mean w;  split and prune: a node gets floor or ceil of n W children;  w = 1
    x_0:  log w_i += λ r(x_0) - ψ

    Ẑ_k = Π mean w,   Ẑ = Σ α_k Ẑ_k / Σ α_k,   α_k = N_k^{3/2} - N_{k-1}^{3/2},   N_k = n_1 + ... + n_k

and a leaf of wave k has the weight α_k Ẑ_k W_i. The first wave is a sixteenth of the budget, each further one three
times all before, so that three quarters of the budget run with values from a quarter of it.

Claims. E[Ẑ_k | waves before] = Z for every ψ that is fitted to them alone (Del Moral, 2004, theorem 7.4.2: a
Feynman-Kac flow with fixed potentials), and α_k depends on the sizes alone; hence E[Ẑ] = Z at every budget. Draws are
biased by O(1/n), as for every self-normalised estimate. Unlike a soft value backed up through a tree that is grown by
looking at it, nothing here weighs a node by a reward that decided how often the node was visited.

Values that a kernel declares (`Spec.valued`) are λ V̂ as they stand, ψ = λ v: slope 1, no fit and no floor in any wave,
for a fit to a few dozen rollouts is worse than what is known. Then a wave is Feynman-Kac steering by v.

Drafts. r̂ may be the reward of a draft (`draft`), on noise of its own: ψ is a function of the state and of noise that
nothing below takes, and the claims stand. Fitted slopes shrink what that noise adds.

Cost: T NFE and one reward call a scheduled level for each leaf, and its drafts.

Sources: Unbiased estimates from populations: Feynman-Kac Formulae (Del Moral, 2004). Twists from past populations: The
Iterated Auxiliary Particle Filter (Guarniero, Johansen and Lee, 2017). α: The square root rule for adaptive importance
sampling (Owen and Zhou, 2020). Splitting by values: section 8 of it in Rare Event Simulation using Monte Carlo Methods
(Rubino and Tuffin, 2009). Against: Diffusion Tree Sampling (Jain et al., 2025), `treesearch.methods.diffusion_tree`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core import values
from treesearch.core.resampling import systematic
from treesearch.core.values import Value
from treesearch.core.weights import F64, ess, log_mean, normalise, scaled
from treesearch.methods import genealogy, population
from treesearch.methods.base import Ids, Method, Problem, Readout, Spent, Unit
from treesearch.methods.claims import RESAMPLED, SELF_NORMALISED, Claims
from treesearch.methods.genealogy import Genealogy
from treesearch.methods.settings import as_schedule, check_draft, check_lam, number, scored_levels

GUARNIERO = Paper(
    "article",
    "guarniero2017iterated",
    "The Iterated Auxiliary Particle Filter",
    "Guarniero, Pieralberto and Johansen, Adam M. and Lee, Anthony",
    "Journal of the American Statistical Association",
    2017,
)
OWEN = Paper(
    "article",
    "owen2020square",
    "The Square Root Rule for Adaptive Importance Sampling",
    "Owen, Art B. and Zhou, Yi",
    "ACM Transactions on Modeling and Computer Simulation",
    2020,
)

THRESHOLD = 0.7  # of the ESS, below which a wave splits and prunes
LEVELS = 20
FIRST, SMALLEST = 16, 64  # the first wave's share is 1/FIRST; budgets of fewer leaves are one wave
GROWTH = 3  # size of a wave over all before
MOST_LOST = 1.0  # nats of steering: more than elsewhere, for the floor of a twist bounds what pruning takes away
TIMED_FIRST, TIMED_MOST = 64, 1024  # leaves of a wave where only the clock limits it


@dataclass(frozen=True, kw_only=True)
class TreeSampling(Method):
    """Draws from π, and an unbiased Ẑ with a standard error.

    Args:
        lam: λ of the target, or "auto".
        schedule: levels t at which endpoints are scored, 0 (x_0 itself) among them; None for twenty equally spaced.
            Fewer cost fewer reward calls and decodes.
        draft: evaluations of a draft from T, fewer from below, whose reward a level is valued by; None for endpoints.
    """

    name = "tree_sampling"
    papers = (population.DEL_MORAL, GUARNIERO, OWEN, genealogy.LEE_WHITELEY)

    lam: float | str = 1.0
    schedule: tuple[int, ...] | None = None
    draft: int | None = None

    def __post_init__(self) -> None:
        check_lam(self.lam)
        check_draft(self.draft)
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "x_0 itself is weighed last"))

    @property
    def claims(self) -> Claims:
        return Claims(flags=(SELF_NORMALISED, RESAMPLED))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last."""
        return scored_levels(self.schedule, spec, LEVELS)

    def unit(self, spec: Spec) -> Unit:
        levels = self.levels(spec)
        return Unit("one rollout", population.price(spec, levels, draft=self.draft or 0), len(levels))

    def start(self, problem: Problem) -> TreeSamplingSearch:
        return TreeSamplingSearch(self, problem)


@dataclass
class SplittingTree:
    """One tree; arrays follow the leaves' ancestors, (n,) each or a row of them a level."""

    lam: float
    twists: list[Value]  # of the levels above 0
    log_w: F64  # since the last split
    past: Genealogy
    above: F64  # ψ of the last level
    endpoints: list[F64] = field(default_factory=list)  # λ r̂, a row a level
    reward: F64 = field(default_factory=lambda: np.empty(0))
    bare: F64 = field(default_factory=lambda: np.empty(0))  # log_w before exp(λ r)
    log_z: float = 0.0
    ess: list[float] = field(default_factory=list)

    def step(self, level: int, reward: F64, log_w: F64, uniforms: Callable[[], F64]) -> Ids | None:
        """See `population.Steer`."""
        self.log_w = self.log_w + log_w
        u = scaled(self.lam, reward)
        if level == len(self.twists):
            self.reward, self.bare = reward, self.log_w - self.above
            self.log_w = self.bare + u
            self.ess.append(ess(self.log_w))
            return None
        # an endpoint of reward -inf is no verdict on x_0: the node keeps the value of the level above
        silent = u == -math.inf
        here = np.where(silent, self.above, self.twists[level].twist(np.where(silent, 0.0, u)))
        self.log_w, self.above = self.log_w + here - self.above, here
        self.endpoints.append(u)
        self.ess.append(ess(self.log_w))
        if self.ess[-1] == 0 or self.ess[-1] >= THRESHOLD * len(u):
            return None
        weights = normalise(self.log_w)
        ancestors = systematic(weights, uniforms())
        self.log_z += log_mean(self.log_w)
        self.log_w = np.zeros(len(u))
        self.past.resample(level, ancestors, self.above, weights)
        self.above = self.above[ancestors]
        self.endpoints = [row[ancestors] for row in self.endpoints]
        return ancestors

    @property
    def final(self) -> F64:
        """Log-weights for π (n,), whose log-mean-exp is log Ẑ of the wave."""
        return self.log_z + self.log_w

    @property
    def prior(self) -> F64:
        """Log-weights for p (n,)."""
        return self.log_z + self.bare


class TreeSamplingSearch(population.PopulationSearch):
    """Waves one after another."""

    def __init__(self, method: TreeSampling, problem: Problem) -> None:
        self.method, self.lam = method, number(method.lam)
        super().__init__(problem, None, method.levels(problem.spec), self._splitting_tree, draft=method.draft or 0)

    def _splitting_tree(self, n: int) -> SplittingTree:
        zeros = np.zeros(n)
        return SplittingTree(self.lam, self._twists(), zeros, Genealogy.of(n), zeros)

    def _twists(self) -> list[Value]:
        """Values of every level above 0, from the finished waves; those that are declared as they are."""
        if self.problem.spec.valued:
            return [Value.guess(1.0) for _ in self.levels[:-1]]
        slopes = [values.prior_slope(t, self.problem.num_steps) for t in self.levels[:-1]]
        waves = [p.steer for p in self.finished]
        if not waves:
            return [Value.guess(slope) for slope in slopes]
        shift = self._shares() - np.log([len(w.reward) for w in waves])
        log_w = np.concatenate([w.final + s for w, s in zip(waves, shift, strict=True)])
        log_p = np.concatenate([w.prior + s for w, s in zip(waves, shift, strict=True)])
        y = scaled(self.lam, np.concatenate([w.reward for w in waves]))
        levels = zip(*(w.endpoints for w in waves), strict=True)
        return [values.fit(np.concatenate(u), y, log_w, log_p, slope) for u, slope in zip(levels, slopes, strict=True)]

    def _shares(self) -> F64:
        """log α_k/Σα of the finished waves."""
        total = np.cumsum([len(p.nodes) for p in self.finished]) ** 1.5
        return np.log(np.diff(total, prepend=0.0) / total[-1])

    @property
    def spent(self) -> Spent:
        done = sum(k for sizes in self.groups for k in sizes)
        return Spent(self.price * done, len(self.levels) * done, done)

    def _sizes(self) -> list[int]:
        if self._unlimited:
            return []
        done = sum(k for sizes in self.groups for k in sizes)
        calls, left = len(self.levels), self.left
        fits = left.units(self.price, calls)
        if fits < 1:
            return []
        size = self._held(min(self._planned(done, fits), fits))
        whole = size < fits <= min(population.memory_cap(self.problem), 2 * size)
        return [fits if whole else size]  # no small wave at the end

    def _planned(self, done: int, fits: int) -> int:
        """Leaves of the next wave."""
        if self.share.timed:
            return min(max(TIMED_FIRST, GROWTH * done), TIMED_MOST)
        if done:
            return GROWTH * done
        return fits if fits < SMALLEST else fits // FIRST

    def readout(self) -> Readout:
        if not self.finished:
            return Readout(np.empty(0, np.int64), np.empty(0))
        waves = [p.steer for p in self.finished]
        sizes, shares = np.array([len(w.reward) for w in waves]), self._shares()
        log_w = np.concatenate(
            [w.final + s + math.log(sizes.sum() / n) for w, s, n in zip(waves, shares, sizes, strict=True)]
        )
        log_z = log_mean(log_w)
        extra: dict[str, Any] = {
            "waves": sizes.tolist(),
            "log_z_waves": [log_mean(w.final) for w in waves],
            "slopes": {t: v.slope for t, v in zip(self.levels, waves[-1].twists, strict=False)},
            "ess_levels": [w.ess for w in waves],
        }
        leaves = np.concatenate([p.nodes for p in self.finished])
        if log_z == -math.inf:
            return Readout(leaves, log_w, log_z, warnings=self.memory_warnings(), extra=extra)
        most = genealogy.MOST_LOST if self.problem.spec.valued else MOST_LOST  # declared values have no floor
        parts = [
            genealogy.Part(w.final + s - math.log(len(w.reward)), scaled(self.lam, w.reward), w.log_w, w.past, most)
            for w, s in zip(waves, shares, strict=True)
        ]
        found = genealogy.interval(parts)
        return Readout(leaves, log_w, log_z, found.se, warnings=self.memory_warnings(), extra=extra, interval=found)
