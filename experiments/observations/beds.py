"""The beds: Gaussian states whose discrete chain has a Gaussian law of x_0, seen through linear operators.

    linear    colour images (3, 2, 4), correlated over channels and pixels, through six operators
    process   24 pixels of a Gaussian process (squared exponential, length 3), of which eight are seen

Everything true here is true of the chain with its T steps, whose law of x_0 is N(m', C') and not quite the data's
N(m, Σ): log p(y), and the posterior of x_0. Observations are drawn from that law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from treesearch.backends.exact.gaussian_states import GaussianStates, Posterior
from treesearch.backends.guidance import Spread, spread
from treesearch.rewards.base import Reward
from treesearch.rewards.observation import Operator, blurred, frequencies, grey, masked, matrix, measurement, pooled

F64 = torch.float64
STEPS = 40
IMAGE = (3, 2, 4)
PIXELS = 24
KNOWN = torch.zeros(PIXELS, dtype=torch.bool, device="cpu")
KNOWN[8:16] = True  # the seed of the process


@dataclass(frozen=True)
class Seen:
    """An observation and all that is true of it.

    Args:
        reward: log N(y; A x_0, tolerance²).
        x0: where it came from (*state).
        posterior: of the chain's own x_0, and log p(y).
    """

    reward: Reward
    x0: Tensor
    posterior: Posterior


@dataclass(frozen=True, eq=False)
class Bed:
    """States, and what is seen of them.

    Args:
        kernel: the chain.
        operator: A.
    """

    kernel: GaussianStates
    operator: Operator

    @cached_property
    def rows(self) -> Tensor:
        """A as a matrix (M, D)."""
        dim = self.kernel.mean.numel()
        return self.operator(torch.eye(dim, dtype=F64).reshape(dim, *self.kernel.state_shape)).flatten(1).T

    @cached_property
    def spread(self) -> Spread:
        """S_t, and r_t, as a pilot of 256 rollouts measures them."""
        return spread(self.kernel, n=256, correlated=True)

    def seen(self, tolerance: float, seed: int) -> Seen:
        """The observation of a draw of the chain's law, the same draw and noise for every tolerance."""
        draw = torch.Generator().manual_seed(seed)
        mean, cov = self.kernel.law
        x0 = mean + torch.linalg.cholesky(cov) @ torch.randn(len(mean), dtype=F64, generator=draw)
        clean = self.operator(x0.reshape(1, *self.kernel.state_shape))[0]
        y = clean + tolerance * torch.randn(clean.shape, dtype=F64, generator=draw)
        reward = measurement(self.operator, y, tolerance=tolerance)
        posterior = self.kernel.given(self.rows, y.flatten(), tolerance)
        return Seen(reward, x0.reshape(self.kernel.state_shape), posterior)


@cache
def images(eta: float = 1.0) -> GaussianStates:
    """Colour images: neighbours at distance d have correlation exp(-d / 2), channels .6."""
    at = torch.cartesian_prod(torch.arange(2.0), torch.arange(4.0)).to(F64)
    space = (-torch.cdist(at, at) / 2).exp()
    channels = 0.6 + 0.4 * torch.eye(3, dtype=F64)
    cov = torch.kron(channels, space) * 0.5
    return GaussianStates(torch.full(IMAGE, 0.2, dtype=F64), cov, num_steps=STEPS, eta=eta)


@cache
def process(num_steps: int = STEPS, eta: float = 1.0) -> GaussianStates:
    """A smooth line of pixels: covariance exp(-d² / 2·3²) + .01 [d = 0]."""
    at = torch.arange(PIXELS, dtype=F64)[:, None]
    cov = (-0.5 * (torch.cdist(at, at) / 3) ** 2).exp() + 0.01 * torch.eye(PIXELS, dtype=F64)
    return GaussianStates(torch.zeros(PIXELS, dtype=F64), cov, num_steps=num_steps, eta=eta)


def _half() -> Tensor:
    mask = torch.zeros(IMAGE, dtype=torch.bool)
    mask[:, :, :2] = True
    return mask


def _low() -> Tensor:
    return torch.arange(2)[:, None] + torch.arange(4) < 2


def _random() -> Tensor:
    return torch.randn(4, 24, dtype=F64, generator=torch.Generator().manual_seed(0)) / 24**0.5


OPERATORS: dict[str, Callable[[], Operator]] = {
    "mask": lambda: masked(_half()),
    "pooled": lambda: pooled(2),
    "blurred": lambda: blurred(0.8),
    "grey": grey,
    "frequencies": lambda: frequencies(_low()),
}


@cache
def bed(name: str, operator: str) -> Bed:
    """A bed by name, seen through an operator by name."""
    if name == "process":
        return Bed(process(), masked(KNOWN))
    if operator == "matrix":
        flat = matrix(_random())
        shaped = Operator(lambda x: flat(x.flatten(1)), lambda v: flat.adjoint(v).reshape(-1, *IMAGE), flat.name)
        return Bed(images(), shaped)
    return Bed(images(), OPERATORS[operator]())


BEDS = {"linear": (*OPERATORS, "matrix"), "process": ("mask",)}
