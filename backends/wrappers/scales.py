"""Guidance scales as actions: the strength of a guide is drawn anew at some levels, so that a tree search chooses it.

    state      (x_t, w), w in the last row of the state
    t ∈ levels and the prior:   w ~ uniform over `scales`, from one noise entry;   else w stays
    q(x_s | x_t, w) = N(mean_p + w (mean_q - mean_p), std²)              mean_q that of the guided kernel

With `levels` those at which a search branches, siblings differ in the scale of the segment that leads to them, and UCT
over them (`MCTS`, or `DiffusionTreeSearch` with soft values) is a search over guidance schedules. 0 among the scales is
the base kernel. Steps carry log p/q at their own w, which p draws uniformly too: methods that weigh keep the target.

Source: Monte Carlo Tree Diffusion for System 2 Planning (Yoon et al., 2025), section 3, guidance levels as
meta-actions. There a node has one child a scale and subplans are denoised one after the other; here scales are drawn,
so that a child's may repeat, and whole plans are denoised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Guided, expand, optional
from treesearch.backends.wrappers.labelled import Labelled, LabelledStep, unpack
from treesearch.rewards.numeric import is_number


@dataclass(frozen=True)
class ScaledStep(LabelledStep):
    """The law of (x_s, w), with the mean of p in that of the guided kernel where it is guided."""

    def _at(self, w: Tensor) -> Gaussian:
        """The law of x_s at scales w (n,)."""
        law: Gaussian = self.law
        if law.base_mean is None:
            return law
        return replace(law, mean=law.base_mean + expand(w, law.mean) * (law.mean - law.base_mean))


@final
@dataclass(frozen=True)
class GuidanceScales(Labelled):
    """A guided kernel whose states know their guidance scale.

    Args:
        kernel: guided, and its steps carry log p/q: `TDS`, `DAS`, `DPS`, `Diffuser(at="mean")` or `Guided`.
        scales: factors of its shift, distinct, finite and >= 0.
        levels: t at which a new scale is drawn, as a rule `branch_at` of the search.

    Raises:
        TypeError: a kernel without a guide.
        ValueError: scales or levels out of range.
    """

    scales: tuple[float, ...]
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if optional(self.kernel, "scores") is None and not isinstance(self.kernel, Guided):
            raise TypeError(f"{type(self.kernel).__name__} has no guide to scale: wrap TDS(kernel, reward) or the like")
        if not isinstance(self.scales, tuple) or not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales are {self.scales}, expected one or more, each once")
        if not all(is_number(w, 0) and w < math.inf for w in self.scales):
            raise ValueError(f"scales are {self.scales}, expected finite numbers >= 0")
        self._check_levels()

    @property
    def table(self) -> tuple[float, ...]:
        return self.scales

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> ScaledStep:
        """The law of (x_s, w).

        Raises:
            TypeError: the guide's steps do not carry log p/q.
        """
        rest, w = unpack(x)
        law = self.kernel.transition(rest, t, cond)
        guided = any(self._spec.rewards_per_nfe[level] for level in t.tolist())
        if not isinstance(law, Gaussian) or (guided and law.base_mean is None):
            raise TypeError(
                f"{type(self.kernel).__name__} moves its steps without log p/q: there is no shift to scale; guide by "
                'TDS, DAS, DPS or Diffuser(at="mean")'
            )
        return ScaledStep(law, w, self._fresh(t), self._values(x))
