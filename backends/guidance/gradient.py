"""What gradient guides share: the gradient of r(x̂_0(x_t)) or of a declared value, and a Gaussian step that it moves.

    g = ∇_{x_t} r(decode(x̂_0(x_t)))                                  or preview, where the kernel has one
    g = ∇_{x_t} v(x_t, t)                                            where a value is declared
    q(x_s | x_t) = N(mean + shift(g), std²),   log p/q = -Σ(zδ + δ²/2),   δ = shift / std

Every method weighs its samples by Σ log p/q, so whatever the shift (its rule, window, limit) the target p(x_0)
exp(λ r(x_0)) stays. What the shift decides is the spread of those weights: KL(q | p) of a step is |δ|²/2, and where
Σ|δ|² is large against the logarithm of the number of samples, a few samples carry all of the weight. Then an
uncorrected guide looks better than a corrected one; `diagnostics["ess"]` tells. A step without noise (std = 0) cannot
move: its q would have no density against p.

Notation: x_t the state, s = t - 1, x̂_0 the endpoint, λ = `lam`, z the noise of the step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Gaussian, Transition, expand
from treesearch.backends.guidance.base import RewardGuided, attached, gradient_of, held_by
from treesearch.backends.guidance.experts import as_value
from treesearch.backends.guidance.prompts import unpack
from treesearch.backends.guidance.valued import ask, calls, check_value, identity
from treesearch.rewards.numeric import is_number, is_whole
from treesearch.rewards.values import flat


class Step(NamedTuple):
    """What is known of the k rows of a call that are guided."""

    x: Tensor  # x_t (k, *state)
    t: Tensor  # (k,)
    law: Gaussian  # the base step, whose std broadcasts against x; no graph
    gradient: Tensor  # g (k, *state)
    rewards: Tensor  # r(x̂_0(x_t)) or v(x_t, t), (k,) float64
    prompts: Sequence[Any] | None = None  # of the rows
    held: Tensor | None = None  # (k, *state) bool, entries that the kernel holds; None where it holds none


@dataclass(frozen=True)
class GradientGuided(RewardGuided):
    """A kernel whose Gaussian steps are moved along the gradient of a reward, or of a value that is declared of it.

    A guided evaluation costs a reward call, a decode (unless the reward reads states) and, through the network, a
    backward pass. The transition carries the rewards of its endpoints: a search for an equal reward does not compute
    them again. With a value it carries that of every state, guided or not, and calls no reward but what the value does.

    Args:
        kernel: the base kernel p; its steps must be `Gaussian`.
        reward: differentiable unless there is a value, higher is better. The search must be for this reward, equal by
            its expression or the same object, to use what the guide knows.
        window: (low, high), the levels t that are guided; None for all.
        max_shift: limit of |shift / std| over a state, so that KL(q | p) of a step is at most max_shift²/2. Noise
            itself has norm √d. None for no limit.
        through_network: False takes ∇_{x̂_0} r in place of ∇_{x_t} r, as if ∂x̂_0/∂x_t were the identity: no backward
            pass through the network, and too long a step at high noise, where the endpoint hardly follows x_t. The
            gradient of a value of x_t alone is the same either way, and cheaper so.
        value: v(x_t, t), to lean along and to score states above t = 0 by, in place of r(x̂_0(x_t)); or a file of
            experts by its name; see `backends.guidance.valued`.

    Raises:
        TypeError: the kernel is guided by a gradient already, or what is no value.
        FileNotFoundError: no file of experts.
        ValueError: a setting out of range, or experts of another kernel or reward.
    """

    _: KW_ONLY
    window: tuple[int, int] | None = None
    max_shift: float | None = None
    through_network: bool = True
    value: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is not None:
            object.__setattr__(self, "value", as_value(self.value, self.kernel, self.reward))
            check_value(self.value)
        steps = self._spec.num_steps
        if self.window is not None:
            ends = self.window if isinstance(self.window, (tuple, list)) and len(self.window) == 2 else (0, 0)
            if not (all(is_whole(t, 1, steps) for t in ends) and ends[0] <= ends[1]):
                raise ValueError(f"window is {self.window!r}, expected levels 1 <= low <= high <= {steps}")
        if self.max_shift is not None and not (is_number(self.max_shift) and self.max_shift > 0):
            raise ValueError(f"max_shift is {self.max_shift!r}, expected a positive number, or None for no limit")

    @abstractmethod
    def shift(self, step: Step) -> Tensor:
        """How far the mean moves in the guided rows (k, *state)."""

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The base step, moved in the rows that are guided.

        Raises:
            TypeError: no Gaussian step, or something between x_t and the reward that has no gradient.
            ValueError: the gradient is not finite, or a value is NaN.
        """
        inner, prompts = unpack(cond)
        rows = self._levels.to(t.device)[t].nonzero().flatten()
        if not len(rows) and self.value is None:
            return self.kernel.transition(x, t, inner)
        law, known, gradient = self._evaluate(x, t, inner, rows, prompts)
        base = law.mean if law.base_mean is None else law.base_mean.detach()
        mean, at = law.mean.clone(), law if len(rows) == len(x) else law.take(rows)
        asked = None if prompts is None else [prompts[i] for i in rows.tolist()]
        held = held_by(self.kernel, x, inner)
        held = None if held is None else held[rows]
        mean[rows] += self._move(Step(x[rows], t[rows], at, gradient, known[rows], asked, held)).to(mean.dtype)
        return replace(law, mean=mean, base_mean=base, rewards=known)

    def _evaluate(
        self, x: Tensor, t: Tensor, cond: Cond, rows: Tensor, prompts: Sequence[Any] | None
    ) -> tuple[Gaussian, Tensor, Tensor]:
        """The base step without its graph; r or v (n,), NaN where it is not known; its gradient in the given rows."""
        through = self.through_network and len(rows) > 0
        with torch.set_grad_enabled(through):
            leaf = x.detach().requires_grad_(through)
            law = self.kernel.transition(leaf, t, cond)
        if not isinstance(law, Gaussian):
            raise TypeError(f"gradients guide Gaussian steps, got {type(law).__name__} from the kernel")
        with torch.set_grad_enabled(len(rows) > 0):
            of = self._of_endpoint if self.value is None else self._of_value
            known, gradient = of(law, leaf, t, cond, rows, prompts)
        gradient = self._checked(gradient, known[rows], t[rows])
        held = {f.name: v.detach() for f in fields(law) if isinstance(v := getattr(law, f.name), Tensor)}
        return replace(law, **held), known, gradient

    def _of_endpoint(
        self, law: Gaussian, leaf: Tensor, t: Tensor, cond: Cond, rows: Tensor, prompts: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """r of the endpoints in the given rows, and its gradient."""
        endpoint = law.endpoint[rows]
        if not self.through_network:
            endpoint = leaf = endpoint.detach().requires_grad_()
        attached(endpoint, "kernel.transition keeps no graph: use through_network=False or another kernel")
        asked = None if prompts is None else [prompts[i] for i in rows.tolist()]
        rewards, gradient = self._differentiate(endpoint, leaf, asked)
        known = torch.full((len(t),), torch.nan, dtype=torch.float64, device=leaf.device)
        known[rows] = rewards
        return known, gradient[rows] if self.through_network else gradient

    def _of_value(
        self, law: Gaussian, leaf: Tensor, t: Tensor, cond: Cond, rows: Tensor, prompts: Sequence[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """v of every row, and its gradient in the given ones."""
        assert self.value is not None
        if not self.through_network:
            leaf = leaf.detach().requires_grad_(len(rows) > 0)
            law = replace(law, endpoint=law.endpoint.detach() + (leaf - leaf.detach()))
        values = ask(self.value, leaf, t, law, cond, prompts)
        if len(rows):
            attached(values, "the value keeps no graph: score by it without a guide, Valued(kernel, reward, value)")
            gradient = gradient_of(values[rows], leaf, self._objective)[rows]
        else:
            gradient = leaf.detach()[:0]
        return values.detach().to(leaf.device), gradient

    def _move(self, step: Step) -> Tensor:
        std = step.law.std
        move = torch.where(std > 0, self._loose(step), 0.0)
        if self.limit is None:
            return move
        size = flat(torch.where(std > 0, move.double() / std.double(), 0.0)).norm(dim=1)
        return move * expand((self.limit / size).clamp(max=1.0), move)

    def _loose(self, step: Step) -> Tensor:
        """The shift, 0 for what is held."""
        shift = self.shift(step)
        return shift if step.held is None else torch.where(step.held, 0.0, shift)

    def _refuse_still(self) -> None:
        """Refuse a chain without noise below its prior: there is no step that could move and be weighed.

        Raises:
            ValueError: such a chain.
        """
        if self._still:
            raise ValueError("a chain without noise has no weights to guide with, and no step moves: use eta > 0")

    @property
    def limit(self) -> float | None:
        """Limit of |shift / std| over a state."""
        return self.max_shift

    @cached_property
    def _levels(self) -> Tensor:
        """Whether x_t is guided, (T + 1,): a noisy step within the window."""
        low, high = self.window or (1, self._spec.num_steps)
        return torch.tensor([low <= t <= high and noisy for t, noisy in enumerate(self._spec.stochastic)], device="cpu")

    @property
    def valued(self) -> bool:
        """Whether what it knows of states are declared values."""
        return self.value is not None

    @property
    def rewards_per_nfe(self) -> tuple[int, ...]:
        """Reward calls of an evaluation at each t."""
        return tuple(self._levels.int().tolist()) if self.value is None else calls(self.value, self._spec)

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        """Backward passes through the network of an evaluation at each t."""
        return tuple(
            n + self.through_network * guided
            for n, guided in zip(self._spec.backward_per_nfe, self._levels.int().tolist(), strict=True)
        )

    @property
    def _objective(self) -> str:
        return super()._objective if self.value is None else f"the value of {self.reward.name!r}"

    def _settings(self) -> str | None:
        told, value = super()._settings(), None if self.value is None else identity(self.value)
        if self.value is None:
            return told
        return None if value is None else f"{told}, value={value}"
