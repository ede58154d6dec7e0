"""Feynman-Kac steering: sequential Monte Carlo along the denoising chain.

At each scheduled level t, for K particles:

    log w_i += log G_t(x̂_0(x_t^i)) + Σ log p/q        potential of the endpoint; weights accumulate
    if ESS(w) < threshold·K:  log Ẑ += log mean w;  ancestors ~ scheme(W);  w = 1; everything follows its ancestor
    x_{t-1}^i ~ transition(x_t^{a_i})                 offspring draw apart from one evaluation

and at x_0: log G_0 = λ r(x_0) - Σ log G, so that each surviving lineage's potentials telescope to λ r(x_0).

With `value="rollout"` a level is scored by the reward of one full rollout from x_t, in place of its endpoint's:
exp(λ r) of a rollout is unbiased for exp(λ V_t), the soft value, where an endpoint's is not. It is noisy and dear: a
particle costs T + Σ t over the levels above 0 in place of T (150 for 50 at five levels). Offspring draw afresh. With
`value="draft"` it is a rollout in a few leaps, on noise of its own for the same reason.

Ẑ = Π mean(w) is unbiased for Z for every value, potential, scheme, fixed schedule and for ESS-adaptive resampling,
because weights are carried over the levels that do not resample. For max, sum and immediate that is true and empty:
their particles leave the target and are weighed back at the end, nearly all of E[Ẑ] comes from runs too rare to be
met, and a run's Ẑ is far too low as a rule (mean Ẑ/Z of 150 runs: .29 to .5). Their intervals are never relied on
once they have resampled. Temperatures chosen from the particles (`tempering="ess"`) keep consistency only.
Populations merge with weights K·Ẑ. `treesearch.methods.genealogy` makes the interval.

References:
    A General Framework for Inference-time Scaling and Steering of Diffusion Models (Singhal et al., 2025).
    Sequential Monte Carlo Samplers (Del Moral, Doucet and Jasra, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core.resampling import SCHEMES
from treesearch.core.weights import F64, ess, log_mean, normalise, scaled, temper
from treesearch.errors import choose
from treesearch.methods import genealogy, population
from treesearch.methods.base import Method, Problem, Readout, Unit
from treesearch.methods.claims import RESAMPLED, SELF_NORMALISED, Bias, Claims, Flag, Interval
from treesearch.methods.genealogy import Genealogy
from treesearch.methods.settings import as_schedule, check_draft, check_lam, check_whole, number, scored_levels
from treesearch.rewards.numeric import is_number
from treesearch.rewards.potentials import POTENTIALS, Running

SINGHAL = Paper(
    "inproceedings",
    "singhal2025general",
    "A General Framework for Inference-time Scaling and Steering of Diffusion Models",
    "Singhal, Raghav and Horvitz, Zachary and Teehan, Ryan and Ren, Mengye and Yu, Zhou and McKeown, Kathleen "
    "and Ranganath, Rajesh",
    "International Conference on Machine Learning",
    2025,
)

VALUES = ("endpoint", "rollout", "draft")
NOT_A_VALUE = (
    "potential {!r} leads particles away from the target and takes it back at the end: unbiased, but nearly all of Ẑ "
    "comes from runs too rare to be met, so that most are far too low; use potential='difference'"
)
CHOSEN = Flag(Bias.CHOSEN_TEMPERATURES, "temperatures chosen from the particles: Ẑ is consistent, not unbiased")


@dataclass(frozen=True, kw_only=True)
class FeynmanKac(Method):
    """Feynman-Kac steering.

    Args:
        num_particles: K of one population; None for one population as large as the budget pays for and the planned
            memory holds (`treesearch.methods.population`).
        lam: λ of the target, or "auto".
        potential: difference, max, sum or immediate (`rewards.potentials`).
        schedule: levels t at which endpoints are scored, 0 (x_0 itself) among them; None for five equally spaced.
        resampling: multinomial, residual, stratified, systematic or ssp (`treesearch.core.resampling`).
        ess_threshold: resample where ESS < threshold·K; 0 never, 1 always.
        value: endpoint, rollout for one full rollout a particle and level, or draft for a draft.
        draft: evaluations of a draft from T, fewer from below.
        tempering: None for λ at every level, a sequence with one factor in (0, 1] a level that ends in 1, or "ess":
            the largest λ_t whose weights keep an ESS of ess_target·K, the last one where none does, resampling until λ
            is reached (difference potential; consistent only).
        ess_target: for tempering="ess".
    """

    name = "fk"
    papers = (SINGHAL, population.DEL_MORAL, genealogy.LEE_WHITELEY)

    num_particles: int | None = None
    lam: float | str = 1.0
    potential: str = "difference"
    schedule: tuple[int, ...] | None = None
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    value: str = "endpoint"
    draft: int | None = None
    tempering: tuple[float, ...] | str | None = None
    ess_target: float = 0.5

    def __post_init__(self) -> None:
        check_whole(num_particles=self.num_particles)
        check_lam(self.lam)
        choose("potential", self.potential, POTENTIALS)
        choose("resampling scheme", self.resampling, SCHEMES)
        choose("value", self.value, VALUES)
        check_draft(self.draft)
        if (self.value == "draft") != (self.draft is not None):
            raise ValueError(
                f"value={self.value!r} with draft={self.draft}: drafts are values with value='draft', draft=10"
            )
        if not is_number(self.ess_threshold, 0, 1):
            raise ValueError(f"ess_threshold is {self.ess_threshold!r}, expected 0 (never) to 1 (always)")
        if not (is_number(self.ess_target) and 0 < self.ess_target < 1):
            raise ValueError(f"ess_target is {self.ess_target!r}, expected a fraction between 0 and 1")
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "the terminal step x_0 closes the product"))
        if isinstance(self.tempering, str):
            choose("tempering", self.tempering, ["ess"])
            if self.potential != "difference":
                raise ValueError("tempering='ess' chooses increments of λ: use it with potential='difference'")
        elif self.tempering is not None:
            given = self.tempering if isinstance(self.tempering, (list, tuple)) else ()
            if not given or given[-1] != 1 or not all(is_number(f, 0, 1) and f > 0 for f in given):
                raise ValueError(f"tempering is {self.tempering!r}, expected factors in (0, 1] that end in 1")
            object.__setattr__(self, "tempering", tuple(float(f) for f in given))

    @property
    def claims(self) -> Claims:
        flags = [SELF_NORMALISED]
        if self.ess_threshold > 0 or self.tempering == "ess":
            flags.append(RESAMPLED)
        if self.tempering == "ess":
            flags.append(CHOSEN)
        return Claims(flags=tuple(flags))

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last."""
        levels = scored_levels(self.schedule, spec)
        if isinstance(self.tempering, tuple) and len(self.tempering) != len(levels):
            raise ValueError(f"tempering has {len(self.tempering)} factors for the {len(levels)} levels {levels}")
        return levels

    def unit(self, spec: Spec) -> Unit:
        rollouts = self.value == "rollout"
        return population.unit(spec, self.num_particles, self.levels(spec), rollouts=rollouts, draft=self.draft or 0)

    def start(self, problem: Problem) -> FeynmanKacSearch:
        return FeynmanKacSearch(self, problem)


