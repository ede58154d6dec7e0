"""Whether intervals of log Z hold it, and what "ok" is worth: `make coverage`.

Each cell is one bed (`experiments.coverage.beds`, log Z known), one method and one number of samples: independent
searches in one session, a task each. Rows keep what every interval says, so that the report needs nothing else.

    all            share of the intervals that hold log Z
    ok             how many are relied on, and the share of those that hold it, with Wilson's interval
    called         share of the intervals that hold log Z that are relied on

Beds "design" were looked at while the rules were made, "held out" afterwards.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import treesearch as ts
from experiments.coverage.beds import BEDS, DESIGN, Bed
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row
from experiments.shared.sweep import Sweep, command_line
from treesearch.backends.guidance import DAS, TDS, TrustRegion
from treesearch.methods.claims import Z95, Standing
from treesearch.report.tables import markdown_table

KEY = ("bed", "method", "samples", "seed")
MACHINE = "two shared x86-64 cores, one used"
Setup = tuple[Any, Any]  # kernel, method


@dataclass(frozen=True)
class Entry:
    """A method: how to set it up, and what it asks of a bed.

    Args:
        make: bed, samples of one search -> kernel and method.
        gradient: it needs a gradient and Gaussian steps.
        large: whether it is tried with the larger number of samples, too.
    """

    make: Callable[[Bed, int], Setup]
    gradient: bool = False
    large: bool = True


def fk(**how: Any) -> Callable[[Bed, int], Setup]:
    """Feynman-Kac steering with settings of its own; one population unless they say otherwise."""
    share = how.pop("populations", 1)
    return lambda bed, n: (bed.kernel, ts.FeynmanKac(lam=bed.lam, num_particles=max(1, n // share), **how))


def on(guide: Callable[..., Any], inner: Callable[[Bed, int], Setup]) -> Callable[[Bed, int], Setup]:
    """The same on a guided kernel."""

    def make(bed: Bed, n: int) -> Setup:
        return guide(bed.kernel, bed.reward, lam=bed.lam), inner(bed, n)[1]

    return make


def das(bed: Bed, n: int) -> Setup:
    """DAS as published, its temperatures spread over the chain."""
    kernel = DAS(bed.kernel, bed.reward, lam=bed.lam, gamma=0.8 / bed.kernel.num_steps)
    levels = kernel.schedule
    how = {"schedule": levels, "tempering": kernel.tempering(levels), "resampling": "ssp"}
    return kernel, ts.FeynmanKac(lam=bed.lam, num_particles=n, **how)


def best(bed: Bed, n: int) -> Setup:
    """Best-of-N."""
    return bed.kernel, ts.BestOfN(lam=bed.lam)


def trees(bed: Bed, n: int) -> Setup:
    """TreeSampling."""
    return bed.kernel, ts.TreeSampling(lam=bed.lam)


METHODS: dict[str, Entry] = {
    "TreeSampling": Entry(trees),
    "TreeSampling, TrustRegion": Entry(on(TrustRegion, trees), gradient=True),
    "TreeSampling, TDS": Entry(on(TDS, trees), gradient=True, large=False),
    "best-of-N": Entry(best),
    "best-of-N, TrustRegion": Entry(on(TrustRegion, best), gradient=True),
    "best-of-N, TDS": Entry(on(TDS, best), gradient=True),
    "FK": Entry(fk()),
    "FK, max": Entry(fk(potential="max"), large=False),
    "FK, sum": Entry(fk(potential="sum"), large=False),
    "FK, immediate": Entry(fk(potential="immediate"), large=False),
    "FK, 4 populations": Entry(fk(populations=4), large=False),
    "FK, 8 populations": Entry(fk(populations=8)),
    "FK, 40 populations": Entry(fk(populations=40), large=False),
    "FK, multinomial, every level": Entry(fk(resampling="multinomial", ess_threshold=1.0), large=False),
    "FK, residual, .9": Entry(fk(resampling="residual", ess_threshold=0.9), large=False),
    "FK, stratified, .9": Entry(fk(resampling="stratified", ess_threshold=0.9), large=False),
    "FK, tempered by ESS": Entry(fk(tempering="ess"), large=False),
    "FK, TrustRegion": Entry(on(TrustRegion, fk()), gradient=True, large=False),
    "FK, TDS": Entry(on(TDS, fk()), gradient=True),
    "FK, DAS": Entry(das, gradient=True),
    "rejection": Entry(lambda bed, n: (bed.kernel, ts.Rejection(lam=bed.lam, r_max=bed.r_max or 0.0)), large=False),
}


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    bed: str
    method: str
    samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    beds: tuple[str, ...] = tuple(BEDS)
    """which beds"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    samples: tuple[int, ...] = (200, 1_000)
    """of one search"""
    searches: tuple[int, ...] = (25, 10)
    """of a cell, for each of them"""
    seed: int = 0
    """of all noise"""
    out: Path = Path("runs/results/coverage.jsonl")
    """one row a cell"""

    def run(self) -> int:
        made = cache(lambda name: BEDS[name]())

        def run(job: Job) -> Row:
            found = cell(made(job.bed), METHODS[job.method], job.samples, searches[job.samples], noise_of(job.row))
            return job.row | found

        searches = dict(zip(self.samples, self.searches, strict=True))
        jobs = ((samples, name, method) for samples in self.samples for name in self.beds for method in self.methods)
        every = Sweep(Cells(self.out, KEY), run, said)
        every.fill(Job(name, m, n, self.seed) for n, name, m in jobs if self._able(made(name), m, n))
        return 0

    def _able(self, bed: Bed, method: str, samples: int) -> bool:
        """Whether the bed allows the method, and it is tried with so many samples."""
        entry = METHODS[method]
        able = (bed.gradient or not entry.gradient) and (method != "rejection" or bed.r_max is not None)
        return able and (entry.large or samples == min(self.samples))


