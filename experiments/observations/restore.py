"""Posteriors of digits by published rules and by search at equal cost, and whether they are calibrated.

    python -m experiments.observations.restore run
    python -m experiments.observations.restore report

Every sampler gets the same NFE + 2 · backward passes, those of 512 samples without a gradient, on the shipped MNIST
model with T steps. The truth of a problem is a draw of the model's own chain, one a seed, where the posterior is exact
by construction and ranks say whether draws are calibrated (`calibration`); or one of the shipped test digits, where
only the error of the mean is asked for. The noise of the observation is the seed's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import treesearch as ts
from experiments.observations import calibration
from experiments.observations.report import report
from experiments.observations.samplers import SAMPLERS, Bed, bed
from experiments.observations.tasks import TASKS, digits, misfit, observe, psnr, weighted
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import Sweep, command_line, reporting

KEY = ("task", "tolerance", "truth", "sampler", "seed")
PROBLEMS = {
    "inpainting": ("inpainting", 0.1),
    "super-resolution": ("super-resolution", 0.1),
    "de-blurring": ("de-blurring", 0.1),
    "fine super-resolution": ("super-resolution", 0.03),
}
TRUTHS, EACH = 1_000, 100  # where the seeds of truths begin, and how far those of two problems are apart
BATCH = 128


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    task: str
    tolerance: float
    truth: str
    sampler: str
    seed: int


def drawn(of: Bed, job: Job) -> Tensor:
    """x_0 (1, 28, 28) of the model's chain, another one for each problem and seed."""
    place = list(PROBLEMS.values()).index((job.task, job.tolerance))
    chance = torch.Generator("cpu").manual_seed(TRUTHS + EACH * place + job.seed)

    def noise() -> Tensor:
        return torch.randn(1, *of.kernel.state_shape, generator=chance, device="cpu")

    with torch.no_grad():
        x = of.kernel.prior(noise())
        for t in range(of.kernel.num_steps, 0, -1):
            x = of.kernel.transition(x, torch.tensor([t])).sample(noise())
    return x[0]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """which"""
    samplers: tuple[str, ...] = (
        "fk correlated",
        "fk steered",
        "tds",
        "dps",
        "steered",
        "fk",
        "dps proposal",
        "trees correlated",
    )
    """which"""
    seeds: tuple[int, ...] = tuple(range(5))
    """of truths, noise and search"""
    digits: tuple[int, ...] = (3, 5)
    """classes of the test digits"""
    num_steps: int = 10
    """T"""
    particles: int = 512
    """of a search without backward passes, which sets the budget of all"""
    out: Path = Path("runs/results/observations/restore.jsonl")
    """one row a cell"""
    threads: int = 1
    """of the model"""

    def run(self) -> int:
        torch.set_num_threads(self.threads)
        every = Sweep(Cells(self.out, KEY, {"num_steps": self.num_steps, "particles": self.particles}), self.cell, told)
        for problem in self.problems:
            task, tolerance = PROBLEMS[problem]
            every.fill(Job(task, tolerance, "model", name, seed) for seed in self.seeds for name in self.samplers)
        for problem in self.problems:
            task, tolerance = PROBLEMS[problem]
            every.fill(Job(task, tolerance, f"digit {d}", name, 0) for d in self.digits for name in self.samplers)
        return 0

    def cell(self, job: Job) -> Row:
        """Observe, search, judge."""
        of, task, sampler = bed(self.num_steps), TASKS[job.task], SAMPLERS[job.sampler]
        truth = drawn(of, job) if job.truth == "model" else digits()[int(job.truth.split()[1])]
        y = observe(truth, task.make(), job.tolerance, job.seed)
        n = sampler.particles(of, self.particles * self.num_steps)
        options = {"budget": ts.Budget(nfe=n * self.num_steps), "batch_size": BATCH, "progress": False}
        result = ts.search(sampler.kernel(of, task, y), y, sampler.method(of, n), seed=job.seed, **options)
        images, weights = weighted(result.tasks[0], exact=sampler.exact)
        mean, image = (weights[:, None, None, None] * images).sum(0), (truth + 1) / 2
        row = job.row | {
            "samples": len(images),
            "num_steps": self.num_steps,
            "work": result.cost.nfe + 2 * result.cost.backward_nfe,
            "psnr": psnr(mean, image),
            "misfit": misfit(images, weights, y),
            "seconds": result.cost.seconds,
        }
        if sampler.exact:
            row |= evidence(result.tasks[0])
        if job.truth == "model":
            values, of_truth = calibration.functionals(images), calibration.functionals(image[None])[0]
            row["ranks"] = calibration.ranks(values, weights, of_truth, job.seed).tolist()
        return row | where_it_ran()


def evidence(found: ts.TaskResult) -> Row:
    """What weights can say."""
    told = found.certificate()
    z = told.log_z
    levels = found.diagnostics.get("ess_levels", [[]])[-1]
    interval = {"low": z.low, "high": z.high, "standing": str(z.standing)}
    return {"ess": told.ess, "roots": told.lineages, "log_z": z.value, "ess_levels": list(levels)} | interval


def told(row: Row) -> str:
    """What a cell says."""
    exact = f", ESS {row['ess']:.1f}, {row['roots']} roots, log Z {row['log_z']:.1f}" if "ess" in row else ""
    return f"{row['samples']} samples, PSNR {row['psnr']:.1f} dB, misfit {row['misfit']:.2f}{exact}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line(
        "restore", {"run": Run, "report": reporting("observations/restore", KEY, report)}, argv, __doc__
    )


if __name__ == "__main__":
    sys.exit(main())
