"""The sampling baselines by name: a kernel, wrapped or not, and a method, from one set of settings.

    setup = BASELINES["tds"](kernel, reward, Settings(lam=2.0))
    result = ts.search(setup.kernel, reward, setup.method, budget=ts.Budget(nfe=50_000))
    draws = result.draw(2_000) if setup.weighted else result.samples

Every docstring says what the baseline tends to, its bias, and what one sample costs. T is the number of steps, K the
particles of a population (NFE/T, one population), L the scheduled levels above 0, M the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import treesearch as ts
from treesearch.backends.base import describe
from treesearch.backends.guidance import DAS, DPS, TDS
from treesearch.backends.guidance.dps import Normalise
from treesearch.rewards.base import Reward


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the baselines can be tuned by; each reads what it knows."""

    lam: float = 1.0
    """λ of the target"""
    schedule: tuple[int, ...] | None = None
    """levels at which populations are weighed, 0 among them; None for five equally spaced"""
    ess_threshold: float = 0.5
    """populations resample where ESS < threshold·K"""
    resampling: str = "systematic"
    """of populations; published: multinomial for FK, systematic for TDS, ssp for DAS"""
    max_shift: float | None = None
    """limit of a guide's step in standard deviations of the noise"""
    gamma: float = 0.008
    """DAS: growth of the temperature"""
    scale: float = 1.0
    """DPS: length of the step"""
    normalise: Normalise = "none"
    """DPS: unit of that length"""
    candidates: int = 20
    """SVDD: M"""
    r_max: float = 0.0
    """rejection: upper bound of the reward"""


class Setup(NamedTuple):
    """What to search with.

    Args:
        kernel: the base kernel or a guided one.
        method: for `ts.search`.
        weighted: whether its draws are `result.draw`; otherwise the published sampler has no weights, and they are
            `result.samples`.
    """

    kernel: Any
    method: Any
    weighted: bool = True


def importance(kernel: Any, reward: Reward, settings: Settings) -> Setup:
    """Self-normalised importance sampling: best-of-N and its weights.

    Tends to π as ESS grows. Bias of draws O(1/ESS); none in Ẑ. Cost: T NFE, 1 reward call.
    """
    return Setup(kernel, ts.BestOfN(lam=settings.lam))


def rejection(kernel: Any, reward: Reward, settings: Settings) -> Setup:
    """Rejection sampling under a bound of the reward.

    Is π at every budget. Bias: none, in draws or Ẑ. Cost: T/a NFE and 1/a reward calls, a = Z exp(-λ r_max) accepted.
    """
    return Setup(kernel, ts.Rejection(lam=settings.lam, r_max=settings.r_max))


def feynman_kac(
    kernel: Any, reward: Reward, settings: Settings, potential: str = "difference", value: str = "endpoint"
) -> Setup:
    """Feynman-Kac steering with one population.

    Tends to π as K grows. Bias of draws O(1/K); none in Ẑ, for every potential and value, though with max, sum and
    immediate a run's Ẑ is far too low as a rule. Cost: T NFE and L + 1 reward calls; with rollouts as values T + Σ t
    NFE over the L levels.
    """
    return Setup(kernel, _population(settings, settings.schedule, potential=potential, value=value))


def tds(kernel: Any, reward: Reward, settings: Settings) -> Setup:
    """The twisted diffusion sampler.

    Tends to π as K grows. Bias of draws O(1/K); none in Ẑ. Cost: T NFE, T backward passes, T + 1 reward calls.
    """
    guided = TDS(kernel, reward, lam=settings.lam, max_shift=settings.max_shift)
    return Setup(guided, _population(settings, settings.schedule))


def das(kernel: Any, reward: Reward, settings: Settings) -> Setup:
    """Diffusion alignment as sampling: TDS under a rising temperature.

    Tends to π as K grows. Bias of draws O(1/K); none in Ẑ. Cost: T NFE, T backward passes, T + 1 reward calls.
    """
    guided = DAS(kernel, reward, lam=settings.lam, gamma=settings.gamma, max_shift=settings.max_shift)
    levels = ts.FeynmanKac(schedule=settings.schedule).levels(describe(kernel))
    warm = tuple(t for t in levels if guided.factors[t] > 0 or t == 0)  # not x_T, which weighs nothing
    return Setup(guided, _population(settings, warm, tempering=guided.tempering(warm)))


def dps(kernel: Any, reward: Reward, settings: Settings) -> Setup:
    """Diffusion posterior sampling as published, without weights.

    Tends to another law than π, set by scale and steps; more samples do not help, and there is no Ẑ. Cost: T NFE, T
    backward passes, T + 1 reward calls. Its `log_weights` would make it importance sampling for π, λ included.
    """
    guided = DPS(kernel, reward, scale=settings.scale, normalise=settings.normalise, max_shift=settings.max_shift)
    return Setup(guided, ts.BestOfN(lam=settings.lam), weighted=False)


def svdd(kernel: Any, reward: Reward, settings: Settings) -> Setup:
    """Soft value-based decoding.

    Tends, as M grows, to a chain steered by endpoint rewards, which is π only where they are the soft values; more
    samples do not help, and there is no Ẑ. λ = ∞ is greedy, as published. Cost: M·T NFE, M (L + 1) reward calls.
    """
    return Setup(kernel, ts.SVDD(lam=settings.lam, candidates=settings.candidates, schedule=settings.schedule))


def _population(settings: Settings, schedule: tuple[int, ...] | None, **how: Any) -> ts.FeynmanKac:
    return ts.FeynmanKac(
        lam=settings.lam,
        schedule=schedule,
        resampling=settings.resampling,
        ess_threshold=settings.ess_threshold,
        **how,
    )


BASELINES: dict[str, Callable[[Any, Reward, Settings], Setup]] = {
    "importance": importance,
    "rejection": rejection,
    "fk_difference": feynman_kac,
    "fk_max": partial(feynman_kac, potential="max"),
    "fk_sum": partial(feynman_kac, potential="sum"),
    "fk_immediate": partial(feynman_kac, potential="immediate"),
    "fk_rollout": partial(feynman_kac, value="rollout"),
    "tds": tds,
    "das": das,
    "dps": dps,
    "svdd": svdd,
}
