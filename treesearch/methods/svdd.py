"""SVDD: soft value-based decoding, which picks one of M candidates at every level.

    x = root
    for each scheduled level t, T..0 as published:
        x^1 .. x^M ~ p(x_t | x),    v^m = r(x̂_0(x^m)),  at x_0 r itself                  candidates, values
        x = x^m with probability ∝ exp(v^m / α) · p/q;   α = 0: the best                  α = 1/λ here
    x is one sample

The candidates' evaluations are the ones that their successors draw from, so a sample costs M·T NFE as executed and M
reward calls a level. Samples are independent of each other.

What it converges to: as M grows, to the chain p(x_s | x_t) exp(λ v(x_s)) / E[exp(λ v(x_s)) | x_t]. That is π where v is
the soft value V_s = (1/λ) log E[exp(λ r(x_0)) | x_s], and another law where v is the reward of the endpoint
prediction. Bias: that, and O(1/M) from choosing among M; choices are never weighed afterwards, so there is no Ẑ.
M = 1 is the base sampler; λ = ∞ is greedy, beam search of width 1 that also compares draws of x_T.

Source: Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding (Li et al.,
2024), algorithm 1, with the posterior-mean value (SVDD-PM). Published runs take α = 0 and every level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core.weights import F64, normalise, scaled
from treesearch.methods import population
from treesearch.methods.base import NOT_OF_PI, Method, Problem, Readout, Unit
from treesearch.methods.claims import GREEDY, Bias, Claims, Flag
from treesearch.methods.settings import as_schedule, check_lam, check_whole, number, scored_levels

LI = Paper(
    "article",
    "li2024derivative",
    "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding",
    "Li, Xiner and Zhao, Yulai and Wang, Chenyu and Scalia, Gabriele and Eraslan, Gokcen and Nair, Surag and "
    "Biancalani, Tommaso and Ji, Shuiwang and Regev, Aviv and Levine, Sergey and Uehara, Masatoshi",
    "arXiv preprint arXiv:2408.08252",
    2024,
)

BIASED = "soft value-based decoding: its law is not π, but a chain steered by rewards of endpoint predictions"

STEERED = Flag(
    Bias.STEERED,
    "choices among candidates are never weighed afterwards: its samples follow a chain steered by endpoint rewards",
)


@dataclass(frozen=True, kw_only=True)
class SVDD(Method):
    """Soft value-based decoding.

    Args:
        candidates: M; what is left of a budget makes a last sample from fewer.
        lam: λ = 1/α, or "auto"; math.inf is greedy, as in the published runs.
        schedule: levels t at which one candidate is picked, 0 (x_0 itself) among them; None for five equally spaced.
    """

    name = "svdd"
    papers = (LI,)

    candidates: int = 20
    lam: float | str = 1.0
    schedule: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole(candidates=self.candidates)
        check_lam(self.lam, finite=False)
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "the sample is picked among x_0"))

    @property
    def claims(self) -> Claims:
        flags = () if self.lam == 0 else (GREEDY if self.lam == math.inf else STEERED,)
        return Claims(flags=flags, no_interval="choices are not weighed: no Z is estimated")

    def levels(self, spec: Spec) -> tuple[int, ...]:
        """The schedule for a kernel, descending, 0 last."""
        return scored_levels(self.schedule, spec)

    def unit(self, spec: Spec) -> Unit:
        k = self.candidates
        return population.unit(spec, k, self.levels(spec))._replace(name=f"one sample from {k} candidates")

    def start(self, problem: Problem) -> SVDDSearch:
        return SVDDSearch(self, problem)


@dataclass
class Choice:
    """One sample on its way: a population whose members all descend from the candidate picked last."""

    lam: float
    picked: int = 0

    def step(self, level: int, reward: F64, log_w: F64, uniforms: Callable[[], F64]) -> NDArray[np.int64]:
        del level
        score = self._score(reward, log_w)
        if score.max() > -math.inf:
            cdf = np.cumsum(normalise(score))
            self.picked = int(np.searchsorted(cdf[:-1], uniforms()[0] * cdf[-1], side="right"))
        return np.full(len(reward), self.picked)

    def _score(self, reward: F64, log_w: F64) -> F64:
        """Log-weights of the candidates; where every endpoint is forbidden none of them is a verdict."""
        allowed = log_w > -math.inf
        best = reward[allowed].max(initial=-math.inf)
        if best == -math.inf:
            return log_w
        if math.isinf(self.lam):
            return np.where(allowed & (reward == best), 0.0, -math.inf)
        return scaled(self.lam, reward) + log_w


class SVDDSearch(population.PopulationSearch):
    """Samples side by side, each from M candidates a level."""

    def __init__(self, method: SVDD, problem: Problem) -> None:
        self.lam = number(method.lam)
        super().__init__(problem, method.candidates, method.levels(problem.spec), lambda k: Choice(self.lam))

    def readout(self) -> Readout:
        done = self.finished
        nodes = np.concatenate([p.nodes for p in done]) if done else np.empty(0, np.int64)
        picked = np.array([p.nodes[p.steer.picked] for p in done], np.int64)
        chosen = np.isin(nodes, picked) & ((self.lam == 0) | (self.tree.reward[nodes] > -math.inf))
        return Readout(
            leaves=nodes,
            log_weights=np.where(chosen, 0.0, -math.inf),
            warnings=[NOT_OF_PI if math.isinf(self.lam) else BIASED],
            extra={"candidates": [len(p.nodes) for p in done]},
        )
