"""What Ray workers are measured with: a kernel that sleeps as a GPU would, and methods sized for so many workers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import treesearch as ts

BATCH = 8
STEPS = 50
SIZES = (16, 256)  # KB of a state
TARGETS = {4: 0.95, 8: 0.90}
METHODS = ("best_of_n", "fk", "dts_async")
NOISE = 16
FK_BATCHES = 8  # full batches of a worker in a population
IN_FLIGHT = 4  # full batches in flight a worker, asynchronous DTS


@dataclass(frozen=True)
class Nudged:
    """x_{t-1} = x_t with noise added to its first entries: a law that costs the host next to nothing."""

    mean: Tensor

    @property
    def endpoint(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        self.mean[:, :NOISE] += 0.1 * noise  # in place: a copy of every state would be host work no GPU asks for
        return self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x))

    def log_weight(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x))

    def take(self, rows: Tensor) -> Nudged:
        return Nudged(self.mean[rows])


@dataclass(frozen=True)
class Sleeper:
    """A device on which a pass of n rows takes a + b·n seconds; the host sleeps meanwhile.

    Args:
        kilobytes: of a state.
        a, b: 20 ms at 8 rows, nine tenths of it whatever the batch.
    """

    kilobytes: int
    a: float = 0.018
    b: float = 0.002 / BATCH
    num_steps: int = STEPS
    noise_shape = (NOISE,)
    fingerprint = "sleeper"

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.kilobytes * 256,)

    def seconds(self, rows: int) -> float:
        """t(rows)."""
        return self.a + self.b * rows

    def prior(self, noise: Tensor, cond: Any = None) -> Tensor:
        x = torch.zeros((len(noise), *self.state_shape))
        x[:, :NOISE] = noise
        return x

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Nudged:
        time.sleep(self.seconds(len(x)))
        return Nudged(x)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


def first_entry(x: Tensor) -> Tensor:
    """A reward that costs nothing and differs between samples."""
    return x[:, 0]


def method_of(name: str, workers: int, batches: int) -> tuple[Any, ts.Budget]:
    """A method sized for so many workers, and the budget of `batches` full batches of rollouts for each."""
    rows = workers * BATCH
    made = {
        "best_of_n": ts.BestOfN(),
        "fk": ts.FeynmanKac(num_particles=min(FK_BATCHES, batches) * rows),
        "dts_async": ts.DiffusionTreeSampling(mode="async", wave=IN_FLIGHT * rows),
    }[name]
    return made, ts.Budget(nfe=batches * rows * STEPS)
