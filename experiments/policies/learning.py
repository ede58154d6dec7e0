"""DSRL in the two-route maze: success of the frozen policy as its noise is learnt, SAC beside NA and NA with search.

    python -m experiments.policies.learning run
    python -m experiments.policies.learning report

A step is a chunk: 8 actions. Every `every` steps the policy of noise, without its own noise, plays `episodes` episodes.
Learners are kept in `work` and go on where they were; `experiments.policies.compare` searches with their critics.
Settings are the paper's but for those of `SETTINGS`, which make a run minutes of one busy core.

Source: Steering Your Diffusion Policy with Latent Space Reinforcement Learning (Wagenmaker et al., 2025).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.policies.episodes import base_actor, play
from experiments.policies.two_routes import NEAR, two_routes
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.grids import check_names
from experiments.shared.stats import bootstrap
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from treesearch.backends.models.policy import policy
from treesearch.policies.dsrl import DSRL, Steering
from treesearch.policies.frozen import FrozenPolicy
from treesearch.policies.noise_env import NoiseEnv

KEY = ("method", "seed")
SETTINGS = {"batch_size": 128, "updates": 2, "noise_steps": 2, "warmup": 300, "every": 100, "temperature": 0.01}
LEARNERS: dict[str, dict[str, Any]] = {
    "na": {"method": "na"},
    "sac": {"method": "sac"},
    "na_search": {"method": "na", "leaves": 8, "backup": 8},  # the best of 8 is made, targets are of trees of 8
}
EPISODES_SEED = 7_000


def learner(method: str, seed: int, num_steps: int = 5, spread: tuple[float, float] = NEAR, **settings: int) -> DSRL:
    """A learner in the two-route maze."""
    env = NoiseEnv(two_routes(spread), FrozenPolicy(policy(num_steps=num_steps)))
    return DSRL(env, Steering(**{**SETTINGS, **LEARNERS[method], **settings}), seed=seed)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    method: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    methods: tuple[str, ...] = tuple(LEARNERS)
    """which learners"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of learners and of the environment"""
    steps: int = 1_000
    """chunks made in the environment"""
    episodes: int = 128
    """to measure success on"""
    work: Path = Path("runs/policies")
    """where learners are kept"""
    out: Path = Path("runs/results/policies/learning.jsonl")
    """row file"""

    def run(self) -> int:
        """Run the cells; the exit code."""
        check_names("method", self.methods, LEARNERS)
        asked = {"chunks": self.steps, "episodes": self.episodes} | {"settings": SETTINGS}
        with locked(self.out.parent / f".{self.out.stem}"):
            every: Sweep[Job] = Sweep(
                Cells(self.out, KEY, asked), self._learnt, lambda row: f"{row['success'][-1]:.2f}"
            )
            every.fill(Job(method, seed) for seed, method in product(self.seeds, self.methods))
        return 0

    def _learnt(self, job: Job) -> Row:
        began = time.perf_counter()
        made = learner(job.method, job.seed)
        before = made.frozen.weights
        base = play(base_actor(policy(), job.seed), self.episodes, EPISODES_SEED).success.mean().item()
        steps, success, returns = [], [], []
        try:
            for at in range(SETTINGS["every"], self.steps + 1, SETTINGS["every"]):
                made.learn(at, store=self.work / f"{job.method}_{job.seed}")
                if at < SETTINGS["warmup"]:
                    continue
                done = play(lambda seen, active: made.actions(seen), self.episodes, EPISODES_SEED)
                steps.append(at)
                success.append(done.success.mean().item())
                returns.append(done.returns.mean().item())
        except FAILURES as error:
            return job.row | {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
        return job.row | {
            "steps": steps,
            "success": success,
            "returns": returns,
            "base": base,
            "untouched": made.frozen.weights == before,
            "seconds": time.perf_counter() - began,
            **where_it_ran(),
        }


def page(rows: Sequence[Row]) -> str:
    """Success by steps, and the steps until it is twice the base's."""
    lines = ["# DSRL in the two-route maze", "", "Success in %, 95 % bootstrap intervals over seeds.", ""]
    for method in LEARNERS:
        found = [row for row in rows if row["method"] == method and "error" not in row]
        if not found:
            continue
        base = np.mean([row["base"] for row in found])
        lines += [f"## {method}", "", f"{len(found)} seeds, the base policy {100 * base:.0f}.", ""]
        lines += ["| steps | success | seeds at twice the base |", "|---:|---:|---:|"]
        for i, steps in enumerate(found[0]["steps"]):
            values = np.array([row["success"][i] for row in found])
            doubled = sum(value >= 2 * row["base"] for value, row in zip(values, found, strict=True))
            lines.append(f"| {steps} | {bootstrap(values[None]).text(100.0)} | {doubled} of {len(found)} |")
        lines.append("")
    return "\n".join(lines)


Report = reporting("policies/learning", KEY, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("learning", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
