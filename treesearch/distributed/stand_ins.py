"""Stand-ins here for kernels and rewards that only workers build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from treesearch.backends.base import Measured
from treesearch.distributed.bundles import as_numpy
from treesearch.distributed.pool import Pool
from treesearch.errors import WorkerError
from treesearch.registry.recipe import Recipe
from treesearch.rewards.base import Reward


class Holder(Protocol):
    """Who has a pool while it runs."""

    @property
    def running(self) -> bool: ...
    @property
    def pool(self) -> Pool: ...


@dataclass(frozen=True)
class Elsewhere:
    """The function of a reward that only workers have."""

    recipe: Recipe

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Any:
        raise WorkerError("this reward was given as a recipe and runs on workers only")


class RemoteKernel:
    """A kernel's attributes here, its network on the workers; decodes there, or here once they are gone."""

    def __init__(self, workers: Holder, recipe: Recipe) -> None:
        self._workers, self.recipe = workers, recipe
        found = workers.pool.share("kernel", recipe)
        spec, self.class_name, scores = workers.pool.ask(workers.pool.workers, lambda a: a.describe.remote(found))
        self.num_steps, self.state_shape, self.noise_shape = spec.num_steps, spec.state_shape, spec.noise_shape
        self.stochastic, self.dtype, self.fingerprint = spec.stochastic, spec.dtype, spec.fingerprint
        self.rows_per_nfe, self.backward_per_nfe = spec.rows_per_nfe, spec.backward_per_nfe
        self.rewards_per_nfe, self.preview = spec.rewards_per_nfe, spec.previews or None
        self.departs, self.base_law, self.valued = spec.departs, spec.base_law, spec.valued
        self.sample_range = spec.sample_range
        self.draft_times, self.draft_ratio, self.undrafted = spec.draft_times, spec.draft_ratio, spec.undrafted
        self.scores = None if scores is None else Reward(Elsewhere(recipe), **scores)
        self._here: Any = None

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        pool = self._workers.pool
        found = pool.share("kernel", self.recipe)
        return pool.ask(pool.workers, lambda a: a.encode.remote(found, list(prompts)))

    @cached_property
    def measured(self) -> Measured | None:
        """What one of the workers found out, for all of them."""
        pool = self._workers.pool
        found = pool.share("kernel", self.recipe)
        return pool.ask(pool.workers, lambda a: a.measured.remote(found))

    def decode(self, x0: torch.Tensor) -> Any:
        if not self._workers.running:
            return self._local().decode(x0)
        pool = self._workers.pool
        found = pool.share("kernel", self.recipe)
        return pool.ask(pool.workers, lambda a: a.decode.remote(found, as_numpy(x0)))

    def prior(self, noise: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self._local().prior(noise, cond)

    def transition(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Any:
        return self._local().transition(x, t, cond)

    def _local(self) -> Any:
        if self._here is None:
            self._here = self.recipe.kernel()
        return self._here
