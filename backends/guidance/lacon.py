"""LaCon: a condition of x_0 that is read off the features of the denoising network, as a value and as a guide.

    c(x_0) | x_t ~ N(A(F(x_t), t), C_t)                                      `backends.models.aligner`
    v(x_t, t) = log N(y; A(F(x_t), t), C_t + tolerance² I)                   for r = log N(y; c(x_0), tolerance² I)
    g = -∇_{x_t} v,   ε̂ <- ε̂ + s |ε̂ - x_t| / |g| · g                         per row, ε̂ = (x_t - α_t x̂_0)/σ_t

The features are those of the very call that makes the step: v costs neither an evaluation nor a gradient, and it is
calibrated, since C_t is the measured error of A. g needs one backward pass through the network. In the paper the loss
is |y - A|², which is v where the tolerance is large against C_t; its released code takes both norms over the batch,
where a row's step depends on its neighbours. It guides early levels, t > trunc: window=(trunc + 1, T).

    Valued(Aligned(kernel, aligner), r, Likelihood(aligner, r))              the value alone, p untouched
    LaCon(Aligned(kernel, aligner), r)                                       the value, and the published guide
    TDS(Aligned(kernel, aligner), r, value=Likelihood(aligner, r))           the value, and steps of its own scale

On a chain with noise (η > 0) the guide is a proposal whose steps carry log p/q and the target p(x_0) exp(r(x_0)) stays;
|Δmean| does not shrink with the noise of a step, so that weights spread where s is not small: see `max_shift`. On the
chain of the paper, η = 0, there are no weights and the result is a law of its own: it departs.

Source: LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis (Liu et al., 2023), sections 3.2 and 3.3;
s = 2 and trunc = T/2 for edges in the released code, 50 steps of DDIM. The Gaussian value is ours.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Transition, Wrapper, describe, expand, fingerprint, optional
from treesearch.backends.base.capture import captured, parts
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance.gradient import GradientGuided, Step
from treesearch.backends.guidance.valued import Valued
from treesearch.backends.models.aligner import Aligner, load_aligner, time_of
from treesearch.rewards import files
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.numeric import is_number
from treesearch.rewards.observation import Measurement, in_channels, measurement
from treesearch.rewards.outlines import outline
from treesearch.rewards.values import flat


@dataclass(frozen=True)
class Seen(Gaussian):
    """A Gaussian step that remembers what the aligner saw at the state that it leaves.

    Args:
        seen: A(F(x_t), t), (n, C, H, W).
        times: u of the levels (n,).
    """

    seen: Tensor | None = None
    times: Tensor | None = None

    def take(self, rows: Tensor) -> Seen:
        kept = super().take(rows)
        seen, times = (None if of is None else of[rows] for of in (self.seen, self.times))
        return Seen(kept.mean, kept.std, kept.endpoint, kept.base_mean, kept.rewards, seen, times)


@final
@dataclass(frozen=True)
class Aligned(Wrapper):
    """A kernel whose steps carry what an aligner reads off its network's features; its law is untouched.

    Args:
        kernel: on a `Chain`, with one `network` that a step calls once with a row for each state.
        aligner: for that network; it is moved to the kernel's device.

    Raises:
        TypeError: a kernel without a network or a chain, or no aligner.
        ValueError: a network without the parts that the aligner reads.
    """

    aligner: Aligner

    def __post_init__(self) -> None:
        name, network = type(self.kernel).__name__, optional(self.kernel, "network")
        if not isinstance(self.aligner, Aligner):
            raise TypeError(f"aligner is {type(self.aligner).__name__}, expected an Aligner: load_aligner(file)")
        if network is None or not isinstance(optional(self.kernel, "chain"), Chain):
            raise TypeError(f"{name} has no `network` and `chain`: its features and times are unknown")
        parts(network, self.aligner.plan.parts)
        self.aligner.to(describe(self.kernel, identify=False).device)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The kernel's step, with A(F(x_t), t).

        Raises:
            TypeError: no Gaussian step.
            ValueError: features of other rows than those of the call, or of other channels than the aligner's.
        """
        names = self.aligner.plan.parts
        with captured(self.kernel.network, names) as found:
            law = self.kernel.transition(x, t, cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"aligners go with Gaussian steps, got {type(law).__name__} from the kernel")
        features = [found[name] for name in names if name in found]
        self._check(features, len(x))
        times = time_of(*(flat(self.kernel.chain.at(name, t, x))[:, 0] for name in ("alpha", "sigma")))
        seen = self.aligner(features, times)
        return Seen(law.mean, law.std, law.endpoint, law.base_mean, law.rewards, seen, times)

    def _check(self, features: list[Tensor], n: int) -> None:
        plan, got = self.aligner.plan, [tuple(f.shape[:2]) for f in features]
        if got != (want := [(n, channels) for channels in plan.channels]):
            raise ValueError(
                f"the parts {', '.join(plan.parts)} put out (rows, channels) {got}, expected {want}: an aligner reads "
                "a network of its own kind that is called once, with a row for each state"
            )

    def _settings(self) -> str | None:
        return fingerprint.of(self.aligner)


