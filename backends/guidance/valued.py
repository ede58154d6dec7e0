"""Declared values: what a noisy state is worth, in place of the reward of its endpoint.

    v(x_t, t) ≈ V_t(x_t) = (1/λ) log E[exp(λ r(x_0)) | x_t],   in units of r

r(x̂_0(x_t)) is over-confident where x̂_0 averages over what may still come, and where λ r is steep nearly all particles
die of it. Whoever knows better (a closed form, a head that was trained on noisy states, a critic) declares v, and
every method that scores states above t = 0 takes it as it stands. At t = 0 there is the reward and nothing else: v
decides where a search looks, never its target, so that Z, weights and claims are those without it.

    Valued(kernel, r, v)        scores held states by v; q = p, no gradient is needed
    TDS(kernel, r, value=v)     the same, and steps lean along ∇v     (likewise DAS, DPS, TrustRegion)

v is a function, or experts by the name of their file: see `backends.guidance.experts`.

With v = V_t, draws of p and difference potentials a step's weight has mean exactly 1 whatever x_t is; where steps draw
from p exp(λ V_s) as well it is 1.

Sources: potentials as soft values, A General Framework for Inference-time Scaling and Steering of Diffusion Models
(Singhal et al., 2025), section 3. The optimal twist: The Iterated Auxiliary Particle Filter (Guarniero, Johansen and
Lee, 2017), proposition 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Spec, Transition, Wrapper, describe, fingerprint, optional
from treesearch.backends.guidance.experts import ExpertValue, as_value
from treesearch.backends.guidance.prompts import PROMPTS, encoded, unpack
from treesearch.rewards.base import Reward, as_reward

Value = Callable[[Tensor, Tensor, Any, Cond], Tensor]
"""v(x_t (n, *state), t (n,), law, cond) -> (n,), in units of r; -inf says nothing of a state.

`law` is that of the step from x_t, with the endpoint that the network predicts: a value of x̂_0 asks no network again.
`cond` is what the kernel gets; prompts of the rows are in it as cond["guide_prompts"], a list of n, where there are
any. A guide needs a value with a graph to x_t, of the law or of x_t itself. Rows know nothing of each other.

A value that calls the reward, or one as dear, says how often in an evaluation by its attribute `rewards_per_nfe` (0
where it has none), so that the cost is told.
"""


def check_value(value: Any) -> None:
    """See that it is a value.

    Raises:
        TypeError: a reward, which is of samples, or nothing to call.
    """
    if isinstance(value, (Reward, type)) or not callable(value):
        name = f"the reward {value.name!r}" if isinstance(value, Reward) else repr(value)
        raise TypeError(f"value is {name}, expected a function value(x_t, t, law, cond) of n states -> n numbers")


def ask(value: Value, x: Tensor, t: Tensor, law: Any, cond: Cond, prompts: Sequence[Any] | None) -> Tensor:
    """v of states x_t (n, *state), (n,) float64, with its graph; `prompts` are those of the rows.

    Raises:
        TypeError, ValueError: no tensor of n real numbers, NaN or +inf.
    """
    found = value(x, t, law, cond if prompts is None else (cond or {}) | {PROMPTS: list(prompts)})
    if not isinstance(found, Tensor):
        raise TypeError(f"the value returned {type(found).__name__}, expected a tensor of {len(x)} numbers")
    if tuple(found.shape) != (len(x),) or found.is_complex():
        raise ValueError(
            f"the value returned {found.dtype} of shape {tuple(found.shape)}, expected real numbers ({len(x)},)"
        )
    bad = found.detach().isnan() | (found.detach() == math.inf)
    if bad.any():
        levels = sorted(set(t[bad.to(t.device)].tolist()))
        raise ValueError(
            f"the value is NaN or +inf in {int(bad.sum())} of {len(x)} rows, at t = {levels}: return finite numbers, "
            "or -inf where it has nothing to say"
        )
    return found.double()


def identity(value: Value) -> str | None:
    """What tells a value from others, the same in every process; None if that cannot be told."""
    return value.fingerprint if isinstance(value, ExpertValue) else fingerprint.of(value)


def calls(value: Value, spec: Spec) -> tuple[int, ...]:
    """Reward calls of a value by level, (T + 1,); x_0 has the reward itself."""
    each = int(optional(value, "rewards_per_nfe", 0))
    return (0, *(each for _ in range(spec.num_steps)))


@final
@dataclass(frozen=True)
class Valued(Wrapper):
    """A kernel whose held states are scored by a declared value; its law is untouched.

    Around a guided kernel it replaces what the guide knows of `reward`; a guide by another reward stays one.

    Args:
        kernel: the kernel; the search of it must be for `reward`.
        reward: what the value is of.
        value: see `Value`; or experts, in a file by its name, which are bound to the kernel and the reward.

    Raises:
        TypeError: no reward, no value, or the kernel declares values already.
        FileNotFoundError, ValueError: no file of experts, or experts of another kernel or reward.
    """

    reward: Reward
    value: Any

    valued = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))
        object.__setattr__(self, "value", as_value(self.value, self.kernel, self.reward))
        check_value(self.value)
        if optional(self.kernel, "valued", False):
            raise TypeError(f"{type(self.kernel).__name__} declares values already: one value a kernel")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The kernel's own step, with v of the states that it leaves.

        Raises:
            TypeError, ValueError: the value returned something else than n numbers.
        """
        inner, prompts = unpack(cond)
        guided = optional(self.kernel, "scores") is not None  # then the prompts are for its guide too
        law = self.kernel.transition(x, t, cond if guided else inner)
        values = ask(self.value, x, t, law, inner, prompts).detach().to(x.device)
        return replace(law, rewards=values) if isinstance(law, Gaussian) else Scored(law, values)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What the kernel makes of the prompts, and the prompts themselves for the value."""
        return encoded(self.kernel, prompts)

    @property
    def scores(self) -> Reward:
        """The reward that the values are of."""
        return self.reward

    @property
    def proposes_for(self) -> Any:
        """The kernel p that the weights of the steps lead back to."""
        return optional(self.kernel, "proposes_for", self.kernel)

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t: the value's, and those of a guide inside."""
        own = calls(self.value, self._spec)
        return tuple(a + b for a, b in zip(self._spec.rewards_per_nfe, own, strict=True))

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _settings(self) -> str | None:
        told = identity(self.value)
        return None if told is None else f"{self.reward.name!r} {self.reward.settings}, value={told}"


@final
@dataclass(frozen=True)
class Scored:
    """A law of any kind with the values of the states that it leaves.

    Args:
        law: as it is.
        rewards: v (n,) float64.
    """

    law: Transition
    rewards: Tensor

    @property
    def endpoint(self) -> Tensor:
        return self.law.endpoint

    def sample(self, noise: Tensor) -> Tensor:
        return self.law.sample(noise)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)

    def log_weight(self, x: Tensor) -> Tensor:
        return self.law.log_weight(x)

    def take(self, rows: Tensor) -> Scored:
        return Scored(self.law.take(rows), self.rewards[rows])
