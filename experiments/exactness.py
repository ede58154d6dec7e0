"""How far each estimate of Z is from the truth on the Gaussian chain: python -m experiments.exactness

Linear-Gaussian chain (T = 5, data N(.3, .8²)), r = 1.2 x, λ = 1, log Z = .8208 in closed form. Each cell is the mean of
exp(log_z)/Z over independent tasks with its standard error and standard deviation; 1 is exact. Figures go to JSON.
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
from backends.gaussian import LinearGaussian, Tilt
from rewards.base import as_reward
from treesearch.report import markdown


@dataclass(frozen=True)
class Args:
    """Arguments."""

    replicates: int = 2_000
    """independent tasks a cell"""
    seed: int = 0
    """of all noise"""
    out: Path = Path("experiments/results/exactness.json")
    """figures as JSON"""


# name, method, NFE of one task, None for budgets in iterations
CELLS: list[tuple[str, Any, dict[str, int]]] = [
    ("best-of-N, N = 32", ts.BestOfN(), {"nfe": 160}),
    ("FK, K = 32, difference", ts.FeynmanKac(num_particles=32), {"nfe": 160}),
    ("FK, K = 32, max", ts.FeynmanKac(num_particles=32, potential="max"), {"nfe": 160}),
    ("FK, K = 32, immediate", ts.FeynmanKac(num_particles=32, potential="immediate"), {"nfe": 160}),
    ("FK, 8 populations of K = 4, merged", ts.FeynmanKac(num_particles=4), {"nfe": 160}),
    ("FK, K = 32, tempering='ess' (consistent only)", ts.FeynmanKac(num_particles=32, tempering="ess"), {"nfe": 160}),
    ("DTS, round robin, 100 iterations", ts.DiffusionTreeSampling(selection="round_robin"), {"iterations": 100}),
    ("DTS, boltzmann, 100 iterations", ts.DiffusionTreeSampling(), {"iterations": 100}),
    ("DTS, boltzmann, 400 iterations", ts.DiffusionTreeSampling(), {"iterations": 400}),
    (
        "DTS, boltzmann, 400 iterations, (C, α) = (1, .5)",
        ts.DiffusionTreeSampling(widening_c=1, widening_alpha=0.5),
        {"iterations": 400},
    ),
]


def cell(method: Any, each: dict[str, int], args: Args) -> dict[str, float]:
    """Mean, standard error and deviation of exp(log_z)/Z over replicates."""
    kernel, reward = LinearGaussian(), as_reward(lambda x, prompts=None: 1.2 * x[:, 0], name="1.2 x")
    exact = kernel.tilted(Tilt(c=1.2)).log_z
    z: list[float] = []
    while len(z) < args.replicates:
        tasks = min(250, args.replicates - len(z))
        budget = ts.Budget(**{name: value * tasks for name, value in each.items()})
        prompts, seed = list(range(tasks)), args.seed * 1_000_003 + len(z)
        found = ts.search(kernel, reward, method, prompts=prompts, budget=budget, seed=seed, batch_size=4096)
        z += [math.exp(task.log_z - exact) for task in found.tasks]
    return {
        "mean": float(np.mean(z)),
        "se": float(np.std(z, ddof=1) / math.sqrt(len(z))),
        "sd": float(np.std(z, ddof=1)),
    }


def main() -> None:
    """Fill every cell, print the table, write the figures."""
    args = tyro.cli(Args)
    found = {name: cell(method, each, args) for name, method, each in CELLS}
    rows = [[name, f"{c['mean']:.3f} ± {c['se']:.3f}", f"{c['sd']:.3f}"] for name, c in found.items()]
    print(markdown(rows, ("estimate", "E[Ẑ]/Z", "sd of Ẑ/Z")))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"replicates": args.replicates, "seed": args.seed, "cells": found}, indent=2) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
