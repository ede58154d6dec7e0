"""Known entries that the model was not trained with, by replacement.

Notation: x_t = α_t x_0 + σ_t ε, s = t - 1; M the entries under the mask, y their values at x_0.

    x_s^M ~ N(α_s y, σ_s²), or x_s^M = y_s on a path y_0..y_T,   whatever x_t: a law of its own

Replacement tells the free entries of y only through the network's next call, so its samples are no draws of p given y.
Those are of `Steered` with a measurement of `masked(mask)`, whose weights are exact.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), app. I.2, and RePaint
        (Lugmayr et al., 2022), algorithm 1 without its resampling: replacement.
    Cyclic One-Way Diffusion (Wang et al., 2024), section 3.2: replacement along the path of an inverted seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, optional
from treesearch.backends.chains.diffusion import Chain


@final
@dataclass(frozen=True, eq=False)
class Clamp(Wrapper):
    """Replacement: known entries are what they are at every level, whatever the kernel makes of them.

    A kernel with a law of its own, not that of p given the values; `departs` says so. On a path the network sees the
    known entries of each level as the path has them, also after a cycle has noised them (Cyclic One-Way Diffusion).

    Args:
        kernel: on a `treesearch.backends.chains.diffusion.Chain`, as its attribute `chain`.
        mask: (*state) bool, the known entries; or (n, *state), for n images, each of which is a task.
        values: (*state) what the entries are at x_0, noised afresh for each level; or (T + 1, *state) what they are at
            each level, as `invert` finds the noisy states of a seed, (T + 1, n, *state) those of n images. Others than
            known entries are not read.

    Raises:
        TypeError: a kernel without such a chain or with an offset, or with noise of another shape than its states.
        ValueError: shapes that do not fit, no known entry, or a value that is not finite.
    """

    mask: Tensor
    values: Tensor

    departs = "replacement: a law of its own, not the model's given what is known"

    def __post_init__(self) -> None:
        spec, name = self._spec, type(self.kernel).__name__
        if not isinstance(optional(self.kernel, "chain"), Chain) or spec.noise_shape != spec.state_shape:
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
        if optional(self.kernel, "offset") is not None:
            raise TypeError(f"{name} has a chain around an offset: what is known cannot be noised as α_t x_0 + σ_t ε")
        rank = len(spec.state_shape)
        if tuple(self.mask.shape[-rank:]) != spec.state_shape or self.mask.ndim not in (rank, rank + 1):
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}, expected that of a state, {spec.state_shape}")
        if tuple(self.values.shape) not in self._shapes:
            either = ", or a path ".join(str(shape) for shape in self._shapes)
            raise ValueError(f"values has shape {tuple(self.values.shape)}, expected that of a state, {either}")
        if self.mask.dtype != torch.bool or not self.mask.flatten(-rank).any(-1).all():
            raise ValueError(f"mask must be bool with a known entry, got {self.mask.dtype}, {int(self.mask.sum())} set")
        clean = torch.where(self.mask, self.values, 0.0)
        if not clean.isfinite().all():
            raise ValueError("values must be finite where the mask is set")
        object.__setattr__(self, "values", clean.to(spec.device, spec.dtype))
        object.__setattr__(self, "mask", self.mask.to(spec.device))

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _open(self, cond: Cond) -> Tensor:
        """Entries under the mask that the base kernel does not clamp itself, broadcastable to (n, *state)."""
        clamped = None if cond is None else cond.get("mask")
        mask = self._mask(cond)
        return mask if clamped is None else mask & ~clamped

    def _mask(self, cond: Cond) -> Tensor:
        """Known entries of the image of each row, broadcastable to (n, *state)."""
        return self.mask[self._image(cond)] if self._images else self.mask[None]

    def _image(self, cond: Cond) -> Tensor | int:
        """Which image each row is of, the first where nothing says so."""
        return 0 if cond is None or self._count == 1 else cond["task"].to(self.mask.device)

    def _at(self, s: Tensor, cond: Cond) -> Tensor:
        """Values on the path at levels s (n,)."""
        path = self.values if self.values.ndim - len(self._spec.state_shape) == 2 else self.values[:, None]
        return path[s, self._image(cond)]

    def _levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t of x_t, t in 0..T, against x; of x_0 itself 1 and 0, also where the grid ends above that."""
        schedule = self.kernel.chain.schedule
        alpha, sigma = (v.to(x.device, x.dtype)[t] for v in (schedule.alpha, schedule.sigma))
        return expand(torch.where(t == 0, 1.0, alpha), x), expand(torch.where(t == 0, 0.0, sigma), x)

    def _noised(self, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._levels(noise, t)
        return alpha * self.values + sigma * noise

    @cached_property
    def stochastic(self) -> Tensor:
        """(T + 1,) bool: entries that are noised afresh are so wherever the level below has noise."""
        base = torch.as_tensor(self._spec.stochastic, device="cpu")
        if self._on_path:
            return base & bool((~self.mask).any())
        below = self.kernel.chain.schedule.sigma[: self._spec.num_steps] > 0
        below[0] = False  # of x_0
        return base | torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), below])

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any] | None:
        """Conditioning of prompts, one for each image.

        Raises:
            ValueError: another number of prompts than of images, where there are several.
        """
        if self._count not in (1, len(prompts)):
            raise ValueError(f"{len(prompts)} prompts for {self._count} images: give each its own")
        encode = optional(self.kernel, "encode")
        return {} if encode is None else encode(prompts)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        x = self.kernel.prior(noise, cond)
        top = torch.full((len(x),), self.kernel.num_steps, device=x.device)
        known = self._at(top, cond) if self._on_path else self._noised(noise.to(x.device, x.dtype), top)
        return torch.where(self._open(cond), known, x)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        held = self._open(cond)
        if self._on_path:
            x = torch.where(held, self._at(t, cond), x)
        law = _gaussian(self.kernel.transition(x, t, cond))
        known, noise, end = self._known(x, t - 1, cond)
        mean = torch.where(held, known, law.mean)
        base = None if law.base_mean is None else torch.where(held, mean, law.base_mean)
        endpoint = torch.where(held, end, law.endpoint)
        return replace(law, mean=mean, std=torch.where(held, noise, law.std), endpoint=endpoint, base_mean=base)

    def held(self, x: Tensor, cond: Cond) -> Tensor:
        """Entries that are known here or by the kernel inside, bool against states x (n, *state)."""
        inside = optional(self.kernel, "held")
        return self._mask(cond) if inside is None else self._mask(cond) | inside(x, cond)

    def _known(self, x: Tensor, s: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of known entries at levels s (n,), and what they are at x_0."""
        if self._on_path:
            return self._at(s, cond), x.new_zeros(()), self._at(torch.zeros_like(s), cond)
        alpha, sigma = self._levels(x, s)
        return alpha * self.values, sigma, self.values

    @property
    def _on_path(self) -> bool:
        return self.values.ndim > len(self._spec.state_shape)

    @property
    def _images(self) -> bool:
        """Whether there are masks of several images."""
        return self.mask.ndim > len(self._spec.state_shape)

    @property
    def _count(self) -> int:
        """n, how many images there are."""
        state = len(self._spec.state_shape)
        of_values = self.values.shape[1] if self.values.ndim == state + 2 else 1
        return max(of_values, len(self.mask) if self._images else 1)

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """What values may have."""
        state, levels = self._spec.state_shape, self._spec.num_steps + 1
        if self._images:
            return ((levels, len(self.mask), *state),)
        of_images = self.values.shape[1:2] if self.values.ndim == len(state) + 2 else ("n",)
        return state, (levels, *state), (levels, *of_images, *state)  # type: ignore[return-value]


def clamps(kernel: Any) -> list[Clamp]:
    """Those around a kernel, outermost first."""
    inside = clamps(kernel.kernel) if isinstance(kernel, Wrapper) else []
    return [kernel, *inside] if isinstance(kernel, Clamp) else inside


def hold_the_same(kernel: Any, other: Any) -> bool:
    """Whether two kernels know the same entries of samples: by clamps alike, and by themselves or not."""
    one, two = (optional(each, "held") is None for each in (kernel, other))
    return one == two and all(_alike(*pair) for pair in zip_longest(clamps(kernel), clamps(other)))


def _alike(one: Clamp | None, two: Clamp | None) -> bool:
    if one is None or two is None:
        return False
    pairs = ((one.mask, two.mask), (one.values, two.values))
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def _gaussian(law: Any) -> Gaussian:
    if not isinstance(law, Gaussian):
        raise TypeError(f"known entries need a kernel of Gaussian steps, got {type(law).__name__}")
    return law
