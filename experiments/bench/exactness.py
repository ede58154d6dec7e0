"""How far each estimate of Z is from the truth on chains in closed form: python -m experiments.bench.exactness

    chain      T = 5, data N(.3, .8²), r = 1.2 x: log Z = .8208
    eight-D    T = 20, data N(.3, .8² I) in 8-D, r = 2 c·x, |c| = 1
    mixture    T = 6, two Gaussians, exact mixture steps, r = x

λ = 1. Each cell is the mean of exp(log_z)/Z over independent tasks with its standard error and standard deviation, and
the share of 95 % intervals log_z ± 1.96 log_z_se that hold log Z, where there is a standard error. Figures go to JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import treesearch as ts
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian, Tilt
from treesearch.report.tables import markdown_table
from treesearch.rewards.analytic import linear


@dataclass(frozen=True)
class Args:
    """Arguments."""

    replicates: int = 2_000
    """independent tasks a cell"""
    seed: int = 0
    """of all noise"""
    out: Path = Path("runs/results/exactness.json")
    """figures as JSON"""


TWO = GaussianMixture(num_steps=6, weights=(1.0, 3.0), means=((-1.0,), (1.0,)), stds=(0.5, 0.3))
BEDS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "chain": (LinearGaussian(), (1.2,)),
    "eight-D": (LinearGaussian(num_steps=20, dim=8), (2 / 8**0.5,) * 8),
    "mixture": (TWO, (1.0,)),
}
# name, bed, method, budget of one task
CELLS: list[tuple[str, str, Any, dict[str, int]]] = [
    ("best-of-N, N = 32", "chain", ts.BestOfN(), {"nfe": 160}),
    ("best-of-N, N = 100", "chain", ts.BestOfN(), {"nfe": 500}),
    ("best-of-N, N = 400", "chain", ts.BestOfN(), {"nfe": 2_000}),
    ("FK, K = 32, difference", "chain", ts.FeynmanKac(num_particles=32), {"nfe": 160}),
    ("FK, K = 32, max", "chain", ts.FeynmanKac(num_particles=32, potential="max"), {"nfe": 160}),
    ("FK, K = 32, immediate", "chain", ts.FeynmanKac(num_particles=32, potential="immediate"), {"nfe": 160}),
    ("FK, 8 populations of K = 4, merged", "chain", ts.FeynmanKac(num_particles=4), {"nfe": 160}),
    (
        "FK, K = 32, tempering='ess' (consistent only)",
        "chain",
        ts.FeynmanKac(num_particles=32, tempering="ess"),
        {"nfe": 160},
    ),
    (
        "DTS, round robin, 100 iterations",
        "chain",
        ts.DiffusionTreeSampling(selection="round_robin"),
        {"iterations": 100},
    ),
    ("DTS, boltzmann, 100 iterations", "chain", ts.DiffusionTreeSampling(), {"iterations": 100}),
    ("DTS, boltzmann, 400 iterations", "chain", ts.DiffusionTreeSampling(), {"iterations": 400}),
    (
        "DTS, boltzmann, 400 iterations, (C, α) = (1, .5)",
        "chain",
        ts.DiffusionTreeSampling(widening_c=1, widening_alpha=0.5),
        {"iterations": 400},
    ),
    ("TreeSampling, 100 iterations", "chain", ts.TreeSampling(), {"iterations": 100}),
    ("TreeSampling, 400 iterations", "chain", ts.TreeSampling(), {"iterations": 400}),
    ("best-of-N, N = 400", "eight-D", ts.BestOfN(), {"iterations": 400}),
    ("TreeSampling, 400 iterations", "eight-D", ts.TreeSampling(), {"iterations": 400}),
    ("best-of-N, N = 400", "mixture", ts.BestOfN(), {"iterations": 400}),
    ("TreeSampling, 400 iterations", "mixture", ts.TreeSampling(), {"iterations": 400}),
]


def cell(bed: str, method: Any, each: dict[str, int], args: Args) -> dict[str, float | None]:
    """Mean, standard error and deviation of exp(log_z)/Z over replicates, and coverage."""
    kernel, c = BEDS[bed]
    exact, reward = kernel.tilted(Tilt(c=c)).log_z, linear(c)
    gaps: list[float] = []
    errors: list[float | None] = []
    while len(gaps) < args.replicates:
        tasks = min(250, args.replicates - len(gaps))
        budget = ts.Budget(**{name: value * tasks for name, value in each.items()})
        prompts, seed = list(range(tasks)), args.seed * 1_000_003 + len(gaps)
        found = ts.search(kernel, reward, method, prompts=prompts, budget=budget, seed=seed, batch_size=4096)
        gaps += [task.log_z - exact for task in found.tasks]
        errors += [task.log_z_se for task in found.tasks]
    inside = [abs(gap) < 1.96 * se for gap, se in zip(gaps, errors, strict=True) if se is not None]
    z = np.exp(gaps)
    return {
        "mean": float(np.mean(z)),
        "se": float(np.std(z, ddof=1) / math.sqrt(len(z))),
        "sd": float(np.std(z, ddof=1)),
        "coverage": float(np.mean(inside)) if inside else None,
        "intervals": len(inside),
    }


def table(found: dict[str, dict[str, float | None]]) -> str:
    """Cells as Markdown."""
    rows = [
        [
            name,
            f"{c['mean']:.3f} ± {c['se']:.3f}",
            f"{c['sd']:.3f}",
            "-" if c["coverage"] is None else f"{c['coverage']:.3f} of {c['intervals']:.0f}",
        ]
        for name, c in found.items()
    ]
    return markdown_table(rows, ("estimate", "E[Ẑ]/Z", "sd of Ẑ/Z", "coverage"))


def main() -> None:
    """Fill every cell, print the table, write the figures."""
    args = tyro.cli(Args)
    found = {f"{bed}: {name}": cell(bed, method, each, args) for name, bed, method, each in CELLS}
    print(table(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"replicates": args.replicates, "seed": args.seed, "cells": found}, indent=2) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
