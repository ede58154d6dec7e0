"""The cells of `experiments.mnist.evidence`: a search, what it cost, and what its draws or its best are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import treesearch as ts
from experiments.mnist import judge
from experiments.mnist.references import Known, distances, pool_part
from experiments.mnist.targets import DRAWS, METHODS, PART, SEARCHED, SEARCHERS, TARGETS, T, kernel_on
from experiments.shared import sweep
from experiments.shared.baselines import Setup
from experiments.shared.cells import Row, where_it_ran
from experiments.shared.distances import diversity
from experiments.shared.grids import Entry, How
from experiments.shared.sweep import FAILURES
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    kind: str
    target: str
    method: str
    settings: How
    budget: int
    seed: int

    def file(self, work: Path) -> Path:
        """Where its leaves are kept."""
        settings = ",".join(f"{k}={v}" for k, v in sorted(self.settings.items())) or "default"
        return work / "leaves" / f"{self.kind}-{self.target}-{self.method}-{settings}-{self.budget}-{self.seed}.npz"


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where cells run.

    Args:
        device: of the model.
        batch_size: rows of a forward pass.
        work: folder of the pool and of leaves.
        seeds: of best-of-N, each of which has a part of the pool.
    """

    device: str
    batch_size: int
    work: Path
    seeds: tuple[int, ...]


def attempt(job: Job, entry: Entry, reward: Reward, host: Host) -> tuple[Row, Setup | None, SearchResult | None]:
    """Run a cell; one that fails says why."""
    began = time.perf_counter()
    try:
        setup = entry.make(kernel_on(host.device), reward, **job.settings)
        budget = ts.Budget(nfe=job.budget)
        result = ts.search(setup.kernel, reward, setup.method, budget=budget, seed=job.seed, batch_size=host.batch_size)
    except FAILURES as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}, None, None
    return costs(result), setup, result


def costs(result: SearchResult) -> Row:
    """What it took."""
    cost, tree = result.cost, result.tree
    return {
        "nfe": cost.nfe,
        "work": cost.nfe + 2 * cost.backward_nfe,
        "reward_calls": cost.reward_calls,
        "seconds": cost.seconds,
        "nodes": len(tree),
        "tree_bytes": sum(getattr(tree, name).nbytes for name in tree.COLUMNS),
        "state_bytes": int((tree.slot >= 0).sum()) * 28 * 28 * 4,
    }


def sampled(job: Job, host: Host) -> Row:
    """A sampling cell; its leaves go to a file."""
    found, setup, result = attempt(job, METHODS[job.method], TARGETS[job.target].reward(), host)
    if result is None or setup is None:
        return job.row | found | where_it_ran()
    try:
        return job.row | found | graded(job, setup, result.tasks[0], host.work) | where_it_ran()
    except FAILURES as error:
        return job.row | found | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()


def graded(job: Job, setup: Setup, task: TaskResult, work: Path) -> Row:
    """Metrics of 2,000 draws that need no reference."""
    n, chance = len(task.leaves), np.random.default_rng(job.seed)
    rows = task.draw_rows(DRAWS, job.seed) if setup.weighted else chance.integers(0, n, DRAWS)
    unique, again = np.unique(rows, return_inverse=True)
    probs, features = judge.grade(task.fetch(task.leaves[unique]).float().cpu())
    file = job.file(work)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, features=features.numpy(), again=again)
    right = torch.isin(probs.argmax(1), torch.tensor(TARGETS[job.target].digits))
    return {
        "mean_reward": float(task.rewards[torch.from_numpy(rows)].mean()),
        "judge_accuracy": float(right[torch.from_numpy(again)].double().mean()),
        "judge_probability": float(probs[:, list(TARGETS[job.target].digits)].sum(1)[torch.from_numpy(again)].mean()),
        "diversity": diversity(features[torch.from_numpy(again)]),
        "log_z": task.log_z if setup.weighted else None,
        "distinct": len(unique),
        "roots": len(np.unique(task.tree.roots(task.leaves[unique]))),
        "ess": task.diagnostics["ess"] if setup.weighted else float(n),
        "samples": n,
    }


def measure(job: Job, row: Row, known: Known, pool: int, work: Path) -> Row:
    """Distances of a cell's draws, whose leaves are kept here."""
    stored = np.load(job.file(work))
    features = torch.from_numpy(stored["features"][stored["again"]])
    log_z = row.get("log_z")
    return (
        job.row
        | {"kind": f"{job.kind} distances", "pool": pool}
        | distances(features, known.real, "real")
        | distances(features, known.model, "model")
        | {"log_z_error": None if log_z is None else abs(log_z - known.log_z)}
    )


def rolled_out(job: Job, host: Host) -> Row:
    """A cell of best-of-N: it does not look at the reward, so its rollouts are consecutive parts of the pool."""
    count, parts = job.budget // T, -(-job.budget // (T * PART))
    first = host.seeds.index(job.seed) * parts
    files = [pool_part(host.work, first + i, host.batch_size, host.device) for i in range(parts)]
    images = torch.cat(files)[:count]
    rewards = torch.cat([SEARCHED[job.target]()(part) for part in images.split(PART)])
    best = torch.cummax(rewards, 0).values.tolist()
    return job.row | {
        "nfe": count * T,
        "work": count * T,
        "reward_calls": count,
        "best": best[-1],
        "judge_of_best": judge.grade(images[rewards.argmax()][None])[0][0].tolist(),
        "curve": improvements([{"nfe": (i + 1) * T, "best_reward": b} for i, b in enumerate(best)]),
        "rewards": rewards.tolist(),
    }


def searched(job: Job, host: Host) -> Row:
    """A search cell: the best reward, and where it was improved."""
    if job.method == "best_of_n":
        return rolled_out(job, host) | where_it_ran()
    found, _, result = attempt(job, SEARCHERS[job.method], SEARCHED[job.target](), host)
    if result is None:
        return job.row | found | where_it_ran()
    best, images = float(result.rewards.max()), result.best()[0].float().cpu()
    probs = judge.grade(images)[0][0]
    extra: Row = {"best": best, "judge_of_best": probs.tolist()}
    if SEARCHERS[job.method].anytime:
        extra["curve"] = improvements(result.history)
    return job.row | found | extra | where_it_ran()


def improvements(history: Sequence[Row]) -> list[list[float]]:
    """[NFE, best reward] where it rose."""
    curve: list[list[float]] = []
    for record in history:
        best = record["best_reward"]
        if best is not None and (not curve or best > curve[-1][1]):
            curve.append([record["nfe"], best])
    return curve
