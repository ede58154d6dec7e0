"""How far a thing in a picture goes where it should: DiffEditor's single shot, and searches with it, at equal NFE.

    python -m experiments.roots.drag run
    python -m experiments.roots.drag report

    edit        an arm on a case: pixels between the centroid and where it should be, background, and the judge
    spread      log p/q of rollouts, and the ESS of Feynman-Kac particles, with noise in the region or everywhere
    energy      E_edit along the guided steps beside the same states' without a guide, and what the gradients' regions
                spare outside

Arms "published" take the rule of the paper, whose shifts have no weights; "weights" propose with exact ones under noise
at every level of the region. Inversions (3 T evaluations) and tables of features (one a guided level) are paid beside.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import treesearch as ts
from experiments.roots.drags import BEDS, CASES, Case, guided, noisy, plain, points
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import bootstrap, mean_se
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from treesearch.report.tables import markdown_table

KEY = ("kind", "bed", "case", "arm", "seed")
T, NFE, PARTICLES = 25, 200, 8
FK = ts.FeynmanKac(num_particles=PARTICLES, lam=2.0)
ARMS = {  # kernel, method, steps, NFE
    "published, single shot": ("published", ts.BestOfN(n=1), T, T),
    "published, single shot of 200 steps": ("published", ts.BestOfN(n=1), NFE, NFE),
    "published, a point dragged, single shot": ("point", ts.BestOfN(n=1), T, T),
    "published, best of n": ("published", ts.BestOfN(), T, NFE),
    "published, TreeSearch": ("published", ts.TreeSearch(), T, NFE),
    "weights, FK": ("weights", FK, T, NFE),
    "weights, TreeSearch": ("weights", ts.TreeSearch(), T, NFE),
    "no energies, TreeSearch": ("none", ts.TreeSearch(), T, NFE),
}
LONG = "published, single shot of 200 steps"
OF_SPREAD = CASES[::2]
OF_DIGITS = ("published, single shot", "published, best of n")
SPREADS = {f"{where}, κ = {scale:g}": (where == "everywhere", scale) for where in ("region", "everywhere")
           for scale in (40.0, 400.0)}  # fmt: skip


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    kind: str
    bed: str
    case: int
    arm: str
    seed: int


def measured(job: Job) -> Row:
    """A cell."""
    how = {"edit": edit, "spread": spread, "energy": energy}[job.kind]
    try:
        return job.row | how(Case(job.bed, job.case), job.arm, job.seed) | where_it_ran()
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()


def searched(case: Case, kernel: Any, method: Any, nfe: int, seed: int) -> Any:
    return ts.search(kernel, case.reward, method, prompts=case.prompts, budget=ts.Budget(nfe=nfe), seed=seed)


def edit(case: Case, arm: str, seed: int) -> Row:
    """The best sample of an arm."""
    how, method, steps, nfe = ARMS[arm]
    kernels = {
        "published": lambda: guided(case, steps, weights=False),
        "point": lambda: guided(case, steps, weights=False, regions=points(case)),
        "weights": lambda: guided(case, steps, weights=True),
        "none": lambda: noisy(case, steps, published=False),
    }
    found = searched(case, kernels[how](), method, nfe, seed)
    best = found.best(1)[0]
    seen = {name: float(getattr(case, name)(best)[0]) for name in ("away", "background", "overlap")}
    return seen | {"nfe": found.cost.nfe}


def spread(case: Case, arm: str, seed: int) -> Row:
    """log p/q of rollouts without a reward, and the ESS of particles with one."""
    everywhere, scale = SPREADS[arm]
    kernel = guided(case, T, weights=True, everywhere=everywhere, scale=scale)
    rolled = searched(case, kernel, ts.BestOfN(lam=0.0), NFE, seed).tasks[0]
    particles = searched(case, kernel, FK, NFE, seed).tasks[0]
    return {"std": float(rolled.log_weights.std()), "ess": float(particles.diagnostics["ess"]) / PARTICLES}


@torch.no_grad()
def energy(case: Case, arm: str, seed: int) -> Row:
    """E_edit at guided levels without noise, of an arm and of the chain that is not guided; what changes outside."""
    editor = guided(case, T, weights=False)
    if arm == "everywhere":
        editor._places.target = torch.ones_like(case.mask)  # the edit's gradient alone, at every entry
    base, path, cond = plain(case.bed, T), case.path(T), case.cond(T)
    levels = [t for t, n in enumerate(editor.backward_per_nfe) if n]
    x, told = path[-1], []
    for t in range(T, 0, -1):
        level = torch.tensor([t])
        if t in levels:
            told.append(float(editor.energies(x, level, cond)[0]))
        x = (base if arm == "none" else editor).transition(x, level, cond).mean
    return {"energy": told, "background": float(case.background(base.decode(x))[0])}


def jobs(seeds: Sequence[int]) -> list[Job]:
    """All cells; what is wanted most comes first."""
    found = [Job("energy", bed, c, arm, 0) for bed in BEDS for c in CASES for arm in ("regional", "everywhere", "none")]
    for seed in seeds:
        found += [Job("spread", "scenes", c, arm, seed) for c in OF_SPREAD for arm in SPREADS]
    for seed in seeds:
        arms = [arm for arm in ARMS if arm != LONG or seed == seeds[0]]
        found += [Job("edit", "scenes", c, arm, seed) for c in CASES for arm in arms]
        found += [Job("edit", "digits", c, arm, seed) for arm in OF_DIGITS for c in CASES if seed == seeds[0]]
    return found


def table(rows: Sequence[Row], name: str, cases: Sequence[int]) -> np.ndarray:
    """A figure (seeds, cases) of the seeds that have all cases."""
    known = {(row["seed"], row["case"]): row[name] for row in rows}
    seeds = [seed for seed in sorted({row["seed"] for row in rows}) if all((seed, case) in known for case in cases)]
    return np.array([[known[seed, case] for case in cases] for seed in seeds], float)


def edit_lines(rows: Sequence[Row], bed: str) -> list[list[str]]:
    """One line an arm."""
    lines = []
    for arm in ARMS:
        mine = [row for row in rows if (row["kind"], row["bed"], row["arm"]) == ("edit", bed, arm)]
        away, seen, outside = (table(mine, name, CASES) for name in ("away", "overlap", "background"))
        if len(away):
            lines.append([arm, str(ARMS[arm][3]), bootstrap(1.0 * (away <= 1)).text(), mean_se(away.mean(1)).text(),
                          bootstrap(1.0 * (seen > 0.6)).text(),
                          mean_se(1e3 * outside.mean(1)).text(), str(len(away))])  # fmt: skip
    return lines


def spread_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a place of noise and a scale."""
    lines = []
    for arm in SPREADS:
        mine = [row for row in rows if (row["kind"], row["arm"]) == ("spread", arm)]
        std, ess = (table(mine, name, OF_SPREAD) for name in ("std", "ess"))
        if len(std):
            lines.append([arm, mean_se(std.mean(1)).text(), bootstrap(ess).text(), str(len(std))])
    return lines


