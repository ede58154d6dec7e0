"""What a declared value is worth, where log Z is known: python -m experiments.bench.values

    x_0 ~ N(0, I) in 6-D, T = 40, y = A x_0 in 2-D up to a tolerance, r = log N(y; A x_0, tolerance²), λ = 1
    V_t(x_t) = log N(y; A x̂_0, (1 - ᾱ_t) A Aᵀ + tolerance²)          the soft value, in closed form

Endpoints, `Valued` and `TDS` with V_t, by Feynman-Kac steering and by tree sampling at every level; "fitted" hides from
tree sampling that it is told values. Figures are log Ẑ - log Z and reported standard errors by seed, as JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import treesearch as ts
from treesearch.backends.base import Wrapper
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS, Valued
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward

F64 = torch.float64


@dataclass(frozen=True)
class Args:
    """Arguments."""

    rollouts: tuple[int, ...] = (48, 256)
    """of a search"""
    seeds: int = 5
    """searches a cell"""
    num_steps: int = 40
    """T"""
    tolerances: tuple[float, ...] = (0.1, 0.03)
    """of the measurement"""
    out: Path = Path("runs/results/values.json")
    """figures as JSON"""


class Measurement:
    """The bed: a chain, its reward, and the soft value in closed form."""

    def __init__(self, tolerance: float, num_steps: int) -> None:
        draw, self.tolerance = torch.Generator().manual_seed(3), tolerance
        self.kernel = LinearGaussian(num_steps=num_steps, dim=6, mean=0.0, std=1.0)
        self.A = torch.randn(2, 6, generator=draw, dtype=F64) / math.sqrt(6)
        self.y = self.A @ torch.randn(6, generator=draw, dtype=F64)
        self.noise = tolerance**2 * torch.eye(2, dtype=F64)
        self.reward = Reward(lambda x, _: self.density(x, torch.zeros(len(x), dtype=F64)), "measurement")
        self.log_z = float(self.density(torch.zeros(1, 6, dtype=F64), torch.ones(1, dtype=F64)))

    def density(self, mean: Tensor, rest: Tensor) -> Tensor:
        """log N(y; A mean, rest A Aᵀ + tolerance²), (n,)."""
        cov = rest[:, None, None] * (self.A @ self.A.T) + self.noise
        gap = self.y - mean @ self.A.T
        size = torch.linalg.solve(cov, gap[..., None])[..., 0]
        return -0.5 * ((gap * size).sum(1) + torch.logdet(cov) + 2 * math.log(2 * math.pi))

    def value(self, x: Tensor, t: Tensor, law: Any, cond: Any) -> Tensor:
        """V_t."""
        return self.density(law.endpoint, 1 - self.kernel.reverse.bar[t])


class Fitted(Wrapper):
    """A kernel that does not say that what it knows are declared values."""

    valued = False


def main() -> None:
    args = tyro.cli(Args)
    cells = [c for n in args.rollouts for tolerance in args.tolerances for c in measure(tolerance, n, args)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"args": vars(args) | {"out": None}, "cells": cells}, indent=1) + "\n")
    lines = [
        [str(c["rollouts"]), f"{c['tolerance']:g}", c["method"], c["by"], f"{c['mean']:.3g}", f"{c['worst']:.3g}"]
        for c in cells
    ]
    print(markdown_table(lines, ["rollouts", "tolerance", "method", "scored by", "mean log Ẑ - log Z", "worst"]))


def measure(tolerance: float, rollouts: int, args: Args) -> list[dict[str, Any]]:
    """A cell for each method and way of scoring."""
    bed, every = Measurement(tolerance, args.num_steps), tuple(range(args.num_steps, -1, -1))
    guided = TDS(bed.kernel, bed.reward, value=bed.value)
    ways: dict[str, Any] = {
        "endpoints": bed.kernel,
        "Valued": Valued(bed.kernel, bed.reward, bed.value),
        "Valued, fitted": Fitted(Valued(bed.kernel, bed.reward, bed.value)),
        "TDS of endpoints": TDS(bed.kernel, bed.reward),
        "TDS of the value": guided,
        "TDS of the value, fitted": Fitted(guided),
    }
    methods = (ts.FeynmanKac(num_particles=rollouts, schedule=every), ts.TreeSampling(schedule=every))
    return [
        cell(method, by, kernel, bed, rollouts, args)
        for method in methods
        for by, kernel in ways.items()
        if not ("fitted" in by and isinstance(method, ts.FeynmanKac))  # which fits nothing
    ]


def cell(method: Any, by: str, kernel: Any, bed: Measurement, rollouts: int, args: Args) -> dict[str, Any]:
    budget = ts.Budget(nfe=rollouts * args.num_steps)
    found = [
        ts.search(kernel, bed.reward, method, budget=budget, seed=seed, batch_size=1024, progress=False)
        for seed in range(args.seeds)
    ]
    off = [float(run.log_z) - bed.log_z for run in found if run.log_z is not None]
    return {
        "rollouts": rollouts,
        "tolerance": bed.tolerance,
        "method": type(method).name,
        "by": by,
        "mean": sum(off) / len(off),
        "worst": max(off, key=abs),
        "off": off,
        "se": [run.log_z_se for run in found],
    }


if __name__ == "__main__":
    main()
