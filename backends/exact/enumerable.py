"""Chains small enough to enumerate: a discrete chain and a masked-token chain, with exact soft values.

    V_t = (1/λ) log(P_t exp(λ V_{t-1})),  V_0 = r,  Z = p(x_T)·exp(λ V_T)

One normal a token is read as the uniform of an inverse CDF in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from treesearch.backends.base import Categorical, Cond, inverse_cdf, uniform

F64 = torch.float64


class Enumerated(NamedTuple):
    """Exact laws under exp(λ r), by backward recursion."""

    log_z: float
    posterior: Tensor  # (S,) π(x_0)
    values: Tensor  # (T + 1, S) V_t


def enumerate_tilt(prior: Tensor, steps: Tensor, reward: Tensor, lam: float) -> Enumerated:
    """Backward recursion over prior (S,), steps (T, S, S) with [t - 1, x_t, x_{t-1}], reward (S,) of x_0."""
    values = [lam * reward.double()]
    marginal = prior
    for step in steps:
        values.append(torch.logsumexp(step.log() + values[-1], 1))
    for step in steps.flip(0):
        marginal = marginal @ step
    log_z = torch.logsumexp(prior.log() + values[-1], 0)
    posterior = (marginal.log() + values[0]).softmax(0)
    return Enumerated(float(log_z), posterior, torch.stack(values) / lam)


@final
@dataclass(frozen=True)
class DiscreteChain:
    """A time-inhomogeneous Markov chain on S states; a state is one int64, shape (1,).

    Args:
        prior: p(x_T), S numbers.
        steps: T matrices of S rows, [t - 1][x_t][x_{t-1}].
    """

    prior_probs: tuple[float, ...]
    steps: tuple[tuple[tuple[float, ...], ...], ...]

    state_shape = (1,)
    dtype = torch.int64

    def __post_init__(self) -> None:
        for rows in (torch.tensor(rows, device="cpu") for rows in ([self.prior_probs], *self.steps)):
            if (rows < 0).any() or not torch.allclose(rows.sum(-1), torch.ones(len(rows), device="cpu"), atol=1e-6):
                raise ValueError(f"probabilities must be non-negative and sum to one, got {rows.tolist()}")

    @staticmethod
    def random(num_steps: int = 3, states: int = 4, seed: int = 0) -> DiscreteChain:
        """A chain with Dirichlet(1) rows."""
        draw = torch.Generator("cpu").manual_seed(seed)
        rows = -torch.rand(num_steps * states + 1, states, generator=draw, dtype=F64, device="cpu").log()
        rows = rows / rows.sum(1, keepdim=True)
        steps = rows[1:].reshape(num_steps, states, states).tolist()
        return DiscreteChain(tuple(rows[0].tolist()), tuple(tuple(map(tuple, m)) for m in steps))

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def fingerprint(self) -> str:
        return repr(self)

    @cached_property
    def _prior(self) -> Tensor:
        return torch.tensor(self.prior_probs, dtype=F64, device="cpu")

    @cached_property
    def _steps(self) -> Tensor:
        return torch.tensor(self.steps, dtype=F64, device="cpu")

    @cached_property
    def _endpoint(self) -> Tensor:
        """Most probable x_0 from each x_t, (T + 1, S)."""
        to_data = [torch.eye(len(self._prior), dtype=F64, device="cpu")]
        for step in self._steps:
            to_data.append(step @ to_data[-1])
        return torch.stack(to_data).argmax(2)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return inverse_cdf(self._prior.expand(len(noise), 1, -1), uniform(noise))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Categorical:
        probs = self._steps[t - 1, x[:, 0]]
        return Categorical(probs[:, None], self._endpoint[t, x[:, 0]][:, None])

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def tilted(self, reward: Tensor, lam: float = 1.0) -> Enumerated:
        """Exact laws under exp(λ reward[x_0])."""
        return enumerate_tilt(self._prior, self._steps, reward, lam)


@final
@dataclass(frozen=True)
class MaskedChain:
    """Absorbing-mask diffusion over L tokens of vocabulary V with the true conditionals of a data table.

    x_T is all mask (token V). At step t each masked token is revealed with probability 1/t, drawn from
    p(x_0[i] | revealed tokens), independently of the others: the factorised reverse step of masked language models.

    Args:
        data: V^L probabilities of the sequences, last token fastest.
        length, vocabulary, num_steps: L, V and T.
    """

    data: tuple[float, ...]
    length: int
    vocabulary: int
    num_steps: int

    dtype = torch.int64

    def __post_init__(self) -> None:
        if len(self.data) != self.vocabulary**self.length or abs(sum(self.data) - 1) > 1e-6 or min(self.data) <= 0:
            raise ValueError(f"data must be {self.vocabulary**self.length} positive probabilities that sum to one")

    @staticmethod
    def random(length: int = 3, vocabulary: int = 2, num_steps: int = 3, seed: int = 0) -> MaskedChain:
        """Dirichlet(1) data."""
        draw = torch.Generator("cpu").manual_seed(seed)
        rows = -torch.rand(vocabulary**length, generator=draw, dtype=F64, device="cpu").log()
        return MaskedChain(tuple((rows / rows.sum()).tolist()), length, vocabulary, num_steps)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        return (False,) + (True,) * self.num_steps

    @property
    def fingerprint(self) -> str:
        return repr(self)

    @cached_property
    def states(self) -> Tensor:
        """All (V + 1)^L states, the mask being token V; last token fastest."""
        return torch.tensor(list(itertools.product(range(self.vocabulary + 1), repeat=self.length)), device="cpu")

    def index(self, x: Tensor) -> Tensor:
        """Row of `states` that each state is, (n,)."""
        powers = (self.vocabulary + 1) ** torch.arange(self.length - 1, -1, -1, device="cpu")
        return (x * powers).sum(-1)

    @cached_property
    def _conditional(self) -> Tensor:
        """p(x_0[i] = v | revealed tokens) for every state, ((V + 1)^L, L, V)."""
        data = torch.tensor(self.data, dtype=F64, device="cpu")
        sequences = torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)), device="cpu")
        agree = ((self.states[:, None] == sequences) | (self.states[:, None] == self.vocabulary)).all(2)
        joint = agree * data
        onehot = torch.nn.functional.one_hot(sequences, self.vocabulary).double()
        return torch.einsum("sq,qiv->siv", joint, onehot) / joint.sum(1)[:, None, None]

    def _probs(self, state: Tensor, t: Tensor) -> Tensor:
        """Token laws (n, L, V + 1) of one step from rows of `states`."""
        tokens = torch.nn.functional.one_hot(self.states[state], self.vocabulary + 1).double()
        masked = (self.states[state] == self.vocabulary)[..., None]
        reveal = (1 / t.double())[:, None, None]
        drawn = torch.cat([reveal * self._conditional[state], (1 - reveal).expand(-1, self.length, 1)], 2)
        return torch.where(masked, drawn, tokens)

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return torch.full((len(noise), self.length), self.vocabulary, device="cpu")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Categorical:
        state = self.index(x)
        guess = torch.where(x == self.vocabulary, self._conditional[state].argmax(2), x)
        return Categorical(self._probs(state, t), guess)

    def encode(self, prompts: Sequence[Any]) -> None:
        return None

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def tilted(self, reward: Tensor, lam: float = 1.0) -> Enumerated:
        """Exact laws over `states` under exp(λ reward); the reward of a state that is still masked is never used."""
        every = torch.arange(len(self.states), device="cpu")
        steps = torch.stack([self._matrix(every, t) for t in range(1, self.num_steps + 1)])
        prior = (self.states == self.vocabulary).all(1).double()
        return enumerate_tilt(prior, steps, reward, lam)

    def _matrix(self, every: Tensor, t: int) -> Tensor:
        log_probs = self._probs(every, torch.full((len(every),), t, device="cpu")).log()
        picked = log_probs[:, torch.arange(self.length, device="cpu"), self.states]
        return picked.sum(2).exp()
