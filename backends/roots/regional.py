"""Regional noise: a chain without noise that has some inside a mask and within some levels, DDIM's step elsewhere.

    x_s = α_s x̂_0 + √(σ_s² - s̃²) ε̂ + s̃ z,     s̃ = η m s_t,     s_t² = (σ_s/σ_t)² (σ_t² - (α_t σ_s/α_s)²)

m is 1 inside the mask and 0 outside, where a step is that of the kernel bit for bit; with α² + σ² = 1 s_t² is the
variance of DDPM's step. Noise that differs from entry to entry leaves the marginals of the chain what they are, as
DDIM's η does. Over an inverted image siblings of a tree differ inside the mask alone, and weights of a guide are sums
over its entries alone.

Source: DiffEditor: Boosting Accuracy and Flexibility on Diffusion-based Image Editing (Mou et al., 2024), regional SDE;
η = .4 inside and 0 outside, between the 10th and the 20th of 50 steps.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.interventions.base import window, within
from treesearch.backends.roots.masks import mask_of
from treesearch.rewards import files
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True, eq=False)
class Regional(Wrapper):
    """A kernel without noise, with noise inside a mask.

    Args:
        kernel: on a `Chain` around 0 at eta=0, which holds nothing; a `Clamp` goes around.
        mask: (*state) bool, the entries that have noise.
        eta: η in 0..1 inside; 0 is the kernel itself.
        levels: (low, high), t whose steps have noise, both included; None are all.

    Raises:
        TypeError: a kernel without such a chain, or whose states hold more than x_t or are held somewhere.
        ValueError: a kernel with noise, a mask of another shape or without an entry, η or levels out of range.
    """

    mask: Tensor
    _: KW_ONLY
    eta: float = 0.4
    levels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        spec, name = self._spec, type(self.kernel).__name__
        own = optional(self.kernel, "chain")
        if not isinstance(own, Chain) or optional(self.kernel, "offset") is not None:
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain around 0: its noise is unknown")
        if spec.noise_shape != spec.state_shape:
            raise TypeError(f"states of {name} hold more than x_t: noise goes inside, around the kernel within")
        if optional(self.kernel, "held") is not None:
            raise TypeError(f"{name} holds entries of its states: put what holds them around, Clamp(Regional(...))")
        if own.stochastic[1:].any() or any(spec.stochastic[1:]):
            raise ValueError(f"{name} has noise of its own: outside the mask steps are DDIM's, give it eta=0.0")
        if tuple(self.mask.shape) != spec.state_shape:
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}, expected that of a state, {spec.state_shape}")
        if self.mask.dtype != torch.bool or not self.mask.any():
            raise ValueError(f"mask must be bool with an entry, got {self.mask.dtype}, {int(self.mask.sum())} set")
        if not is_number(self.eta, 0, 1):
            raise ValueError(f"eta is {self.eta!r}, expected 0..1")
        object.__setattr__(self, "levels", window(self.levels, spec.num_steps))
        object.__setattr__(self, "mask", self.mask.to(spec.device))

    @cached_property
    def chain(self) -> Chain:
        """The kernel's, with η by level and entry."""
        own: Chain = self.kernel.chain
        eta = self.eta * within(self.levels, torch.arange(own.schedule.num_steps + 1, device="cpu")).double()
        inside = self.mask.cpu()[None].double()
        regional = Chain(own.schedule, eta=expand(eta, inside) * inside, clip_sample=own.clip_sample)
        return regional.to(own.alpha.device)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        """As for the kernel, and where the chain has noise within the mask."""
        return (self._spec.stochastic[0], *self.chain.stochastic[1:].tolist())

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The kernel's step, with less of its ε̂ and as much of fresh noise inside the mask.

        Raises:
            TypeError: no Gaussian step, or one with weights of its own.
        """
        law: Any = self.kernel.transition(x, t, cond)
        if not isinstance(law, Gaussian) or law.base_mean is not None:
            raise TypeError("regional noise needs Gaussian steps without weights: put the guide around it")
        alpha_s, all_of, kept, std = (
            chain.at(name, t, x) for chain, name in ((self.kernel.chain, "alpha_s"), (self.kernel.chain, "direction"),
                                                     (self.chain, "direction"), (self.chain, "std"))
        )  # fmt: skip
        eps = (law.mean - alpha_s * law.endpoint) / torch.where(all_of > 0, all_of, 1.0)
        mean = torch.where(std > 0, law.mean + (kept - all_of) * eps, law.mean)
        return replace(law, mean=mean.to(law.mean.dtype), std=std)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)


def regional(kernel: Any, mask: files.File, *, eta: float = 0.4, levels: tuple[int, int] | None = None) -> Regional:
    """A kernel with noise where a picture is white.

    Args:
        kernel, eta, levels: as in `Regional`.
        mask: file of it, see `roots.masks.mask_of`.
    """
    return Regional(kernel, mask_of(kernel, mask), eta=eta, levels=levels)
