"""Rejection: exact independent draws of π, where the reward has a known upper bound.

    repeat:  x_0 ~ p,  u ~ U[0, 1);   accept x_0 if u < exp(λ (r(x_0) - r_max))

    accepted x_0 are i.i.d. draws of π(x_0) ∝ p(x_0) exp(λ r(x_0)), whatever T and the budget
    Ẑ = exp(λ r_max) · accepted / N

What it converges to: nothing is left to converge, each accepted sample is a draw of π. Bias: none; Ẑ is unbiased with
relative standard error sqrt((1 - a) / (a N)) at acceptance rate a = Z exp(-λ r_max). Cost: T/a NFE a draw. A bound that
is too large costs draws, never exactness; one that a reward exceeds is an error, for the draws before it were of
another law. r = log p(c | x) has r_max = 0.

Best-of-N on the same rollouts keeps them all: its Ẑ has the lower variance (Rao-Blackwell), its draws are weighted.
`n` counts rollouts, not draws: stopping at the n-th accepted draw would bias Ẑ.

Sources: Various techniques used in connection with random digits (von Neumann, 1951); Probable inference, the law of
succession, and statistical inference (Wilson, 1927), the interval of the acceptance rate. Wilson's interval is right on
average over rates; given that something was accepted at a rate of far less than 1/N it is not, so that fewer than ten
acceptances are not relied on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from treesearch.backends.base import Spec
from treesearch.citations import Paper
from treesearch.core.noise import Stream, uniforms
from treesearch.core.weights import log_mean, log_mean_se, scaled
from treesearch.errors import KernelError
from treesearch.methods.base import Ids, Method, Problem, Readout, Unit
from treesearch.methods.best_of_n import Rollouts
from treesearch.methods.claims import Z95, Claims, Interval, Standing
from treesearch.methods.settings import check_lam, check_whole
from treesearch.rewards.numeric import is_number

VON_NEUMANN = Paper(
    "incollection",
    "vonneumann1951various",
    "Various techniques used in connection with random digits",
    "von Neumann, John",
    "Monte Carlo Method, National Bureau of Standards Applied Mathematics Series 12",
    1951,
)

ENOUGH = 10  # acceptances, below which an interval is not relied on


@dataclass(frozen=True, kw_only=True)
class Rejection(Method):
    """Exact independent draws of π by rejection: `samples[log_weights > -inf]`, which `draw` picks from.

    Args:
        r_max: upper bound of the reward; 0 is that of log-probabilities.
        n: rollouts a task; None makes as many as the budget allows.
        lam: λ of the target, or "auto"; it changes which samples are accepted, never the samples.

    Raises:
        ValueError: a setting out of range.
        RewardError: while it runs, a reward above r_max.
        KernelError: while it runs, a kernel with log p/q (a guide's), which has no known bound.
    """

    name = "rejection"
    papers = (VON_NEUMANN,)
    independent = True

    r_max: float = 0.0
    n: int | None = None
    lam: float | str = 1.0

    def __post_init__(self) -> None:
        check_whole(n=self.n)
        check_lam(self.lam)
        if not (is_number(self.r_max) and math.isfinite(self.r_max)):
            raise ValueError(f"r_max is {self.r_max!r}, expected a finite upper bound of the reward")

    @property
    def claims(self) -> Claims:
        return Claims()  # exact: accepted samples are draws of π

    def unit(self, spec: Spec) -> Unit:
        return Unit.rollout(spec)

    def start(self, problem: Problem) -> RejectionSearch:
        return RejectionSearch(self, problem)


class RejectionSearch(Rollouts):
    """Best-of-N's rollouts, each accepted or not by a uniform of its own."""

    def __init__(self, method: Rejection, problem: Problem) -> None:
        super().__init__(problem, method.n, method.lam)
        self.r_max, self.key = method.r_max, problem.key

    def check(self, leaves: Ids) -> None:
        """Raises:
        RewardError: a reward above the bound.
        KernelError: a weighted sample.
        """
        above = leaves[self.tree.reward[leaves] > self.r_max]
        if len(above):
            from treesearch.rewards.base import RewardError  # with torch, which the command line may not need

            worst = above[np.argmax(self.tree.reward[above])]
            raise RewardError(
                f"reward {self.tree.reward[worst]:.6g} of node {worst} is above r_max = {self.r_max:g} "
                f"({len(above)} of {len(leaves)} in this wave): the samples accepted so far are not draws of π; "
                "give a true upper bound, clip the reward to r_max, or use BestOfN"
            )
        weighted = leaves[self.tree.log_w[leaves] != 0]
        if len(weighted):
            raise KernelError(
                f"node {weighted[0]} has log p/q = {self.tree.log_w[weighted[0]]:.4g}, expected 0: rejection needs the "
                "base kernel, for a guide's weights have no known bound; use BestOfN or FeynmanKac with a guide"
            )

    def readout(self) -> Readout:
        leaves = self.told
        # Samples are numbered in order of creation, from 1: a sample's uniform depends on nothing else.
        u = uniforms(self.key, len(self.tree), 0, Stream.SELECT)[leaves]
        accepted = u < np.exp(scaled(self.lam, self.tree.reward[leaves] - self.r_max))
        log_w = np.where(accepted, self.lam * self.r_max, -np.inf)
        count = int(accepted.sum())
        return Readout(
            leaves,
            log_w,
            log_mean(log_w) if len(leaves) else None,
            log_mean_se(log_w),
            extra={"accepted": count, "acceptance_rate": count / max(1, len(leaves))},
            interval=_interval(count, len(leaves), self.lam * self.r_max) if len(leaves) else None,
        )


def _interval(accepted: int, n: int, log_bound: float) -> Interval:
    """Wilson's score interval of the acceptance rate, times exp(λ r_max): it exists where nothing was accepted, too."""
    rate, spread = accepted / n, Z95**2 / n
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    low, high = max(0.0, middle - half), middle + half
    few = "" if accepted >= ENOUGH else f"{accepted} of {n} samples were accepted, fewer than {ENOUGH}"
    return Interval(
        source="acceptances (Wilson, 1927)",
        low=math.log(low) + log_bound if accepted else -math.inf,
        high=math.log(high) + log_bound,
        standing=Standing.UNRELIABLE if few else Standing.OK,
        reason=few if accepted else f"none of {n} samples was accepted: only the upper bound says something",
    )
