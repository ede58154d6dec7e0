"""The engine of a search on workers: models and rewards run there, the tree and the decisions stay here.

driver    Session -> RayEngine: queue of rows -> `share_out` -> bundles of whole segments
worker    one process, one device: a `Station` per search; answers with states, log p/q, rewards
scorer    optional processes that only score; a `Rewards` batches, caches and retries in front of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from treesearch.backends.base import bare
from treesearch.budget import Cost, total
from treesearch.core.tree import ROOT, Tree
from treesearch.distributed import bundling
from treesearch.distributed.bundles import as_numpy, as_tensor
from treesearch.distributed.landing import Landing
from treesearch.distributed.lending import Lender
from treesearch.distributed.pool import Pool
from treesearch.distributed.process import Setup, on_cpu
from treesearch.distributed.sharing import Speeds
from treesearch.distributed.stand_ins import Elsewhere, RemoteKernel
from treesearch.distributed.stats import Figures
from treesearch.engine.model import Model
from treesearch.engine.segments import Arrival, Ids, Segments
from treesearch.engine.states import StateStore
from treesearch.errors import StoreError
from treesearch.interrupts import interrupts_deferred


class RayEngine:
    """Runs segments on workers; the interface of `treesearch.engine.engine.Engine`.

    Args:
        pool: the processes.
        model: what workers are to hold; its kernel and reward are the objects, or stand-ins for recipes.
        trees, states, cost, keep_inner: as of an `Engine`.
    """

    ahead = 1

    def __init__(
        self,
        pool: Pool,
        model: Model,
        trees: Sequence[Tree],
        states: StateStore,
        cost: Cost,
        *,
        keep_inner: bool = True,
    ) -> None:
        self.pool, self.spec, self.trees, self.states, self.cost = pool, model.spec, trees, states, cost
        self.search = next(pool.numbers)
        kernel, reward = model.kernel, model.reward
        self._kernel = kernel
        shared = pool.share("kernel", kernel.recipe if isinstance(kernel, RemoteKernel) else kernel)
        judge = pool.share("reward", reward.fn.recipe if isinstance(reward.fn, Elsewhere) else reward)
        away = bool(pool.scorers)
        setup = Setup(
            self.search,
            shared,
            None if away else judge,
            reward.input == "sample",
            None if model.prompts is None else list(model.prompts),
            on_cpu(model.encoded),
            model.batch_size,
            model.batch_invariant,
            guide_scores=model.guide_scores,
            angle=model.angle,
            keep_inner=keep_inner,
        )
        self._setup, self._model, self._of_samples = [ray.put(setup)], shared, setup.sample
        scoring = [ray.put(replace(setup, kernel=None, encoded=None, reward=judge))] if away else None
        self._figures, self._final = Figures(), None
        self._landing = Landing(trees, states, model.spec.dtype, self._figures, self.path)
        self._lender = Lender(
            pool,
            self._setup,
            scoring,
            self.search,
            model.spec,
            trees,
            prompts=model.prompts,
            batch_size=model.batch_size,
            landing=self._landing,
            speeds=pool.speeds.setdefault((shared[0], model.batch_size), Speeds()),
            figures=self._figures,
        )

    @property
    def capacity(self) -> int:
        """Rows that give every worker a bundle."""
        return sum(self._lender.loads.bundle_rows(a, self.spec.num_steps) for a in self.pool.workers)

    @property
    def lanes(self) -> int:
        """Rows that take as long as one: each worker has its own."""
        return max(1, len(self.pool.workers))

    @property
    def drains(self) -> bool:
        """Whether Ctrl-C lets the waves under way arrive."""
        return self.pool.settings.on_interrupt == "drain"

    @interrupts_deferred()
    def submit(self, wave: int, work: Sequence[tuple[int, Segments]]) -> None:
        """Queue a wave of (task, segments) and send what workers have room for."""
        if work:
            self._lender.add(wave, work)
            self._lender.dispatch()

    def finish(self, wave: int) -> Cost:
        """Wait until every row of the wave is scored; returns what it cost."""
        spent, lender = Cost(), self._lender
        for job in [j for j in lender.jobs if j.wave == wave]:
            while job.left:
                self.pool.pump()
            spent.add(lender.settle(job))
        lender.collect(wave)
        return spent

    def collect(self) -> list[Arrival]:
        """Wait until some rows are scored; all that are, instead of `finish`."""
        lender = self._lender
        while lender.waiting:
            self.pool.pump()
        arrived = lender.collect()
        landed = {id(j): lender.settle(j) for j in [j for j in lender.jobs if not j.left]}
        return [Arrival(j.wave, rows, landed.pop(id(j), None)) for j, rows in reversed(arrived)][::-1]

    def path(self, task: int, node: int, above: int) -> torch.Tensor:
        """The state of a node, computed again from the stored state of its ancestor `above` or (the root) the prior."""
        if not self._open:
            raise StoreError(f"node {node} of task {task} is to be computed again, but its workers are gone: resume")
        tree, pool = self.trees[task], self.pool
        legs = bundling.legs_between(tree, node, above, self.spec.num_steps)
        x = None if above == ROOT else as_numpy(self.states.get(tree.slot[[above]])[0])
        state = pool.ask(pool.workers, lambda a: a.retrace.remote(self._setup, self.search, task, legs, x))
        levels = slice(int(tree.t[node]) + 1, min(int(tree.t[above]), self.spec.num_steps) + 1)
        steps = levels.stop - levels.start
        self.cost.repeated_nfe += steps
        self.cost.rows += sum(self.spec.rows_per_nfe[levels])
        self.cost.backward_nfe += sum(self.spec.backward_per_nfe[levels])
        return as_tensor(state, self.spec.dtype)

    def score(self, task: Ids, x: torch.Tensor) -> NDArray[np.float64]:
        """Rewards (n,) of samples x_0 (n, *state) that were scored and paid for before."""
        pool, states, rewards = self.pool, as_numpy(x), self._lender.rewards
        if rewards is None:
            return pool.ask(pool.workers, lambda a: a.score.remote(self._setup, self.search, task, states))
        samples: Any = bare(self._kernel, x)
        if self._of_samples:
            samples = pool.ask(pool.workers, lambda a: a.decode.remote(self._model, states))
        return rewards.score(task, samples)

    def settle(self) -> None:
        """Bring home the states of all rows that have arrived."""
        self._landing.settle()

    def backlog(self) -> float:
        """Seconds until a worker would begin new work."""
        return self._lender.loads.backlog()

    def under_way(self) -> Cost:
        """What the answers for waves that have not landed have cost."""
        return total(job.cost for job in self._lender.jobs)

    def summary(self) -> dict[str, Any]:
        """The figures of all workers together: for the history and the progress line."""
        return self._figures.summary(*self._counts())

    def stats(self) -> dict[str, Any]:
        """What the workers did: utilisation, batch fill, queue depth, bytes moved; by worker and in all."""
        if self._final is not None:
            return self._final
        found, rewards = self._figures.stats(*self._counts(), self.pool.restarts), self._lender.rewards
        return found if rewards is None else found | {"rewards": rewards.stats()}

    @interrupts_deferred()
    def close(self) -> None:
        """Let the workers forget this search."""
        if not self._open:
            return
        self._final = self.stats()
        self._lender.close()
        for actor in self.pool.workers:
            if actor.ready is None:
                actor.handle.close.remote(self.search)
        self._setup = []

    @property
    def _open(self) -> bool:
        return self._lender in self.pool.tenants

    def _counts(self) -> tuple[int, int]:
        """Workers that are up, and those that were asked for."""
        return sum(a.ready is None for a in self.pool.workers), self.pool.settings.num_workers