@dataclass(frozen=True, kw_only=True)
class Report:
    """The table of docs/certificate.md."""

    rows: Path = Path("runs/results/coverage.jsonl")
    """what `run` wrote"""

    def run(self) -> int:
        rows = Cells(self.rows, KEY).rows
        for held_out in (False, True):
            print(f"\n{'held out' if held_out else 'design'}\n")
            print(table([row for row in rows if (row["bed"] not in DESIGN) == held_out]))
        return 0


def noise_of(row: Row) -> int:
    """A seed of each cell's own: cells that share their draws would err together."""
    return zlib.crc32(repr([row[name] for name in KEY]).encode())


def cell(bed: Bed, entry: Entry, samples: int, searches: int, seed: int) -> Row:
    """Every interval of independent searches."""
    began = time.process_time()
    kernel, method = entry.make(bed, samples)
    budget = ts.Budget(nfe=samples * searches * bed.kernel.num_steps)
    how = {"prompts": list(range(searches)), "budget": budget, "batch_size": 8192, "keep_states": "none"}
    result = ts.search(kernel, bed.reward, method, seed=seed, **how)
    found = [task.certificate().log_z for task in result.tasks]
    return {
        "truth": bed.log_z,
        "log_z": [None if z.value == -float("inf") else z.value for z in found],
        "low": [None if z.low == -float("inf") else z.low for z in found],
        "high": [z.high for z in found],
        "standing": [str(z.standing) for z in found],
        "reason": [z.reason[:24] for z in found],
        "seconds": time.process_time() - began,
        "machine": MACHINE,
        "version": ts.__version__,
    }


def outcomes(row: Row) -> list[tuple[bool, bool]]:
    """Of each interval: it holds log Z, it is relied on."""
    low = [float("-inf") if a is None else a for a in row["low"]]
    every = zip(low, row["high"], row["standing"], strict=True)
    return [(a <= row["truth"] <= b, standing == Standing.OK) for a, b, standing in every if b is not None]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate."""
    spread, rate = Z95**2 / n, hits / n
    middle, half = rate + spread / 2, (rate * (1 - rate) * spread + spread**2 / 4) ** 0.5
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def summary(rows: Sequence[Row]) -> tuple[str, str, str, str]:
    """Intervals, those that hold log Z, the share of the relied on that do, and how many of the good are relied on."""
    found = [o for row in rows for o in outcomes(row)]
    if not found:
        return "0", "-", "-", "-"
    good, ok = [o for o in found if o[0]], [o for o in found if o[1]]
    hits = sum(o[0] for o in ok)
    worth = "never ok"
    if ok:
        low, high = wilson(hits, len(ok))
        worth = f"{hits / len(ok):.3f} ({low:.2f}..{high:.2f}) of {len(ok)}"
    called = f"{sum(o[1] for o in good) / len(good):.2f}" if good else "-"
    return str(len(found)), f"{len(good) / len(found):.3f}", worth, called


def table(rows: Sequence[Row]) -> str:
    """A line for each method and number of samples, over beds."""
    lines = []
    for samples in sorted({row["samples"] for row in rows}):
        for method in METHODS:
            if mine := [row for row in rows if (row["method"], row["samples"]) == (method, samples)]:
                lines.append([f"{method}, {samples}", *summary(mine)])
    return markdown_table(lines, ("method, samples", "intervals", "all hold", "ok ones hold", "good ones called ok"))


def said(row: Row) -> str:
    """What a cell says."""
    n, every, worth, called = summary([row])
    return f"{n} intervals, {every} hold; ok: {worth}, {called} called"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("coverage", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
