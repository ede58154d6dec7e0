"""Exact trajectory kernels for tests: independent Gaussian entries, seen as (n, H, C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.channels import Channels

PLAIN = Channels(2, 1)


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """LinearGaussian whose D entries are H rows of C channels."""

    horizon: int = 4
    channels: Channels | None = PLAIN
    width: int = 3
    num_steps: int = 3

    @property
    def inner(self) -> LinearGaussian:
        return LinearGaussian(num_steps=self.num_steps, dim=self.horizon * self.width)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def fingerprint(self) -> str:
        return repr(self)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        return x0.float().reshape(len(x0), self.horizon, self.width)


def rewarded() -> Tracks:
    """Rows (s, s, a, r)."""
    return Tracks(channels=Channels(2, 1, 1), width=4)


def unlabelled() -> Tracks:
    """A kernel that does not know its channels."""
    return Tracks(channels=None, width=4)


def first_position(samples: torch.Tensor) -> torch.Tensor:
    """r: the first number of the first observation; -inf where it is below -1."""
    value = samples[:, 0, 0].double()
    return torch.where(value < -1, -torch.inf, value)
