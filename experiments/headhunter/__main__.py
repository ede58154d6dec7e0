"""Hunt attention heads for a reward, and judge them on pairs that the hunt has not seen.

    python -m experiments.headhunter run --kernel 'mnist(num_steps=10)' --reward 'digit(8).clip(-10, 0)' --rounds 2
    python -m experiments.headhunter run --kernel 'diffusers("FOLDER", num_steps=10)' --reward ... --prompts "a cat"
    python -m experiments.headhunter report

Cells are sets of heads on pairs of prompt and seed; run again to go on. Every kernel and reward of the command line can
be asked, plug-ins too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import treesearch as ts
from experiments.headhunter import report
from experiments.headhunter.hunt import HeadSet, by_part, every_head, hunt, layers, others, written
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import Sweep, command_line, reporting
from treesearch.backends import softpag
from treesearch.backends.interventions.base import network_of
from treesearch.backends.interventions.heads import attentions
from treesearch.registry import registry

HUNTED, HELD = 1, 2  # seeds of the pairs


@cache
def model(kernel: str) -> Any:
    """A kernel, made once."""
    return registry.kernel(kernel)


@dataclass(frozen=True)
class Job(sweep.Job):
    """Rewards of draws under a set of heads: `n` of each prompt, with a seed."""

    kernel: str
    reward: str
    prompts: tuple[str, ...]
    u: float
    scale: float
    heads: str
    seed: int
    n: int

    @property
    def row(self) -> Row:
        return super().row | {"prompts": list(self.prompts)}  # as a file has it


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    kernel: str = "mnist(num_steps=10)"
    """as on the command line of treesearch"""
    reward: str = "digit(8).clip(-10, 0)"
    """likewise"""
    prompts: tuple[str, ...] = ()
    """for kernels that take them"""
    rounds: int = 2
    k: int = 1
    """heads added in a round"""
    u: float = 1.0
    """strength of the perturbation"""
    scale: float = 3.0
    """w, of the guidance away from it"""
    n: int = 64
    """draws of each prompt in the hunt"""
    held: int = 256
    """and in the judgement, with another seed"""
    sets: int = 12
    """most sets of the same size that are drawn"""
    out: Path = Path("runs/results/headhunter.jsonl")
    """one row a cell"""

    def run(self) -> int:
        if min(self.rounds, self.k, self.n, self.held) < 1:
            raise ValueError("rounds, k, n and held must be at least 1")
        heads = every_head(attentions(network_of(model(self.kernel))))
        if len(heads) < 2:
            raise ValueError(f"{self.kernel} has {len(heads)} heads of self-attention: there is nothing to choose")
        cells = Cells(self.out, report.KEY)
        filled = Sweep(cells, lambda job: cell(job, heads), lambda row: f"mean {row['mean']:.4g}")

        def score(of: HeadSet) -> float:
            job = self.job(of, HUNTED, self.n)
            filled.fill([job])
            return cells.where(**job.row)[0]["mean"]

        found = hunt(heads, score, self.rounds, self.k)
        best = max(layers(heads), key=score)
        judged = dict.fromkeys([(), *found, *layers(heads), heads, *others(heads, found[-1], self.sets)])
        filled.fill(self.job(of, HELD, self.held) for of in judged)
        said = {"rounds": [written(of) for of in found], "layer": written(best), "k": self.k, "of": len(heads)}
        asked = self.job((), HELD, self.held).row | {"heads": "chosen"}
        if asked not in cells:
            random = [written(of) for of in others(heads, found[-1], self.sets)]
            cells.add(
                asked | said | {"hunted": self.n, "random": random, "layers": [written(of) for of in layers(heads)]}
            )
        return 0

    def job(self, of: HeadSet, seed: int, n: int) -> Job:
        """The cell of a set."""
        return Job(self.kernel, self.reward, self.prompts, self.u, self.scale, written(of), seed, n)


def cell(job: Job, heads: HeadSet) -> Row:
    """Rewards of draws, one for each pair."""
    began, kernel = time.process_time(), model(job.kernel)
    of = tuple(head for head in heads if head in _read(job.heads))
    guided = softpag(kernel, by_part(of), job.u, job.scale) if of else kernel
    prompts = list(job.prompts) or None
    budget = ts.Budget(nfe=job.n * kernel.num_steps * max(1, len(job.prompts)))
    method = ts.BestOfN(n=job.n)
    result = ts.search(
        guided, registry.reward(job.reward), method, prompts=prompts, seed=job.seed, budget=budget, progress=False
    )
    rewards = [float(value) for task in result.tasks for value in task.rewards]
    return job.row | {
        "rewards": rewards,
        "mean": sum(rewards) / len(rewards),
        "nfe": result.cost.nfe,
        "seconds": time.process_time() - began,
    } | where_it_ran()  # fmt: skip


def _read(heads: str) -> set[tuple[str, int]]:
    """Heads as `written` has them."""
    parts: Iterable[list[str]] = (part.split() for part in heads.split("; ") if part)
    return {(name, int(head)) for name, *of in parts for head in of}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line(
        "headhunter", {"run": Run, "report": reporting("headhunter", report.KEY, report.page)}, argv, __doc__
    )


if __name__ == "__main__":
    sys.exit(main())