@dataclass
class Particles:
    """One population: everything that follows its ancestor, (K,) each."""

    method: FeynmanKac
    lam: float
    levels: int
    log_w: F64  # since the last resampling
    previous: F64
    running: Running
    spent: F64  # Σ log G of the lineage
    past: Genealogy
    reward: F64  # λ r of x_0, once it is there
    log_z: float = 0.0  # Σ log mean w over past resamplings
    reached: float = 0.0  # λ of the last level
    ess: list[float] = field(default_factory=list)
    resamplings: int = 0

    def step(self, level: int, reward: F64, log_w: F64, uniforms: Callable[[], F64]) -> NDArray[np.int64] | None:
        terminal = level == self.levels - 1
        before = self.log_w + log_w
        self.log_w = before + self._log_potential(level, terminal, reward, before)
        self.ess.append(ess(self.log_w))
        k, threshold = len(self.log_w), self.method.ess_threshold
        uneven = not np.all(self.log_w == self.log_w[0])
        # A temperature below λ was held back by the ESS: resampling is what lets the next one rise.
        held_back = self.method.tempering == "ess" and self.reached < self.lam
        wanted = self.ess[-1] < threshold * k or threshold == 1 or held_back
        if terminal or not uneven or not wanted or self.ess[-1] == 0:
            return None
        weights = normalise(self.log_w)
        ancestors = SCHEMES[self.method.resampling](weights, uniforms())
        self.log_z += log_mean(self.log_w)
        self.log_w = np.zeros(k)
        self.past.resample(level, ancestors, self.spent, weights)
        self.past.multinomial += self.method.resampling == "multinomial"
        self.previous, self.spent = self.previous[ancestors], self.spent[ancestors]
        self.running = Running(self.running.maximum[ancestors], self.running.total[ancestors])
        self.resamplings += 1
        return ancestors

    def _log_potential(self, level: int, terminal: bool, reward: F64, before: F64) -> F64:
        self.reached = self._lam_at(level, terminal, reward, before)
        current = scaled(self.reached, reward)
        if terminal:
            self.reward = current
            return current - self.spent
        # An endpoint of reward -inf is no verdict on x_0: that particle's level passes as if it were not scheduled.
        silent = current == -math.inf
        current = np.where(silent, self.previous, current)
        seen = np.where(silent, -math.inf, current), np.where(silent, 0.0, current)
        self.running = Running(np.maximum(self.running.maximum, seen[0]), self.running.total + seen[1])
        log_g = np.where(silent, 0.0, POTENTIALS[self.method.potential](current, self.previous, self.running))
        self.previous, self.spent = current, self.spent + log_g
        return log_g

    def _lam_at(self, level: int, terminal: bool, reward: F64, before: F64) -> float:
        if terminal or self.method.tempering is None:
            return self.lam
        if isinstance(self.method.tempering, tuple):
            return self.lam * self.method.tempering[level]
        scaled(self.lam, reward)  # refuses what is too large for the differences below
        known = reward > -math.inf

        def tempered(lam: float) -> F64:
            return before + np.where(known, lam * np.where(known, reward, 0.0) - self.previous, 0.0)

        return temper(tempered, self.reached, self.lam, self.method.ess_target * len(reward))

    @property
    def final(self) -> F64:
        """Log-weights whose log-mean-exp is the population's log Ẑ."""
        return self.log_z + self.log_w


