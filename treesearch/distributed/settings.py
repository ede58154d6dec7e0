"""How workers are to be: the arguments of `RayWorkers`, checked. Knows nothing of Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from treesearch.errors import choose
from treesearch.rewards.numeric import is_number, is_whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `RayWorkers`, which says what they mean.

    Raises:
        ValueError: one is out of range.
    """

    num_workers: int
    gpus_per_worker: float = 0
    cpus_per_worker: float | None = None
    reward_workers: int = 0
    gpus_per_reward_worker: float = 0
    cpus_per_reward_worker: float | None = None
    address: str | None = None
    on_interrupt: str = "drop"
    max_failures: int = 5
    hang_seconds: float = 300.0
    start_seconds: float = 300.0
    reward_seconds: float = 120.0
    reward_tries: int = 4
    reward_window: float = 0.02
    reward_cache: int = 65_536
    dashboard: bool = False

    def __post_init__(self) -> None:
        self._check(is_whole, "a positive whole number", "num_workers", "max_failures", "reward_tries")
        self._check(lambda v: is_whole(v, 0), "a whole number >= 0", "reward_workers", "reward_cache")
        gpus = "a fraction of a GPU or a whole number of them"
        self._check(_gpus, gpus, "gpus_per_worker", "gpus_per_reward_worker")
        self._check(
            lambda v: is_number(v) and v > 0, "a positive number", "hang_seconds", "start_seconds", "reward_seconds"
        )
        self._check(lambda v: is_number(v, 0) and v < math.inf, "seconds >= 0", "reward_window")
        choose("on_interrupt", self.on_interrupt, ("drop", "drain"))
        if self.gpus_per_reward_worker and not self.reward_workers:
            raise ValueError("gpus_per_reward_worker is for reward_workers, of which there are none")
        asked = "cpus_per_worker", "cpus_per_reward_worker"
        self._check(lambda v: v is None or is_number(v, 0), "a number >= 0", *asked)

    def _check(self, holds: Callable[[Any], bool], what: str, *names: str) -> None:
        for name in names:
            if not holds(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r}, expected {what}")

    @property
    def worker_cpus(self) -> float:
        """CPUs of a worker."""
        return _cpus(self.cpus_per_worker, self.gpus_per_worker)

    @property
    def reward_worker_cpus(self) -> float:
        """CPUs of a reward worker."""
        return _cpus(self.cpus_per_reward_worker, self.gpus_per_reward_worker)

    @property
    def cpus(self) -> float:
        """CPUs of them all."""
        return self.num_workers * self.worker_cpus + self.reward_workers * self.reward_worker_cpus


def _cpus(asked: float | None, gpus: float) -> float:
    return (0 if gpus else 1) if asked is None else asked


def _gpus(value: Any) -> bool:
    return is_number(value, 0) and (value <= 1 or float(value).is_integer())
