"""Solvers with memory as chains: what a step remembers is part of the state, so that any state can be branched.

    state (n, M + 1, *state): x_t, then what earlier steps leave; memory of zeros stands for none
    law of the next state: a Gaussian, std that of the kernel's step for x and 0 for memory, which x_t determines

So a solver of order two, which in diffusers belongs to one trajectory at a time, is exact in a search: each path of the
tree is what that path gives alone. Noise has the kernel's shape, so x_T and the noise of a step are the kernel's too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, optional
from treesearch.backends.chains.diffusion import Chain


@dataclass(frozen=True, eq=False)
class Packed(Wrapper, ABC):
    """A kernel whose states hold memory.

    Args:
        kernel: one on a `Chain`, with noise of the shape of its states.

    Raises:
        TypeError: another kernel, or steps of it that are not Gaussian.
    """

    undrafted: ClassVar[str] = "a state remembers what a leap would not make"

    def __post_init__(self) -> None:
        if not isinstance(optional(self.kernel, "chain"), Chain) or self._spec.noise_shape != self._spec.state_shape:
            raise TypeError(
                f"{type(self.kernel).__name__} is no kernel on a backends.chains.diffusion.Chain with noise like its "
                "states: a solver with memory cannot tell its noise levels"
            )

    @property
    @abstractmethod
    def memory(self) -> int:
        """M, how many tensors of the shape of x a state holds beside x."""

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (1 + self.memory, *self._spec.state_shape)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1, *self._spec.noise_shape)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return self._fresh(self.kernel.prior(noise[:, 0], cond))

    def bare(self, x: Tensor) -> Tensor:
        """x_t (n, *state), which rewards of states are of."""
        return x[:, 0]

    def decode(self, x0: Tensor) -> Any:
        """Samples, without what was remembered."""
        return self.kernel.decode(x0[:, 0])

    def _fresh(self, x: Tensor) -> Tensor:
        """States x (n, *state) without a memory."""
        return torch.stack([x, *[torch.zeros_like(x)] * self.memory], 1)

    def _law(self, law: Gaussian, mean: Tensor, *memory: Tensor) -> Gaussian:
        """The law of (x_s, memory) with this mean of x_s; a guide's shift stays."""
        base = None if law.base_mean is None else law.base_mean + (mean - law.mean)
        std = law.std[:, None]
        return Gaussian(
            torch.stack([mean, *memory], 1),
            torch.cat([std, *[torch.zeros_like(std)] * self.memory], 1),
            torch.stack([law.endpoint, *memory], 1),
            None if base is None else torch.stack([base, *memory], 1),
            law.rewards,
        )

    def _step(self, x: Tensor, t: Tensor, cond: Cond) -> Gaussian:
        """The kernel's own step."""
        law = self.kernel.transition(x, t, cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"solvers with memory take kernels of Gaussian steps, got {type(law).__name__}")
        return law

    def _passed(self, name: str, value: Any) -> Any:
        return self._lifted(name, value) if name in LIFTED and value is not None else value

    def _lifted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """An optional method of the kernel, for states with memory."""

        def renoise(x: Tensor, t_from: Tensor, t_to: Tensor, noise: Tensor) -> Tensor:
            return self._fresh(method(x[:, 0], t_from, t_to, noise[:, 0]))

        def encode_samples(samples: Any) -> Tensor:
            return self._fresh(method(samples))

        def state_of(image: Any) -> Tensor:
            return self._fresh(method(image)[None])[0]

        def clamp(x: Tensor, cond: Cond) -> Tensor:
            return torch.cat([method(x[:, 0], cond)[:, None], x[:, 1:]], 1)

        def held(x: Tensor, cond: Cond) -> Tensor:
            return method(x[:, 0], cond)[:, None]

        def stripped(x: Tensor, *rest: Any) -> Any:
            return method(x[:, 0], *rest)

        lifted = {f.__name__: f for f in (renoise, encode_samples, state_of, clamp, held)}
        return lifted.get(name, stripped)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)


LIFTED = ("renoise", "encode_samples", "state_of", "clamp", "held", "preview", "prior_log_weight")
