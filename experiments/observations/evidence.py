"""log p(y) where it is known: bias, and intervals that hold it or not: `make observations`.

Each cell is one bed, operator, tolerance, observation and arm: independent searches in one session, a task each, of
20,000 NFE. All arms weigh by log p/q, so that all aim at the same log p(y); they differ in what they propose and in
what noisy states are scored by.

    Steered      the calibrated pull, and v_t, with S_t measured by a pilot of 256 rollouts: how misses go together
    one r_t      the same with their root mean square alone, S_t = r_t² I
    endpoint     the kernel's own steps, and the likelihood of the endpoint
    TDS, DPS, FlowChef      guides by the gradient of that likelihood, and the likelihood of the endpoint
    projection   the published projection of Steered Diffusion as a proposal with weights, and v_t

DPS moves each step by half the length of its noise; FlowChef moves the endpoint by a tenth of what y and A x̂_0 differ.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import treesearch as ts
from experiments.observations.beds import BEDS, STEPS, Bed, Seen, bed
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import Sweep, command_line
from treesearch.backends.base import Cond, Gaussian, Wrapper
from treesearch.backends.guidance import DPS, TDS, FlowChef, Steered
from treesearch.methods.base import Method

KEY = ("bed", "operator", "tolerance", "observation", "arm")
EVERY = (*range(STEPS - 1, 1, -1), 0)
NFE = 20_000
TOLERANCES = (0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Projected(Wrapper):
    """The published projection as a proposal: steps of `Steered(rule="paper")` with the weights and values of another.

    Args:
        kernel: steered and calibrated.
        paper: the same, by the published rule.
    """

    paper: Steered

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        law = self.kernel.transition(x, t, cond)
        mean = self.paper.transition(x, t, cond).mean
        return replace(law, mean=torch.where(law.std > 0, mean, law.mean))

    @property
    def scores(self) -> Any:
        """The observation."""
        return self.kernel.scores


def steered(of: Bed, seen: Seen) -> Steered:
    """Calibrated, with the covariance that a pilot measured."""
    return Steered(of.kernel, seen.reward, spread=of.spread)


def projected(of: Bed, seen: Seen) -> Projected:
    """Projected as published, with weights."""
    return Projected(steered(of, seen), Steered(of.kernel, seen.reward, rule="paper"))


FK = ts.FeynmanKac(schedule=EVERY, num_particles=NFE // STEPS)
ARMS: dict[str, tuple[Callable[[Bed, Seen, float], Any], Method]] = {
    "Steered, FK": (lambda of, seen, tolerance: steered(of, seen), FK),
    "one r_t, FK": (lambda of, seen, tolerance: Steered(of.kernel, seen.reward, spread=of.spread.state), FK),
    "endpoint, FK": (lambda of, seen, tolerance: of.kernel, FK),
    "TDS, FK": (lambda of, seen, tolerance: TDS(of.kernel, seen.reward), FK),
    "DPS, FK": (lambda of, seen, tolerance: DPS(of.kernel, seen.reward, scale=0.5, normalise="gradient"), FK),
    "FlowChef, FK": (lambda of, seen, tolerance: FlowChef(of.kernel, seen.reward, scale=0.1 * tolerance**2), FK),
    "projection, FK": (lambda of, seen, tolerance: projected(of, seen), FK),
    "Steered, TreeSampling": (lambda of, seen, tolerance: steered(of, seen), ts.TreeSampling()),
}
ASKED = ("Steered, FK", "Steered, TreeSampling")  # arms whose bias and coverage are asked


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    bed: str
    operator: str
    tolerance: float
    observation: int
    arm: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    observations: int = 25
    """of each bed and operator"""
    searches: int = 20
    """of each, shared by the operators of a bed"""
    few: int = 3
    """observations of the arms that nothing is asked of"""
    beside: int = 6
    """their searches"""
    beds: tuple[str, ...] = tuple(BEDS)
    """which beds"""
    arms: tuple[str, ...] = tuple(ARMS)
    """which arms"""
    tolerances: tuple[float, ...] = TOLERANCES
    """which tolerances"""
    nfe: int = NFE
    """of a search"""
    out: Path = Path("runs/results/evidence.jsonl")
    """one row a cell"""

    def run(self) -> int:
        def run(job: Job) -> Row:
            every = self.searches if job.arm in ASKED else self.beside
            return job.row | cell(job, -(-every // len(BEDS[job.bed])), self.nfe)

        asked = {"searches": self.searches, "beside": self.beside, "nfe": self.nfe}
        Sweep(Cells(self.out, KEY, asked), run, said).fill(
            Job(name, operator, tolerance, observation, arm)
            for observation in range(self.observations)
            for arm in self.arms
            if arm in ASKED or observation < self.few
            for name in self.beds
            for tolerance in self.tolerances
            for operator in BEDS[name]
        )
        return 0


def cell(job: Job, searches: int, nfe: int = NFE) -> Row:
    """Every interval of independent searches of one observation."""
    began, of = time.process_time(), bed(job.bed, job.operator)
    seen = of.seen(job.tolerance, job.observation)
    make, method = ARMS[job.arm]
    if isinstance(method, ts.FeynmanKac):
        method = replace(method, num_particles=nfe // STEPS)
    how = {"prompts": list(range(searches)), "batch_size": 8192, "keep_states": "none", "progress": False}
    seed = zlib.crc32(repr(job).encode())  # of each cell's own: cells that share their draws would err together
    kernel, budget = make(of, seen, job.tolerance), ts.Budget(nfe=nfe * searches)
    result = ts.search(kernel, seen.reward, method, seed=seed, budget=budget, **how)
    found = [task.certificate().log_z for task in result.tasks]
    return {
        "truth": seen.posterior.log_evidence,
        "log_z": [z.value for z in found],
        "low": [z.low for z in found],
        "high": [z.high for z in found],
        "standing": [str(z.standing) for z in found],
        "backward_nfe": result.cost.backward_nfe,
        "seconds": time.process_time() - began,
    } | where_it_ran()


def said(row: Row) -> str:
    """What a cell says."""
    found = [z - row["truth"] for z in row["log_z"] if z is not None]
    return f"{len(found)} searches, log Z off by {sum(found) / max(1, len(found)):+.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("observations", {"run": Run}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