@final
@dataclass(frozen=True)
class Likelihood:
    """v(x_t, t), a value of an `Aligned` kernel's states for a measurement of what the aligner predicts.

    Args:
        aligner: that of the kernel.
        reward: `measurement(edges(2), y, tolerance=...)`, of the aligner's condition.

    Raises:
        TypeError: the reward is no measurement.
        ValueError: a measurement of something else, or a y of another shape.
    """

    aligner: Aligner
    reward: Reward

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))
        of, plan = self.reward.fn, self.aligner.plan
        if not isinstance(of, Measurement):
            raise TypeError(f"{self.reward.name!r} is no measurement: measurement({plan.condition}, y, tolerance=...)")
        if (name := getattr(of.operator, "name", None)) != plan.condition:
            raise ValueError(f"the reward measures {name}, the aligner predicts {plan.condition}: they must be one")
        if tuple(of.observed.shape) != plan.shape:
            raise ValueError(f"observed has shape {tuple(of.observed.shape)}, expected {plan.shape}, the aligner's")

    def __call__(self, x: Tensor, t: Tensor, law: Any, cond: Cond) -> Tensor:
        if not isinstance(law, Seen) or law.seen is None or law.times is None:
            raise TypeError(f"this value reads laws of an Aligned kernel, got {type(law).__name__}: put it around one")
        of, aligner = self._measurement, self.aligner
        gap = flat(of.observed.to(law.seen.device) - law.seen.double()) @ aligner.basis.double()
        total = aligner.spread(law.times) + of.tolerance**2
        return -0.5 * (gap**2 / total + total.log() + math.log(2 * math.pi)).sum(1)

    @property
    def _measurement(self) -> Measurement:
        assert isinstance(self.reward.fn, Measurement)
        return self.reward.fn


