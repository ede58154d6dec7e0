"""Workers are killed all through long searches: `make soak`.

FK steering and DTS run in turn on a kernel that sleeps as a GPU would work, while ready workers are killed with SIGKILL
at random moments, until enough were. Every search must give the tree of one process, bit for bit, at the same NFE; the
driver's resident memory after the last search must be what it was after the first of its kind.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import treesearch as ts
from treesearch import host
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear

COLUMNS = ("parent", "t", "visits", "value", "reward", "log_w", "key")
METHODS = {
    "FK": ts.FeynmanKac(num_particles=60, ess_threshold=1.0),
    "DTS": ts.DiffusionTreeSampling(wave=60, widening_c=1.0, widening_alpha=0.6),
}


@dataclass(frozen=True)
class Args:
    """Arguments."""

    kills: int = 200
    """workers to kill"""
    workers: int = 6
    """processes; a new one takes seconds to start"""
    nfe: int = 30_000
    """budget of each search"""
    step: float = 0.03
    """seconds that a pass of the kernel takes while workers are killed"""
    growth_mb: float = 48.0
    """resident memory that the driver may gain between the first searches and the last"""
    seed: int = 0
    """of the moments and of the first search"""
    out: Path = Path("runs/results/soak.json")
    """figures as JSON"""


class Sleepy(LinearGaussian):
    """The exact bed of two dimensions; its passes take time while a file exists."""

    def __init__(self, file: str, seconds: float) -> None:
        super().__init__(dim=2)
        self.__dict__ |= {"pause": (file, seconds)}

    def transition(self, x: Tensor, t: Tensor, cond: Any = None) -> Gaussian:
        file, seconds = self.__dict__["pause"]
        if os.path.exists(file):
            time.sleep(seconds)
        return super().transition(x, t, cond)


class Killer(threading.Thread):
    """Kills one ready worker of a pool after another, as long as another one is ready."""

    def __init__(self, workers: ts.RayWorkers, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.workers, self.kills, self.draw = workers, kills, random.Random(seed)
        self.killed: list[int] = []
        self.end = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.kills and not self.end.wait(self.draw.uniform(0.0, 0.5)):
            ready = [a.info["pid"] for a in self.workers.pool.workers if a.ready is None]
            ready = [pid for pid in ready if pid not in self.killed[-50:]]
            if len(ready) >= 2:
                self.killed.append(self.draw.choice(ready))
                os.kill(self.killed[-1], signal.SIGKILL)


def differences(found: ts.SearchResult, alone: ts.SearchResult) -> list[str]:
    """What two results do not share."""
    trees = zip(found.tasks, alone.tasks, strict=True)
    out = [
        column
        for a, b in trees
        for column in COLUMNS
        if not np.array_equal(getattr(a.tree, column), getattr(b.tree, column), equal_nan=column in COLUMNS[3:6])
    ]
    out += ["samples"] * any(
        not torch.equal(a.samples, b.samples) for a, b in zip(found.tasks, alone.tasks, strict=True)
    )
    return out + ["nfe"] * (found.cost.nfe != alone.cost.nfe)


def main(args: Args) -> dict[str, Any]:
    """Search until enough workers were killed; the figures."""
    torch.set_num_threads(1)
    began, searches, first = time.perf_counter(), [], {}
    with tempfile.TemporaryDirectory() as folder, ts.RayWorkers(args.workers, max_failures=1000) as workers:
        sleeping = Path(folder) / "sleeping"
        kernel = Sleepy(str(sleeping), args.step)
        killer = Killer(workers, args.kills, args.seed)
        for number in count():
            name, method = list(METHODS.items())[number % 2]
            run = functools.partial(
                ts.search,
                kernel,
                linear(1.0),
                method,
                prompts=["a", "b"],
                budget=ts.Budget(nfe=args.nfe),
                seed=args.seed + number,
                batch_size=16,
                keep_states="frontier",
            )
            sleeping.unlink(missing_ok=True)
            alone = run()
            if len(killer.killed) < args.kills:
                sleeping.touch()
            if number == 0:
                killer.start()
            found = run(workers=workers)
            stats = found.tasks[0].diagnostics["workers"]
            searches.append(
                {
                    "method": name,
                    "differences": differences(found, alone),
                    "nfe": found.cost.nfe,
                    "repeated_nfe": found.cost.repeated_nfe,
                    "bundles_given_again": stats["bundles_given_again"],
                    "seconds": round(found.cost.seconds, 1),
                    "killed": len(killer.killed),
                    "nodes": sum(len(task.tree) for task in found.tasks),
                    "resident_mb": round((host.resident() or 0) / 2**20, 1),
                }
            )
            print(json.dumps(searches[-1]), flush=True)
            first.setdefault(name, searches[-1]["resident_mb"])
            del found, alone
            if len(killer.killed) >= args.kills and len(searches) >= 4:  # each kind twice
                break
        replaced = workers.pool.restarts
    growth = searches[-1]["resident_mb"] - first[searches[-1]["method"]]
    summary = {
        "kills": len(killer.killed),
        "processes_replaced": replaced,
        "searches": len(searches),
        "nfe": sum(s["nfe"] for s in searches),
        "repeated_nfe": sum(s["repeated_nfe"] for s in searches),
        "bundles_given_again": sum(s["bundles_given_again"] for s in searches),
        "differences": sorted({d for s in searches for d in s["differences"]}),
        "growth_mb": round(growth, 1),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "runs": searches,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({k: v for k, v in summary.items() if k != "runs"}, indent=1))
    assert not summary["differences"], f"not the tree of one process: {summary['differences']}"
    assert growth < args.growth_mb, f"the driver grew by {growth:.0f} MB"
    assert summary["repeated_nfe"] > 0, "no kill hit a bundle: use more kills"
    return summary


if __name__ == "__main__":
    main(tyro.cli(Args))
