"""Known entries that the model was not trained with: replacement as it is, and replacement that weights correct.

Notation: x_t = α_t x_0 + σ_t ε, s = t - 1; M the entries under the mask, y their values at x_0, s̃ the step's std.

    Clamp       x_s^M ~ N(α_s y, σ_s²), or x_s^M = y_s on a path y_0..y_T    whatever x_t: a law of its own
    Condition   x_T^M ~ q = N(α_T y, σ_T²)
                x_s^M ~ q = N(α_s ŷ + √(σ_s² - s̃²) (x_t^M - α_t ŷ)/σ_t, s̃²)   the forward posterior towards
                ŷ = x̂_0 + k_t (y - x̂_0),  k_t = r_t²/(r_t² + tolerance²),  r_t² = σ_t²/(α_t² + σ_t²)
                log_weight = log p(x_s^M | x_t) - log q(x_s^M | x_t, y)
                at the last step log N(y; x_0^M, tolerance²), x_0 as the chain draws it

Replacement tells the free entries of y only through the network's next call, so its samples are no draws of p given y.
The weights of `Condition` telescope to p(x_T..x_0) N(y; x_0^M, tolerance²) over its proposal, whatever the number of
particles: Feynman-Kac populations and trees over it aim at the law of the discrete chain given x_0^M = y up to the
tolerance, and log Z estimates log p(y). The steps of a chain are Gaussian with independent entries, so free entries
follow p itself. With tolerance → 0 the proposal is plain replacement, ŷ = y; with room to miss y it steps back as soon
as the model knows x_0 better than that, which is what keeps the weights even. k_t takes states of unit variance.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), app. I.2, and RePaint
        (Lugmayr et al., 2022), algorithm 1 without its resampling: replacement.
    Cyclic One-Way Diffusion (Wang et al., 2024), section 3.2: replacement along the path of an inverted seed.
    Diffusion Probabilistic Modeling of Protein Backbones in 3D for the Motif-Scaffolding Problem (Trippe et al., 2023),
        sec. 3.2, SMCDiff: replacement with weights p(x_s^M | x_t); there one noised y serves all particles.
    Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023), sec. 3, r_t² and the shift by k_t.
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), app. A, on both.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Wrapper, describe, expand, log_normal, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.rewards.values import flat


@dataclass(frozen=True, eq=False)
class _Masked(Wrapper):
    """A kernel with known entries, the same for every row.

    Args:
        kernel: a kernel on a `treesearch.backends.chains.diffusion.Chain`, as its attribute `chain`.
        mask: (*state) bool, the known entries.
        values: (*state) what they are at x_0, in units of states; others are not read.

    Raises:
        TypeError: a kernel without such a chain, or with noise of another shape than its states.
        ValueError: shapes that do not fit, no known entry, or a value that is not finite.
    """

    mask: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        spec, name = self._spec, type(self.kernel).__name__
        if not isinstance(optional(self.kernel, "chain"), Chain) or spec.noise_shape != spec.state_shape:
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
        if optional(self.kernel, "offset") is not None:
            raise TypeError(f"{name} has a chain around an offset: what is known cannot be noised as α_t x_0 + σ_t ε")
        if tuple(self.mask.shape) != spec.state_shape:
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}, expected that of a state, {spec.state_shape}")
        if tuple(self.values.shape) not in self._shapes:
            either = ", or a path ".join(str(shape) for shape in self._shapes)
            raise ValueError(f"values has shape {tuple(self.values.shape)}, expected that of a state, {either}")
        if self.mask.dtype != torch.bool or not self.mask.any():
            raise ValueError(f"mask must be bool with a known entry, got {self.mask.dtype}, {int(self.mask.sum())} set")
        if not self.values[..., self.mask].isfinite().all():
            raise ValueError("values must be finite where the mask is set")
        clean = torch.where(self.mask, self.values, 0.0)
        object.__setattr__(self, "values", clean.to(spec.device, spec.dtype))
        object.__setattr__(self, "mask", self.mask.to(spec.device))

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """What values may have."""
        return (self._spec.state_shape,)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _open(self, cond: Cond) -> Tensor:
        """Entries under the mask that the base kernel does not clamp itself, broadcastable to (n, *state)."""
        clamped = None if cond is None else cond.get("mask")
        return self.mask[None] if clamped is None else self.mask & ~clamped

    def _levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t of x_t, t in 0..T, against x."""
        schedule = self.kernel.chain.schedule
        alpha, sigma = (v.to(x.device, x.dtype)[t] for v in (schedule.alpha, schedule.sigma))
        return expand(alpha, x), expand(sigma, x)

    def _noised(self, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._levels(noise, t)
        return alpha * self.values + sigma * noise

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        x = self.kernel.prior(noise, cond)
        top = torch.full((len(x),), self.kernel.num_steps, device=x.device)
        return torch.where(self._open(cond), self._noised(noise.to(x.device, x.dtype), top), x)


@final
@dataclass(frozen=True, eq=False)
class Clamp(_Masked):
    """Replacement: known entries are what they are at every level, whatever the kernel makes of them.

    A kernel with a law of its own, not that of p given the values; `departs` says so. On a path the network sees the
    known entries of each level as the path has them, also after a cycle has noised them (Cyclic One-Way Diffusion).

    Args:
        kernel, mask: as for `Condition`.
        values: (*state) what the entries are at x_0, noised afresh for each level; or (T + 1, *state) what they are at
            each level, as `invert` finds the noisy states of a seed.

    Raises:
        TypeError, ValueError: as for `Condition`.
    """

    departs = "replacement: a law of its own, not the model's given what is known"

    @cached_property
    def stochastic(self) -> Tensor:
        """(T + 1,) bool: entries that are noised afresh are so wherever the level below has noise."""
        base = torch.as_tensor(self._spec.stochastic, device="cpu")
        if self._on_path:
            return base & bool((~self.mask).any())
        below = self.kernel.chain.schedule.sigma[: self._spec.num_steps] > 0
        return base | torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), below])

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        if not self._on_path:
            return super().prior(noise, cond)
        x = self.kernel.prior(noise, cond)
        return torch.where(self._open(cond), self.values[-1], x)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        held = self._open(cond)
        if self._on_path:
            x = torch.where(held, self.values[t], x)
        law = _gaussian(self.kernel.transition(x, t, cond))
        known, noise, end = self._known(x, t - 1)
        mean = torch.where(held, known, law.mean)
        base = None if law.base_mean is None else torch.where(held, mean, law.base_mean)
        endpoint = torch.where(held, end, law.endpoint)
        return replace(law, mean=mean, std=torch.where(held, noise, law.std), endpoint=endpoint, base_mean=base)

    def _known(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of known entries at levels s (n,), and what they are at x_0."""
        if self._on_path:
            return self.values[s], x.new_zeros(()), self.values[0]
        alpha, sigma = self._levels(x, s)
        return alpha * self.values, sigma, self.values

    @property
    def _on_path(self) -> bool:
        return self.values.ndim > self.mask.ndim

    @property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        state = self._spec.state_shape
        return state, (self._spec.num_steps + 1, *state)


@final
@dataclass(frozen=True, eq=False)
class Condition(_Masked):
    """Replacement as a proposal, its steps weighted by log p/q: the chain's own law given the values.

    Args:
        kernel: a kernel on a `treesearch.backends.chains.diffusion.Chain`, as its attribute `chain`.
        mask: (*state) bool, the known entries.
        values: (*state) what they are at x_0, in units of states; others are not read.
        tolerance: standard deviation with which x_0 may miss them, in units of states.

    Raises:
        TypeError: a kernel without such a chain, or with noise of another shape than its states.
        ValueError: shapes that do not fit, no known entry, values that are not finite, a tolerance that is not
            positive, a chain that does not begin at noise, or one without noise before its last step (eta = 0), where
            no proposal can have a weight.
    """

    _: KW_ONLY
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}, expected a positive number")
        if not all(self._spec.stochastic[2:]):
            raise ValueError("a chain without noise has no law to condition: use eta > 0")
        self._refuse_roots()

    def _refuse_roots(self) -> None:
        """The weight of known entries of x_T is against noise alone."""
        noise = torch.ones(1, *self._spec.noise_shape, device=self._spec.device)
        root, std = self.kernel.prior(noise), self.kernel.chain.schedule.prior_std
        known = root.double()[:, self.mask]
        if not torch.allclose(known, torch.full_like(known, std), rtol=1e-5, atol=0.0):
            name = type(self.kernel).__name__
            raise ValueError(f"x_T of {name} is more than noise of std {std:g}, for which the weights of known entries "
                             "take it: use a kernel that begins at noise")  # fmt: skip

    def prior_log_weight(self, x: Tensor, cond: Cond = None) -> Tensor:
        """log p(x_T) - log q(x_T), (n,) float64."""
        top = torch.full((len(x),), self.kernel.num_steps, device=x.device)
        held, (alpha, sigma) = self._open(cond), self._levels(x.double(), top)
        base = x.new_tensor(self.kernel.chain.schedule.prior_std).double()
        log_p = log_normal(x.double()[..., None], x.new_zeros(1).double(), base)
        log_q = log_normal(x.double()[..., None], (alpha * self.values.double())[..., None], sigma)
        weight = flat(torch.where(held, log_p - log_q, 0.0)).sum(1)
        inner = optional(self.kernel, "prior_log_weight")
        return weight if inner is None else weight + inner(x, cond)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Observed:
        law = _gaussian(self.kernel.transition(x, t, cond))
        held, last = self._open(cond).expand(x.shape), expand(t == 1, x)
        mean = torch.where(held & ~last & (law.std > 0), self._pulled(x, t, law), law.mean)
        base = law.mean if law.base_mean is None else law.base_mean
        endpoint = torch.where(held, self.values, law.endpoint)
        known = law.rewards if self._spec.valued else None  # a guide's are of its own endpoints, which were moved
        moved = replace(law, mean=mean, base_mean=base, endpoint=endpoint, rewards=known)
        return Observed(moved, held & last, self.values, self.tolerance)

    def _pulled(self, x: Tensor, t: Tensor, law: Gaussian) -> Tensor:
        """Mean of the step with x̂_0 + k_t (y - x̂_0) in place of x̂_0."""
        chain = self.kernel.chain
        alpha, sigma, alpha_s, direction = (chain.at(name, t, x) for name in ("alpha", "sigma", "alpha_s", "direction"))
        rest = sigma**2 / (alpha**2 + sigma**2)
        pull = rest / (rest + self.tolerance**2)
        return law.mean + (alpha_s - direction * alpha / sigma) * pull * (self.values - law.endpoint)


@final
@dataclass(frozen=True)
class Observed:
    """A Gaussian proposal whose last step is weighted by what x_0 is observed to be.

    Args:
        law: the proposal and its base law.
        seen: (n, *state) bool, the entries of x_0 that are observed in this step.
        values: (*state).
        tolerance: standard deviation of the observation.
    """

    law: Gaussian
    seen: Tensor
    values: Tensor
    tolerance: float

    @property
    def endpoint(self) -> Tensor:
        return self.law.endpoint

    @property
    def mean(self) -> Tensor:
        return self.law.mean

    @property
    def std(self) -> Tensor:
        return self.law.std

    @property
    def rewards(self) -> Tensor | None:
        """Declared values, where the kernel has them."""
        return self.law.rewards

    def sample(self, noise: Tensor) -> Tensor:
        return self.law.sample(noise)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)

    def log_weight(self, x: Tensor) -> Tensor:
        gap = (x.double() - self.values.double()) / self.tolerance
        each = -0.5 * gap**2 - math.log(self.tolerance) - 0.5 * math.log(2 * math.pi)
        return self.law.log_weight(x) + flat(torch.where(self.seen, each, 0.0)).sum(1)

    def take(self, rows: Tensor) -> Observed:
        return Observed(self.law.take(rows), self.seen[rows], self.values, self.tolerance)


def _gaussian(law: Any) -> Gaussian:
    if not isinstance(law, Gaussian):
        raise TypeError(f"known entries need a kernel of Gaussian steps, got {type(law).__name__}")
    return law