class FeynmanKacSearch(population.PopulationSearch):
    """Populations of `Particles`, merged by K·Ẑ."""

    def __init__(self, method: FeynmanKac, problem: Problem) -> None:
        levels = method.levels(problem.spec)
        self.method, self.lam = method, number(method.lam)

        def particles(k: int) -> Particles:
            zeros = np.zeros(k)
            running = Running(np.full(k, -math.inf), zeros)
            return Particles(method, self.lam, len(levels), zeros, zeros, running, zeros, Genealogy.of(k), zeros)

        rollouts, draft = method.value == "rollout", method.draft or 0
        super().__init__(problem, method.num_particles, levels, particles, rollouts=rollouts, draft=draft)

    def readout(self) -> Readout:
        done = self.finished
        if not done:
            return Readout(np.empty(0, np.int64), np.empty(0))
        log_w = np.concatenate([p.steer.final for p in done])
        log_z, warnings = log_mean(log_w), self.memory_warnings()
        found = self._interval([p.steer for p in done]) if log_z > -math.inf else None
        if self.method.tempering == "ess":
            warnings.append("temperatures chosen from the particles: consistent, not unbiased")
        leaves, log_weights = self._beside_rollouts(np.concatenate([p.nodes for p in done]), log_w)
        return Readout(
            leaves=leaves,
            log_weights=log_weights,
            log_z=log_z,
            log_z_se=None if found is None else found.se,
            warnings=warnings,
            extra={
                "populations": [len(p.nodes) for p in done],
                "ess_levels": [p.steer.ess for p in done],
                "resamplings": [p.steer.resamplings for p in done],
            },
            interval=found,
        )

    def _interval(self, populations: Sequence[Particles]) -> Interval:
        """From the lineages of all populations; never relied on where a potential led them that is no value."""
        total = math.log(sum(len(p.log_w) for p in populations))
        parts = [genealogy.Part(p.final - total, p.reward, p.log_w, p.past) for p in populations]
        led = self.method.potential != "difference" and any(p.resamplings for p in populations)
        doubt = NOT_A_VALUE.format(self.method.potential) if led else ""
        return genealogy.interval(parts, doubt, alike=len({len(p.log_w) for p in populations}) == 1)

    def _beside_rollouts(self, leaves: NDArray[np.int64], log_w: F64) -> tuple[NDArray[np.int64], F64]:
        """All scored samples: those that only gave a level its value carry no weight, and the mean weight stays."""
        if not self.rollouts:
            return leaves, log_w
        every = self.tree.leaves
        out = np.full(len(every), -math.inf)
        out[np.searchsorted(every, leaves)] = log_w + math.log(len(every) / len(leaves))
        return every, out
