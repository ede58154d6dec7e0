"""Teleportation: the first steps of a chain by the closed form of Gaussian data, without the network.

    x_{T'} = flow of N(μ, Σ) from x_T = prior(z) to level T' = T (1 - skip)          `moments.Moments.move`

At high noise a trained score is nearly that of a Gaussian with the data's mean and covariance, so the roots of a search
can be drawn at level T' at no NFE: thousands of candidates whose x̂_0 is worth a look. For data that are Gaussian the
roots lie on the very flow that the first steps approximate. For other data they do not, no weights say so, and
`departs` does.

Source: The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its Applications (Wang
and Vastola, 2024), analytical teleportation; after Diffusion Models Generate Images Like Painters (the same, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor

from treesearch.backends.base import Cond, Spec, Wrapper, describe, fingerprint, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.exact.moments import NAMES, Moments
from treesearch.rewards.numeric import is_number

BY_LEVEL = frozenset({"stochastic", "rows_per_nfe", "backward_per_nfe", "rewards_per_nfe"})


@final
@dataclass(frozen=True, eq=False)
class Teleport(Wrapper):
    """A kernel that begins T (1 - skip) steps before the end.

    Args:
        kernel: one on a `Chain`.
        skip: share of the steps that the closed form takes, in (0, 1).
        moments: of the data in units of states, or a file of them (`Moments.save`); None for those shipped with it.
        gaussian: whether the data are exactly so. Then the chain does not depart.

    Raises:
        TypeError: a kernel without such a chain, or one around an offset or with levels by entry.
        ValueError: a setting out of range, moments of another shape, or none where none are shipped.
    """

    skip: float = 0.3
    moments: Moments | str | Path | None = None
    gaussian: bool = False

    withheld: ClassVar[frozenset[str]] = frozenset({"prior_log_weight"})

    def __post_init__(self) -> None:
        if not isinstance(optional(self.kernel, "chain"), Chain):
            name = type(self.kernel).__name__
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
        if optional(self.kernel, "offset") is not None or self.kernel.chain.schedule.alpha.ndim > 1:
            name = type(self.kernel).__name__
            raise TypeError(f"{name} has a chain around an offset, or one for each entry: the closed form is of "
                            "x_t = α_t x_0 + σ_t ε with one α_t and σ_t")  # fmt: skip
        if not is_number(self.skip, 0, 1) or not 1 <= self.num_steps < self._spec.num_steps:
            raise ValueError(f"skip is {self.skip!r}, expected a share in (0, 1) that leaves some of the "
                             f"{self._spec.num_steps} steps and takes one or more")  # fmt: skip
        shape = tuple(self._data.mean.shape)
        if shape != self._spec.state_shape:
            raise ValueError(f"moments are of states {shape}, the kernel's are {self._spec.state_shape}")

    @property
    def num_steps(self) -> int:
        """T' = T (1 - skip)."""
        return round(self._spec.num_steps * (1 - self.skip))

    @property
    def departs(self) -> str | None:
        """The first steps are another model's."""
        if self.gaussian:
            return optional(self.kernel, "departs")
        return f"the first {self._spec.num_steps - self.num_steps} steps are those of Gaussian data, not the model's"

    @cached_property
    def chain(self) -> Chain:
        """The last T' steps."""
        return self.kernel.chain.on(self.kernel.chain.schedule.last(self.num_steps))

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        x, schedule = self.kernel.prior(noise, cond), self.kernel.chain.schedule
        levels = [(schedule.alpha[t].to(x), schedule.sigma[t].to(x)) for t in (self._spec.num_steps, self.num_steps)]
        return self._data.move(x, *levels)

    def _passed(self, name: str, value: Any) -> Any:
        return value[: self.num_steps + 1] if name in BY_LEVEL and not isinstance(value, int) else value

    def _settings(self) -> str | None:
        return fingerprint.of([self.skip, self.gaussian, *(getattr(self._data, name) for name in NAMES)])

    @cached_property
    def _data(self) -> Moments:
        return self.moments if isinstance(self.moments, Moments) else _load(self.moments, self.kernel)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)


def _load(path: str | Path | None, kernel: Any) -> Moments:
    """Moments of a file, or those that are shipped for the model inside a kernel."""
    if path is not None:
        if not isinstance(path, (str, Path)):
            raise TypeError(f"moments is {path!r}, expected Moments, the path of a file of them, or None")
        return Moments.load(path)
    while isinstance(kernel, Wrapper):
        kernel = kernel.kernel
    name = optional(kernel, "name", type(kernel).__name__)
    shipped = resources.files("treesearch.backends").joinpath("weights", f"{name}_moments.safetensors")
    with resources.as_file(shipped) as file:
        if not file.exists():
            raise ValueError(f"no moments of {name!r} are shipped: give moments=Moments.of(states, rank) or a file")
        return Moments.load(file)