def energy_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a bed."""
    lines = []
    for bed in BEDS:
        mine = {(row["arm"], row["case"]): row for row in rows if (row["kind"], row["bed"]) == ("energy", bed)}
        if not mine:
            continue
        pairs = [(mine["regional", c]["energy"][1:], mine["none", c]["energy"][1:]) for c in CASES]
        lower = sum(a < b for one, other in pairs for a, b in zip(one, other, strict=True))
        last = [np.mean([each[i][-1] for each in pairs]) for i in range(2)]
        spared = sum(mine["regional", c]["background"] < mine["everywhere", c]["background"] for c in CASES)
        outside = [1e3 * np.mean([mine[arm, c]["background"] for c in CASES]) for arm in ("regional", "everywhere")]
        lines.append([bed, f"{lower} of {sum(len(one) for one, _ in pairs)}", f"{last[0]:.3f} / {last[1]:.3f}",
                      f"{spared} of {len(CASES)}", f"{outside[0]:.2f} / {outside[1]:.2f}"])  # fmt: skip
    return lines


def report(rows: Sequence[Row]) -> str:
    """The page."""
    heads = ["arm", "NFE", "within 1 px, %", "distance, px", "judge, %", "background, 10⁻³", "seeds"]
    parts = [
        "# Things that are to go elsewhere",
        "By `python -m experiments.roots.drag report`. Eight cases a bed; shares with 95 % intervals of a bootstrap"
        " over cases, seeds pooled; distances and backgrounds are means over seeds with their standard error.",
    ]
    for bed in BEDS:
        lines = edit_lines(rows, bed)
        parts += [f"## {bed.capitalize()}", markdown_table(lines, heads)] if lines else []
    parts += [
        "## Weights",
        "Four of the scenes, noise at every level (η = 1), exact weights: the standard deviation of log p/q over 8"
        " rollouts without a reward, and the ESS of 8 particles at the end of Feynman-Kac (λ = 2), per cent of their"
        " number.",
        markdown_table(spread_lines(rows), ["noise and scale", "std of log p/q", "ESS, %", "seeds"]),
        "## Energies",
        "By the published rule without noise: at how many guided levels after the first E_edit is lower than without a"
        " guide, and what both are at the last one; in how many cases the background changes less than with the"
        " gradient of E_edit at every entry, and what both are, 10⁻³.",
        markdown_table(energy_lines(rows), ["bed", "levels where it is lower", "at the last", "spared", "background"]),
    ]
    failed = [row for row in rows if "error" in row]
    parts += [f"{len(failed)} cells failed, the first with: {failed[0]['error']}"] if failed else []
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    out: Path = Path("runs/results/roots/drag.jsonl")
    """one row a cell"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    kinds: tuple[str, ...] = ("energy", "edit", "spread")
    threads: int = 1

    def run(self) -> int:
        torch.set_num_threads(self.threads)
        words = lambda row: ", ".join(f"{name} {row[name]:.3g}" for name in ("away", "std") if name in row)  # noqa: E731
        Sweep(Cells(self.out, KEY), measured, words).fill(job for job in jobs(self.seeds) if job.kind in self.kinds)
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("drag", {"run": Run, "report": reporting("roots/drag", KEY, report)}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