@final
@dataclass(frozen=True)
class LaCon(GradientGuided):
    """The published guide, with its value.

    Args:
        kernel: an `Aligned` one.
        reward: a measurement of the aligner's condition.
        scale: s >= 0; 0 is the base kernel, with the value.
        window, max_shift: as in `GradientGuided`; without noise there is no max_shift.

    Raises:
        TypeError: another kernel, or no measurement.
        ValueError: a setting out of range.
    """

    _: KW_ONLY
    scale: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Aligned):
            raise TypeError(f"kernel is {type(self.kernel).__name__}, expected Aligned(kernel, aligner)")
        if self.value is None:
            object.__setattr__(self, "value", Likelihood(self.kernel.aligner, self.reward))
        super().__post_init__()
        if not (is_number(self.scale, 0) and self.scale < math.inf):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        if not self.through_network:
            raise ValueError("through_network is False: features are inside of the network; Valued has no gradient")
        if self._still and self.max_shift is not None:
            raise ValueError("max_shift is in units of a step's noise, and this chain has none: leave it out")

    def shift(self, step: Step) -> Tensor:
        at, x, end = self.kernel.chain.at, step.x, step.law.endpoint
        alpha, sigma, alpha_s, direction = (at(k, step.t, x) for k in ("alpha", "sigma", "alpha_s", "direction"))
        eps, steepness = (x - alpha * end) / sigma, expand(_norm(step.gradient), x)
        unit = torch.where(steepness > 0, step.gradient / steepness, 0.0)
        return (alpha_s * sigma / alpha - direction) * self.scale * expand(_norm(eps - x), x) * unit

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The guided step, see `GradientGuided`; without noise it has no weights."""
        law = super().transition(x, t, cond)
        return replace(law, base_mean=None) if self._still and isinstance(law, Gaussian) else law

    def _move(self, step: Step) -> Tensor:
        return self._loose(step) if self._still else super()._move(step)

    @property
    def departs(self) -> str | None:
        """Why its chain is another law than the kernel's."""
        published = "LaCon on a chain without noise, as published: its moves have no weights"
        return published if self._still and self.scale > 0 else optional(self.kernel, "departs")

    @cached_property
    def _levels(self) -> Tensor:
        """Whether x_t is guided, (T + 1,): in the window, where a step has noise, or everywhere if none has any."""
        low, high = self.window or (1, self._spec.num_steps)
        known = [float(a) > 0 for a in flat(self.kernel.chain.alpha)[:, 0]]  # pure noise has no ε̂ to move
        ways = enumerate(zip(self._spec.stochastic, known, strict=True))
        guided = [low <= t <= high and k and (noisy or self._still) and self.scale > 0 for t, (noisy, k) in ways]
        return torch.tensor(guided, device="cpu")


def lacon(
    kernel: Any,
    weights: str | Path,
    picture: str | Path | Tensor,
    *,
    tolerance: float = 0.2,
    scale: float = 0.0,
    window: tuple[int, int] | None = None,
    max_shift: float | None = None,
) -> LaCon | Valued:
    """A kernel whose samples are to look like a picture as far as an aligner's condition tells.

    Args:
        kernel: the kernel, of images.
        weights: an aligner's file, shipped by that name or a path.
        picture: an image file of the samples' size, 8-bit, or a tensor (C, h, w) in [0, 1]; y is its condition.
        tolerance: of y, in units of the condition.
        scale: s of the guide; 0 for the value alone, which needs no backward pass.
        window, max_shift: of the guide.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: a setting out of range, or a picture that cannot be read, of another size or not in [0, 1].
    """
    aligner = load_aligner(weights)
    condition = outline(aligner.plan.condition)
    image = _checked(picture) if isinstance(picture, Tensor) else _read(picture, aligner.plan.shape[0])
    reward = measurement(condition, condition(image[None])[0], tolerance=tolerance, of="sample")
    aligned = Aligned(kernel, aligner)
    if scale == 0:
        return Valued(aligned, reward, Likelihood(aligner, reward))
    return LaCon(aligned, reward, scale=scale, window=window, max_shift=max_shift)


def _read(path: files.File, channels: int) -> Tensor:
    """An image file as (C, h, w) in [0, 1]."""
    image = files.picture(path).float()
    return in_channels(image, (channels, *image.shape[1:]))


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3 or not image.is_floating_point() or not ((image >= 0) & (image <= 1)).all():
        got = f"{tuple(image.shape)} of {image.dtype}, {float(image.min()):g} to {float(image.max()):g}"
        raise ValueError(f"picture is {got}, expected (C, h, w) of real numbers in [0, 1]: bytes are 255 times that")
    return image


def _norm(x: Tensor) -> Tensor:
    """Of each row, (n,) in the precision of x, added up in float64."""
    return flat(x.double()).norm(dim=1).to(x.dtype)
