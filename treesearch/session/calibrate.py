"""λ from a pilot: the inverse temperature at which importance weights keep a target ESS fraction.

    find λ with  ESS(λ)/n = target,   ESS = (Σ w)² / Σ w²,   w_i = exp(λ r_i + log p/q)

on n base rollouts with noise of their own, so that λ is independent of the search that uses it. Rewards have no
natural unit; a λ chosen this way makes π as far from p as the pilot can still reach: KL(π‖p) is reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from treesearch.budget import Budget, Cost
from treesearch.core.weights import F64, ess, log_mean, normalise, scaled
from treesearch.errors import BudgetError

TARGET = 0.1
ROLLOUTS = 64
LEAST = 16
BUDGET_SHARE = 0.2
SMALLEST, LARGEST = 1e-6, 1e6
GRID = 121  # λ that are tried where none near 0 will do: ten a decade

Draw = Callable[[int], tuple[list[F64], list[F64], Cost]]


@dataclass(frozen=True)
class Pilot:
    """What the pilot cost and found; `rollouts` is 0 where λ was given."""

    rollouts: int = 0
    target: float = TARGET
    lam: float | None = None
    kl: float | None = None
    cost: dict[str, Any] = field(default_factory=lambda: asdict(Cost()))

    def diagnostics(self) -> dict[str, Any]:
        """What `result.diagnostics` says about it."""
        if not self.rollouts:
            return {}
        return {"pilot": {"rollouts": self.rollouts, "ess_fraction": self.target, "lam": self.lam, "kl": self.kl}}


def choose_lambda(draw: Draw, budget: Budget, tasks: int, num_steps: int) -> tuple[Pilot, float]:
    """Run the pilot and return it with λ; it may take a fifth of the budget.

    Raises:
        BudgetError: a fifth of the budget is fewer than 16 rollouts a task.
    """
    share = budget.share(tasks)
    n = min(ROLLOUTS, int(BUDGET_SHARE * share.nfe) // num_steps, int(BUDGET_SHARE * share.reward_calls))
    if n < LEAST:
        least = math.ceil(LEAST / BUDGET_SHARE)
        raise BudgetError(
            f"lam='auto' needs a pilot of {LEAST} rollouts a task within a fifth of the budget: "
            f"the minimum is nfe={least * num_steps * tasks} and reward_calls={least * tasks}, or give lam a number"
        )
    rewards, log_p, cost = draw(n)
    lam = lambda_for_ess(rewards, log_p, TARGET)
    kl = float(np.mean([divergence(r, w, lam) for r, w in zip(rewards, log_p, strict=True)]))
    return Pilot(n, TARGET, lam, kl, asdict(cost)), lam


def lambda_for_ess(rewards: Sequence[F64], log_p: Sequence[F64], target: float) -> float:
    """λ whose ESS fraction, averaged over tasks, is `target`; by bisection on log λ.

    Raises:
        ValueError: no λ in [1e-6, 1e6] gives the target: rewards that do not vary, or weights that collapse at λ = 0.
    """

    def fraction(lam: float) -> float:
        return float(np.mean([ess(scaled(lam, r) + w) / len(r) for r, w in zip(rewards, log_p, strict=True)]))

    if fraction(LARGEST) >= target:
        raise ValueError(
            f"lam='auto': the rewards of the pilot hardly vary (ESS fraction {fraction(LARGEST):.2f} at lam = "
            f"{LARGEST:g}): give lam a number"
        )
    low, high = math.log(SMALLEST), math.log(LARGEST)
    if fraction(SMALLEST) < target:  # a proposal for some λ: its weights are best near that one
        near = [lam for lam in np.geomspace(SMALLEST, LARGEST, GRID).tolist() if fraction(lam) >= target]
        if not near:
            raise ValueError(
                f"lam='auto': at no lam have the pilot's weights an ESS fraction of {target:g}; at {SMALLEST:g} it "
                f"is {fraction(SMALLEST):.3f} (a reward of -inf on most samples, or a proposal far from the kernel): "
                "give lam a number"
            )
        low = math.log(near[-1])
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fraction(math.exp(middle)) >= target else (low, middle)
    return math.exp(low)


def divergence(rewards: F64, log_p: F64, lam: float) -> float:
    """Estimate of KL(π‖p) = E_π[λ r] - log Z from base rollouts."""
    log_w = scaled(lam, rewards) + log_p
    w = normalise(log_w)
    return float(np.sum(w[w > 0] * scaled(lam, rewards)[w > 0]) - log_mean(log_w))
