"""`RayWorkers`: what users hold. It starts the pool, and makes stand-ins and engines that compute there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treesearch.backends.base import Kernel
from treesearch.budget import Cost
from treesearch.core.tree import Tree
from treesearch.distributed.engine import RayEngine
from treesearch.distributed.pool import Pool
from treesearch.distributed.settings import Settings
from treesearch.distributed.stand_ins import Elsewhere, RemoteKernel
from treesearch.engine.model import Model
from treesearch.engine.states import StateStore
from treesearch.errors import WorkerError
from treesearch.registry.recipe import Recipe
from treesearch.rewards.base import Reward


class RayWorkers:
    """Workers on Ray for `search(..., workers=)`; also a context manager, which keeps them for several searches.

    Args:
        num_workers: processes that hold a kernel each.
        gpus_per_worker: GPUs each of them asks Ray for; fractions share one.
        cpus_per_worker: CPUs each asks for, and its threads; by default 1, or 0 beside a GPU.
        reward_workers: processes that hold the reward alone; 0 scores where samples are made.
        gpus_per_reward_worker, cpus_per_reward_worker: as for workers.
        address: of a Ray cluster ("auto", "host:port"); None uses the one this process is connected to, or starts one
            on this machine.
        on_interrupt: what Ctrl-C does to the waves under way: "drop" them, or "drain": finish, record, then stop.
        max_failures: how often a bundle may fail before the search does.
        hang_seconds: time at one step (a pass, a load) beyond ten times the expected one after which a worker is
            replaced. It counts by the worker's own clock, without the time for which it waits for a core.
        start_seconds: time within which a first worker must be ready.
        reward_seconds: time a reward may take for a batch before its worker is replaced, by the same clock.
        reward_tries: attempts at a batch of rewards, with growing pauses.
        reward_window: seconds that samples wait for others to be scored with.
        reward_cache: rewards remembered by the content of samples, 0 for none; only with `reward_workers`.
        dashboard: start Ray's dashboard, on this machine's loopback address.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        num_workers: int,
        gpus_per_worker: float = 0,
        *,
        cpus_per_worker: float | None = None,
        reward_workers: int = 0,
        gpus_per_reward_worker: float = 0,
        cpus_per_reward_worker: float | None = None,
        address: str | None = None,
        on_interrupt: str = "drop",
        max_failures: int = 5,
        hang_seconds: float = 300.0,
        start_seconds: float = 300.0,
        reward_seconds: float = 120.0,
        reward_tries: int = 4,
        reward_window: float = 0.02,
        reward_cache: int = 65_536,
        dashboard: bool = False,
    ) -> None:
        self.settings = Settings(
            num_workers=num_workers,
            gpus_per_worker=gpus_per_worker,
            cpus_per_worker=cpus_per_worker,
            reward_workers=reward_workers,
            gpus_per_reward_worker=gpus_per_reward_worker,
            cpus_per_reward_worker=cpus_per_reward_worker,
            address=address,
            on_interrupt=on_interrupt,
            max_failures=max_failures,
            hang_seconds=hang_seconds,
            start_seconds=start_seconds,
            reward_seconds=reward_seconds,
            reward_tries=reward_tries,
            reward_window=reward_window,
            reward_cache=reward_cache,
            dashboard=dashboard,
        )
        self._pool: Pool | None = None
        self._entered = 0

    def __repr__(self) -> str:
        of = self.settings
        gpus = f", gpus_per_worker={of.gpus_per_worker:g}" if of.gpus_per_worker else ""
        scorers = f", reward_workers={of.reward_workers}" if of.reward_workers else ""
        return f"RayWorkers({of.num_workers}{gpus}{scorers})"

    def __enter__(self) -> RayWorkers:
        if self._entered == 0:
            self._pool = Pool(self.settings)
        self._entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if self._entered == 0 and self._pool is not None:
            pool, self._pool = self._pool, None
            pool.shutdown()

    @property
    def running(self) -> bool:
        """Whether there are processes."""
        return self._pool is not None

    @property
    def pool(self) -> Pool:
        """The processes.

        Raises:
            WorkerError: none are running.
        """
        if self._pool is None:
            raise WorkerError("these workers are not running: use `with workers:` around what needs them")
        return self._pool

    def kernel(self, recipe: Recipe) -> Kernel:
        """A stand-in for a kernel that only workers build."""
        return RemoteKernel(self, recipe)

    def reward(self, recipe: Recipe) -> Reward:
        """A stand-in for a reward that only workers build."""
        found = self.pool.share("reward", recipe)
        actors = self.pool.scorers or self.pool.workers
        known = self.pool.ask(actors, lambda a: a.describe_reward.remote(found))

        def remarks(prompts: Sequence[Any]) -> list[list[str]]:
            return self.pool.ask(actors, lambda a: a.remarks.remote(found, prompts))

        return Reward(Elsewhere(recipe), remarks=remarks, **known)

    def engine(
        self, model: Model, trees: Sequence[Tree], states: StateStore, cost: Cost, *, keep_inner: bool = True
    ) -> RayEngine:
        """An engine of the interface of `treesearch.engine.engine.Engine` that computes on these workers."""
        return RayEngine(self.pool, model, trees, states, cost, keep_inner=keep_inner)
