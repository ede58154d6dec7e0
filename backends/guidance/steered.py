"""Steering by observations y = A x_0 + noise: endpoints are pulled towards y, and noisy states are scored by y.

    x̂_0' = x̂_0 + K_t (y - A x̂_0),   K_t = S_t Aᵀ (A S_t Aᵀ + tolerance² I)^{-1}                             A linear
    x̂_0' = x̂_0 + r_t² ∇_{x̂_0} v                                                                             any other A
    q(x_s | x_t) = N(α_s x̂_0' + √(σ_s² - s̃²) (x_t - α_t x̂_0')/σ_t, s̃²),   log p/q in the weights
    v(x_t, t) = log N(y; A x̂_0, A S_t Aᵀ + tolerance² I),   or log N(y; A(x̂_0), (s_t² + tolerance²) I)

S_t is the covariance of x_0 about x̂_0(x_t) (`correlated`), or r_t² I, r_t the root mean square of an entry, s_t that of
A(x_0) about A(x̂_0(x_t)). The law of x_0 given x_t is taken for N(x̂_0, S_t), of which K_t and v are the exact update and
evidence; for S_t = r_t² I and A Aᵀ = g I the first rule is the second, with s_t² = r_t² g. Gradients go through A and
the decoder, never through the network. Both matter. The likelihood of the endpoint itself, S_t = 0, is over-confident
wherever x̂_0 is a mean over what may come, and its populations die at the first levels; published projections,
S_t → ∞, pull many standard deviations of a step at once, which no weight survives. One number a level takes what
neighbours miss together for as many opinions: of smooth states log Z comes out low.

S_t and s_t are measured on a pilot of the kernel's own rollouts (`spread`) unless they are given. Exact: as a proposal
with its weights the target stays p(x_0) exp(r(x_0)), whatever A, S_t and s_t are, and log Z is log p(y). A heuristic:
how far S_t, one matrix a level, and the Gaussian tell the law of x_0 given x_t; the effective sample size says it.

Several observations are a sum of measurements, y + z: linear ones of states are one, and the pulls of others add. What
else is in the sum steers nothing and is scored at the endpoint: v is then the sum with it. `rule="paper"` is the
published projection, x̂_0' with A x̂_0' = y at every step and no weights: a law of its own; its loops are `Cycle`. What
the kernel holds is not projected. Where x̂_0 is clipped, the mean is that of the kernel's own step, whose ε̂ is the
network's, plus what the pull moves in the one above.

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

from treesearch.backends.base import Cond, Gaussian, Measured, Shared, Spec, Wrapper, describe, expand, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance.base import loose
from treesearch.backends.guidance.correlated import Correlated
from treesearch.backends.guidance.prompts import PROMPTS, encoded, unpack
from treesearch.backends.guidance.seen import Terms, ask, measurement_of, terms
from treesearch.backends.guidance.spreads import N, Spread, as_spread, kept, measured, pilot_of
from treesearch.backends.guidance.stacked import Stacked
from treesearch.rewards.base import Reward, refuse_unseen
from treesearch.rewards.numeric import is_whole

Rule = Literal["calibrated", "paper"]
SPREAD = "spread"  # in the conditioning of a search


@final
@dataclass(frozen=True)
class Steered(Wrapper):
    """A kernel that is steered by a measurement, and whose noisy states are scored by it.

    Args:
        kernel: on a `treesearch.backends.chains.diffusion.Chain`; its steps must be `Gaussian`.
        reward: `measurement(operator, y, tolerance=...)`, or a sum of rewards with such terms.
        spread: `spread(kernel, reward)`, or r_t for t = 0..T where all measurements are linear; None measures it.
        pilot: rollouts that a spread is measured on, T evaluations each when it is first needed; no budget pays for
            them, `measured` and `diagnostics["measured"]` tell them.
        correlated: whether that pilot measures how misses go together, for linear measurements of states
            (`backends.guidance.correlated`), or one number a level; None does where they take no more than 256 MB. A
            spread that is given says so itself.
        prompts: that the pilot's rollouts take in turn; kernels that run without any need none.
        rule: "calibrated" proposes with weights; "paper" projects, without.

    Raises:
        TypeError: the kernel has no such chain or is guided, or no term of the reward is a measurement.
        ValueError: an adjoint that does not belong to the operator, a y of another shape or out of range, a spread or a
            pilot that is none, or a chain without noise, where no proposal can have a weight.
    """

    reward: Reward
    _: KW_ONLY
    spread: Spread | Sequence[float] | None = None
    pilot: int = N
    correlated: bool | None = None
    prompts: Sequence[Any] = ()
    rule: Rule = "calibrated"

    def __post_init__(self) -> None:
        spec, name = self._spec, type(self.kernel).__name__
        if not isinstance(optional(self.kernel, "chain"), Chain) or spec.noise_shape != spec.state_shape:
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain: its noise levels are unknown")
        if optional(self.kernel, "scores") is not None:
            raise TypeError(f"{name} is guided already: steer the kernel inside, by the sum of all that is seen")
        if not isinstance(self.reward, Reward) or not (self._terms.linear or self._terms.bent):
            raise TypeError("steered by something else than a measurement, or a sum with one: measurement(operator, y, "
                            "tolerance=...)")  # fmt: skip
        if self.rule not in ("calibrated", "paper"):
            raise ValueError(f"unknown rule {self.rule!r}: choose calibrated or paper")
        if self.rule == "paper" and self._terms.bent:
            raise TypeError("the published projection is of linear measurements of states: use rule='calibrated'")
        noisy = zip(spec.stochastic, self.kernel.chain.stochastic.tolist(), strict=True)  # held entries may be
        if self.rule == "calibrated" and not all(a and b for a, b in list(noisy)[2:]):
            raise ValueError("a chain without noise has no weights to steer with: use eta > 0, or rule='paper'")
        self._refuse_seen()
        if not is_whole(self.pilot, 2):
            raise ValueError(f"pilot is {self.pilot!r}, expected two rollouts or more")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.spread is not None:
            object.__setattr__(self, "spread", as_spread(self.spread, spec, len(self._terms.bent)))
            if self.correlated and self._own.misses is None:
                raise ValueError("correlated with a spread that keeps no misses: give spread(kernel, correlated=True)")

    def _refuse_seen(self) -> None:
        """Look at every y once."""
        state = torch.zeros(1, *self._spec.state_shape, dtype=self._spec.dtype, device=self._spec.device)
        refuse_unseen(self.reward, self._spec.sample_range)
        limit: float = self.kernel.chain.clip_sample or math.inf
        for part in self._stacked.parts if self._stacked and limit < math.inf else ():
            part.refuse_range("states", -limit, limit)
        for part in self._terms.bent:
            if part.input == "state":
                measurement_of(part)(state)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The steered step.

        Raises:
            TypeError: no Gaussian step, or no gradient to what is seen.
            ValueError: a gradient that is not finite.
        """
        inner, prompts, spread = self._opened(cond)
        law = self.kernel.transition(x, t, inner)
        if not isinstance(law, Gaussian):
            raise TypeError(f"steering moves Gaussian steps, got {type(law).__name__} from the kernel")
        if self.rule == "paper":
            assert self._stacked is not None
            pull = loose(self.kernel, self._stacked.projection(self._stacked.gap(law.endpoint)).to(law.mean), inner)
            mean = (law.mean + self._lever(x, t) * pull).to(law.mean)
            return replace(law, mean=mean, endpoint=law.endpoint + pull, base_mean=None)
        value, pull = self._evaluate(law.endpoint, t, spread or self._own, prompts)
        pull = loose(self.kernel, pull.to(law.mean), inner)
        move = torch.where(law.std > 0, self._lever(x, t) * pull, 0.0)
        base = law.mean if law.base_mean is None else law.base_mean
        return replace(law, mean=(law.mean + move).to(law.mean), base_mean=base, rewards=value)

    def _evaluate(
        self, endpoint: Tensor, t: Tensor, spread: Spread, prompts: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """v (n,) float64, and the pull on endpoints (n, *state)."""
        table = torch.tensor([spread.state, *spread.seen], dtype=torch.float64, device="cpu")
        state, *seen = table.square().to(endpoint.device)[:, t]
        pull, value = torch.zeros_like(endpoint), torch.zeros_like(state)
        if self._stacked is not None:
            gap = self._stacked.gap(endpoint)
            if spread.misses is None:
                pull, value = self._stacked.pull(gap, state), self._stacked.value(gap, state)
            else:
                value, pull = self._correlated(spread.misses)(gap, t)
        if self._terms.bent or self._terms.rest:
            more, gradient = ask(self.kernel, self._terms, endpoint, torch.stack(seen) if seen else state, prompts)
            pull, value = pull + expand(state, gradient) * gradient, value + more
        return value, pull

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the kernel makes of the prompts, and the prompts themselves where a term of the reward reads them."""
        found = encoded(self.kernel, prompts)
        return found if self.reward.prompted else {k: v for k, v in found.items() if k != PROMPTS}

    @property
    def measured(self) -> Measured | None:
        """The spread that it measured."""
        if self.rule == "paper" or self.spread is not None:
            return None
        return Measured({SPREAD: Shared(self._own)}, self._own.nfe)

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

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t: one where endpoints are shown to more than linear operators."""
        shown = self.rule == "calibrated" and bool(self._terms.bent or self._terms.rest)
        return (0, *(int(shown) for _ in range(self._spec.num_steps)))

    def _opened(self, cond: Cond) -> tuple[Cond, list[Any] | None, Spread | None]:
        """Conditioning of the kernel, the prompts of the rows, and the spread that a search hands out."""
        inner, prompts = unpack(cond)
        if inner is None or SPREAD not in inner:
            return inner, prompts, None
        return {k: v for k, v in inner.items() if k != SPREAD}, prompts, inner[SPREAD]

    def _lever(self, x: Tensor, t: Tensor) -> Tensor:
        """How far the mean moves with x̂_0 while x_t stays."""
        at = self.kernel.chain.at
        return at("alpha_s", t, x) - at("direction", t, x) * at("alpha", t, x) / at("sigma", t, x)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    @cached_property
    def _terms(self) -> Terms:
        return terms(self.reward)

    @cached_property
    def _stacked(self) -> Stacked | None:
        """Its linear measurements as one."""
        return Stacked(self._terms.linear, self._spec.state_shape) if self._terms.linear else None

    @cached_property
    def _own(self) -> Spread:
        """The spread that was given, or that is measured now."""
        if isinstance(self.spread, Spread):
            return self.spread
        return measured(self.kernel, self._terms.bent, self.pilot, 0, tuple(self.prompts), self._together)

    @property
    def _together(self) -> bool:
        """Whether its pilot keeps what it missed."""
        return self._stacked is not None and kept(self.correlated, self.pilot, self._spec)

    def _correlated(self, misses: Tensor) -> Correlated:
        """What correlated misses say of its linear measurements, kept for those of the last call."""
        assert self._stacked is not None
        held, known = self.__dict__.get("_held", (None, None))
        if held is not misses or known is None:
            known = Correlated(self._stacked, misses)
            self.__dict__["_held"] = misses, known
        return known

    def _settings(self) -> str:
        pilot = pilot_of(self.pilot, 0, self.prompts, self._together)
        of = self.spread.source if isinstance(self.spread, Spread) else pilot
        return f"{self.reward.name!r} {self.reward.settings}, {self.rule}" + f", {of}" * (self.rule == "calibrated")
