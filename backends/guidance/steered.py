"""Steering by an observation y = A x_0 + noise: the endpoint is pulled towards y, and noisy states are scored by y.

    x̂_0' = x̂_0 + K_t (y - A x̂_0),   K_t = r_t² Aᵀ (r_t² A Aᵀ + tolerance² I)^{-1}
    q(x_s | x_t) = N(α_s x̂_0' + √(σ_s² - s̃²) (x_t - α_t x̂_0')/σ_t, s̃²),   log p/q in the weights
    v(x_t, t) = log N(y; A x̂_0, r_t² A Aᵀ + tolerance² I)

r_t is how far x_0 is from x̂_0(x_t), root mean square of an entry: the law of x_0 given x_t is taken for N(x̂_0, r_t² I),
of which K_t and v are the exact update and evidence. Both matter. The likelihood of the endpoint itself, r_t = 0, is
over-confident wherever x̂_0 is a mean over what may come, and its populations die at the first levels; published
projections, r_t → ∞, pull many standard deviations of a step at once, which no weight survives. `spread` measures r_t
on a pilot of the kernel's own rollouts; without it r_t² = σ_t²/(α_t² + σ_t²), right for states of unit variance.

As a proposal with its weights the target stays p(x_0) N(y; A x_0, tolerance²), whatever r_t: log Z is log p(y).
`rule="paper"` is the published projection, x̂_0' with A x̂_0' = y at every step and no weights: a law of its own.

Sources: Steered Diffusion (Nair et al., 2023), algorithm 1, the projection of the endpoint. Pseudoinverse-Guided
Diffusion Models for Inverse Problems (Song et al., 2023), section 3, r_t and the Gaussian likelihood. Practical and
Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section 3, twists and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Kernel, Spec, Wrapper, describe, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.rewards.base import Reward
from treesearch.rewards.numeric import is_number, is_whole
from treesearch.rewards.observation import Measurement, Operator, check_adjoint
from treesearch.rewards.values import flat

Rule = Literal["calibrated", "paper"]
LARGEST = 4096  # entries of y whose A Aᵀ is taken apart as a matrix


def spread(kernel: Kernel, *, n: int = 64, seed: int = 0, cond: Cond = None) -> tuple[float, ...]:
    """r_t of x_0 about x̂_0(x_t), t = 0..T, from rollouts of the kernel.

    Args:
        kernel: any whose laws have an endpoint; n · T evaluations.
        n: rollouts.
        seed: of their noise.
        cond: conditioning of the n rows, as `encode` gives it.

    Raises:
        ValueError: n is no whole number of two or more.
    """
    if not is_whole(n, 2):
        raise ValueError(f"n is {n!r}, expected two rollouts or more")
    spec, draw = describe(kernel, identify=False), torch.Generator("cpu").manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(n, *spec.noise_shape, generator=draw, device="cpu", dtype=torch.float32).to(spec.device)

    with torch.no_grad():
        x, ends = kernel.prior(noise(), cond), []
        for t in range(spec.num_steps, 0, -1):
            law = kernel.transition(x, torch.full((n,), t, device=spec.device), cond)
            ends.append(law.endpoint)
            x = law.sample(noise())
        return (0.0, *(float((x.double() - end.double()).square().mean().sqrt()) for end in reversed(ends)))


@final
@dataclass(frozen=True)
class Steered(Wrapper):
    """A kernel that is steered by a measurement, and whose noisy states are scored by it.

    Args:
        kernel: on a `treesearch.backends.chains.diffusion.Chain`; its steps must be `Gaussian`.
        reward: `measurement(operator, y, tolerance=...)` of states, with a linear operator.
        spread: r_t, t = 0..T, as `spread(kernel)` measures it; None for states of unit variance.
        rule: "calibrated" proposes with weights; "paper" projects, without.

    Raises:
        TypeError: the kernel has no such chain or is guided, or the reward is no linear measurement of states.
        ValueError: an adjoint that does not belong to the operator, a y of another shape, a spread that is none, or a
            chain without noise, where no proposal can have a weight.
    """

    reward: Reward
    _: KW_ONLY
    spread: tuple[float, ...] | None = None
    rule: Rule = "calibrated"

    def __post_init__(self) -> None:
        spec, name = self._spec, type(self.kernel).__name__
        if not isinstance(optional(self.kernel, "chain"), Chain) or spec.noise_shape != spec.state_shape:
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
        if optional(self.kernel, "scores") is not None:
            raise TypeError(
                f"{name} is guided already: steer the kernel inside, by one observation of all that is seen"
            )
        fn = self.reward.fn if isinstance(self.reward, Reward) else None
        if not (isinstance(fn, Measurement) and isinstance(fn.operator, Operator) and self.reward.input == "state"):
            raise TypeError(
                "steered by something else than a linear measurement of states: measurement(operator, y, tolerance=...)"
            )
        check_adjoint(fn.operator, spec.state_shape)
        fn(torch.zeros(1, *spec.state_shape, dtype=torch.float64, device="cpu"))  # the shape of y
        if self.rule not in ("calibrated", "paper"):
            raise ValueError(f"unknown rule {self.rule!r}: choose calibrated or paper")
        if self.rule == "calibrated" and not all(spec.stochastic[2:]):
            raise ValueError("a chain without noise has no weights to steer with: use eta > 0, or rule='paper'")
        if self.spread is not None:
            object.__setattr__(self, "spread", self._checked(self.spread))

    def _checked(self, spread: Sequence[float]) -> tuple[float, ...]:
        steps, found = self._spec.num_steps, tuple(spread) if isinstance(spread, (tuple, list)) else ()
        if len(found) != steps + 1 or not all(is_number(r, 0) and r < math.inf for r in found):
            got = f"{len(found)} entries" if found else repr(spread)
            raise ValueError(f"spread has {got}, expected a finite number >= 0 for each t in 0..{steps}")
        return tuple(float(r) for r in found)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The steered step.

        Raises:
            TypeError: no Gaussian step.
        """
        law = self.kernel.transition(x, t, cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"steering moves Gaussian steps, got {type(law).__name__} from the kernel")
        variance = self._variances.to(x.device)[t]
        gap = self._gap(law.endpoint)
        pull = self._back(gap, variance).to(law.mean)
        if self.rule == "paper":
            return replace(law, mean=law.mean + self._lever(x, t) * pull, endpoint=law.endpoint + pull)
        move = torch.where(law.std > 0, self._lever(x, t) * pull, 0.0)
        base = law.mean if law.base_mean is None else law.base_mean
        return replace(law, mean=law.mean + move, base_mean=base, rewards=self._evidence(gap, variance))

    @property
    def valued(self) -> bool:
        """Whether its steps carry v."""
        return self.rule == "calibrated"

    @property
    def scores(self) -> Reward:
        """The reward that v is of."""
        return self.reward

    @property
    def proposes_for(self) -> Any:
        """The kernel p that the weights of the steps lead back to."""
        return self.kernel

    @property
    def departs(self) -> str | None:
        """Why its chain is another law than the kernel's."""
        projected = "projection of the endpoint as published: a law of its own, without weights"
        return projected if self.rule == "paper" else optional(self.kernel, "departs")

    def _lever(self, x: Tensor, t: Tensor) -> Tensor:
        """How far the mean moves with x̂_0 while x_t stays."""
        at = self.kernel.chain.at
        return at("alpha_s", t, x) - at("direction", t, x) * at("alpha", t, x) / at("sigma", t, x)

    def _gap(self, endpoint: Tensor) -> Tensor:
        """y - A x̂_0 along the axes of A Aᵀ, (n, M) float64."""
        of = self._measurement
        return self._turned(flat(of.observed.to(endpoint.device) - of.operator(endpoint.double())))

    def _back(self, gap: Tensor, variance: Tensor) -> Tensor:
        """K_t gap, (n, *state) float64: the pull on the endpoint."""
        axes = self._axes.to(gap.device)
        if self.rule == "paper":  # the pseudoinverse
            share = torch.where(axes > 1e-9 * axes.max(), 1 / axes, 0.0)
        else:
            share = variance[:, None] / (variance[:, None] * axes + self._measurement.tolerance**2)
        found = gap * share
        turned = found if self._basis is None else found @ self._basis.to(gap.device).T
        return self._operator.adjoint(turned.reshape(len(gap), *self._measurement.observed.shape))

    def _evidence(self, gap: Tensor, variance: Tensor) -> Tensor:
        """v, (n,) float64."""
        total = variance[:, None] * self._axes.to(gap.device) + self._measurement.tolerance**2
        return -0.5 * (gap**2 / total + total.log() + math.log(2 * math.pi)).sum(1)

    def _turned(self, z: Tensor) -> Tensor:
        return z if self._basis is None else z @ self._basis.to(z.device)

    @property
    def _measurement(self) -> Measurement:
        assert isinstance(self.reward.fn, Measurement)
        return self.reward.fn

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    @cached_property
    def _variances(self) -> Tensor:
        """r_t² (T + 1,) float64."""
        if self.spread is not None:
            return torch.tensor(self.spread, dtype=torch.float64, device="cpu") ** 2
        of = self.kernel.chain.schedule
        return of.sigma**2 / (of.alpha**2 + of.sigma**2)

    @cached_property
    def _taken_apart(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues (M,) of A Aᵀ and its eigenvectors (M, M), None where it is a multiple of I."""
        operator, size = self._operator, self._measurement.observed.numel()
        if operator.gram is not None:
            return torch.full((size,), operator.gram, dtype=torch.float64, device="cpu"), None
        if size > LARGEST:
            raise ValueError(
                f"y has {size} entries, more than {LARGEST}, and A Aᵀ is no multiple of I: give its `gram`"
            )
        shape = (size, *self._measurement.observed.shape)
        eye = torch.eye(size, dtype=torch.float64, device="cpu").reshape(shape)
        axes, basis = torch.linalg.eigh(flat(operator(operator.adjoint(eye))))
        return axes.clamp_min(0), basis

    @property
    def _operator(self) -> Operator:
        assert isinstance(self._measurement.operator, Operator)
        return self._measurement.operator

    @property
    def _axes(self) -> Tensor:
        return self._taken_apart[0]

    @property
    def _basis(self) -> Tensor | None:
        return self._taken_apart[1]

    def _settings(self) -> str:
        return f"{self.reward.name!r} {self.reward.settings}, spread={self.spread}, rule={self.rule}"
