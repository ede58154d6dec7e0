"""A changed network as a proposal: its steps, with the weights that lead back to the kernel without the change.

    q = N(mean of the changed kernel, std²),    log p/q of each step with the mean of the kernel itself

Any intervention becomes a guide in this way: it decides where a search looks, and neither the target nor log Z. A step
costs the rows of both. Steps without noise stay those of p, for which no other has a weight.

Source: Diffusion Tree Sampling (Jain et al., 2025), proposals; the construction is importance sampling's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, optional


@final
@dataclass(frozen=True)
class Proposal(Wrapper):
    """A kernel of interventions as a proposal for the kernel without them.

    Args:
        kernel: `Intervened`, `Away` or several of them, one around the other.

    Raises:
        TypeError: a kernel without interventions.
    """

    def __post_init__(self) -> None:
        if optional(self.kernel, "untouched") is None:
            raise TypeError(
                f"{type(self.kernel).__name__} is no intervention, or one of actions: wrap softpag(...) or such, and "
                "put actions(...) around the proposal"
            )

    untouched = None

    @property
    def base_law(self) -> str | None:
        """Whose law p is: that of the kernel without interventions."""
        return optional(self.proposes_for, "base_law")

    @cached_property
    def proposes_for(self) -> Any:
        """The kernel p that the weights of the steps lead back to."""
        return self.kernel.untouched

    @property
    def rows_per_nfe(self) -> tuple[int, ...]:
        """Rows of both."""
        theirs = describe(self.proposes_for, identify=False).rows_per_nfe
        return tuple(a + b for a, b in zip(self._spec.rows_per_nfe, theirs, strict=True))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The changed step, with weights.

        Raises:
            TypeError: steps that are not Gaussian, or of another spread.
        """
        p, q = (kernel.transition(x, t, cond) for kernel in (self.proposes_for, self.kernel))
        if not isinstance(p, Gaussian) or not isinstance(q, Gaussian) or q.base_mean is not None:
            raise TypeError("weights are known for Gaussian steps without weights of their own")
        if not torch.equal(p.std.expand_as(p.mean), q.std.expand_as(q.mean)):
            raise TypeError("the changed kernel has another spread than p: there are no weights of this form")
        return replace(q, mean=torch.where(p.std > 0, q.mean, p.mean), base_mean=p.mean)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)
