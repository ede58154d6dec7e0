"""Every sampling baseline and DTS at equal NFE on mixtures whose targets are known.

    python -m experiments.mixtures.evidence run
    python -m experiments.mixtures.evidence report

Beds (`experiments.mixtures.beds`). All methods of a bed walk the same chain, DDIM with eta = 1 and T = 100, whose
network is exact (float64 inside, states in float32).

    ring           eight Gaussians on a circle of radius 4, std .3; r = log Σ_i exp(1.5 i) N(x; m_i, .3² I) + constant
    checkerboard   the 8 filled squares of side 2 of a 4 x 4 board, 3 x 3 Gaussians of std .25 in each; r = -|x|²/2
    mix2           12 Gaussians in 2-D, one of mass .01, r = -|x - y|²/2 with y near that one
    mix16          12 Gaussians in 16-D, the rarer the higher their reward, r = c·x
    mix64          12 Gaussians in 64-D, r = -|x - y|²/2 with y near their centre

λ = 1 on the first two; on the others it is solved for in closed form so that importance sampling has an ESS fraction of
15 % ("_mild") or 0.5 % ("_hard").

Reference. The target is π of this very chain, to which the closed form of the mixture comes close: from 10^6
independent rollouts with seeds of their own (2·10^5 on the first two beds), 4,000 are drawn, by rejection (exact) where
the reward is bounded and so many are accepted, else by systematic resampling with the weights exp(λ r). Mode masses,
E[r] and log Z come from all rollouts. The closed form's log Z stands beside theirs in the report.

Protocol. Published settings, and settings chosen on seeds 0 and 1 at 10^4 NFE among at most six by MMD², are run on
seeds 100 to 104. Grids, scores and choices are rows too. Metrics are of 2,000 draws with replacement. A tree ends at
its NFE or after ten times as many iterations, whatever comes first; cells that ended below their NFE are listed.

Source: Diffusion Tree Sampling: Scalable Inference-time Alignment of Diffusion Models (Jain et al., 2025), section 5.1
and appendix F. There the network is learnt, the grid is linear in β, DTS runs one iteration at a time (waves of 16
here), and rejection and importance sampling are left out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.mixtures import report as mixtures_report
from experiments.mixtures.beds import BEDS, Bed, chain
from experiments.shared import sweep
from experiments.shared.baselines import Setup
from experiments.shared.cells import Cells, Row, locked, where_it_ran
from experiments.shared.distances import Reference, total_variation
from experiments.shared.grids import How, baseline, check_names, chosen, entries, schedules
from experiments.shared.sweep import FAILURES, Sweep, check_seeds, command_line, tuned
from treesearch.backends.exact.gaussian import GaussianMixture
from treesearch.backends.guidance import TrustRegion
from treesearch.cli.arguments import count
from treesearch.results.result import SearchResult
from treesearch.rewards.analytic import constant

LEVELS = (100, 80, 60, 40, 20)
DRAWS = 2_000
REFERENCE = 4_000
CHUNK = 50_000  # rollouts of the pool at a time
POOL_SEED = 9_000_000
ITERATIONS = 10  # for each NFE; a tree that widens slowly visits the same leaves ever more often, at no NFE
KEY = ("kind", "bed", "method", "settings", "budget", "seed")
SCHEDULES = schedules(LEVELS)


# references


@dataclass(frozen=True)
class Target:
    """π of a bed's chain."""

    reference: Reference
    masses: np.ndarray
    log_z: float


def target_of(bed: Bed, cells: Cells, work: Path, scale: float) -> Target:
    """The reference of a bed, from its file or from a pool of rollouts; what is known of it becomes a row."""
    file, known = work / f"{bed.name}-{scale:g}.npz", {"kind": "reference", "bed": bed.name}
    if not file.exists():
        np.savez(file, **draw_reference(bed, scale))
    stored = np.load(file)
    facts = {name: stored[name].item() for name in stored.files if stored[name].ndim == 0}
    target = Target(Reference(torch.from_numpy(stored["draws"])), stored["masses"], facts["log_z"])
    if known not in cells:
        floor, exact = target.reference.floor(), None if bed.tilt is None else bed.mixture.tilted(bed.tilt, bed.lam)
        shares = [total_variation(chance, target.masses) for chance in _multinomial(target.masses)]
        cells.add(
            known
            | facts
            | {"lam": bed.lam, "closed_form_log_z": None if exact is None else exact.log_z}
            | {
                "masses": target.masses.tolist(),
                "mmd2": floor.mmd2,
                "w1": floor.w1,
                "mode_error": float(np.mean(shares)),
            }
            | where_it_ran()
        )
    return target


def _multinomial(masses: np.ndarray) -> np.ndarray:
    """Mode shares of exact draws."""
    return np.random.default_rng(0).multinomial(DRAWS, masses / masses.sum(), 200) / DRAWS


@lru_cache(maxsize=1)
def rollouts(mixture: GaussianMixture, size: int) -> Tensor:
    """Independent samples (size, D) of a chain; beds that differ in λ alone share them."""
    parts = []
    for i in range(math.ceil(size / CHUNK)):
        method = ts.BestOfN(n=min(CHUNK, size - i * CHUNK), lam=0.0)
        found = ts.search(chain(mixture), constant(), method, seed=POOL_SEED + i, batch_size=4096)
        parts.append(found.samples)
    return torch.cat(parts)


def draw_reference(bed: Bed, scale: float) -> dict[str, Any]:
    """4,000 draws of π and the pool's figures."""
    began, size = time.perf_counter(), max(REFERENCE, round(scale * bed.pool))
    x = rollouts(bed.mixture, size)
    r = torch.cat([bed.reward(part) for part in x.split(CHUNK)])
    log_w = bed.lam * r
    w = (log_w - log_w.max()).exp()
    chance = np.random.default_rng(POOL_SEED)
    accepted = np.flatnonzero(chance.random(size) < np.exp((log_w - bed.lam * (bed.r_max or 0.0)).numpy()))
    exact = bed.r_max is not None and len(accepted) >= REFERENCE
    spread = (np.arange(REFERENCE) + chance.random()) / REFERENCE
    cdf = np.cumsum(w.numpy() / w.sum().item())
    rows = accepted[:REFERENCE] if exact else chance.permutation(np.searchsorted(cdf, spread * cdf[-1]))
    return {
        "draws": x[torch.from_numpy(rows)].numpy(),
        "masses": bed.masses(x, w),
        "how": "rejection" if exact else "resampling",
        "rollouts": size,
        "log_z": float(log_w.max()) + math.log(w.mean().item()),
        "log_z_se": w.std().item() / w.mean().item() / math.sqrt(size),
        "ess_fraction": (w.sum() ** 2 / (w**2).sum()).item() / size,
        "mean_reward": ((w * r).sum() / w.sum()).item(),
        "prior_reward": r.mean().item(),
        "seconds": time.perf_counter() - began,
    }


# methods


def sampler(name: str, bed: Bed, **how: Any) -> Setup:
    """One of `experiments.shared.baselines`."""
    return baseline(bed.kernel(), bed.reward, SCHEDULES, name, lam=bed.lam, r_max=bed.r_max or 0.0, **how)


def dts(bed: Bed, **how: Any) -> Setup:
    """DTS at the published levels, in waves of 16."""
    return Setup(bed.kernel(), ts.DiffusionTreeSampling(**{"lam": bed.lam, "branch_at": LEVELS, "wave": 16} | how))


def tree_sampling(bed: Bed) -> Setup:
    """TreeSampling as it comes."""
    return Setup(bed.kernel(), ts.TreeSampling(lam=bed.lam))


def guided(bed: Bed) -> Setup:
    """The same on a kernel that leans towards the reward's gradient."""
    return Setup(TrustRegion(bed.kernel(), bed.reward, lam=bed.lam), ts.TreeSampling(lam=bed.lam))


_DPS: tuple[How, ...] = (
    {"normalise": "residual"},
    {"scale": 0.1},
    {"scale": 0.01},
    {"normalise": "gradient", "scale": 0.03},
    {"normalise": "gradient", "scale": 0.1},
    {"normalise": "gradient", "scale": 0.3},
)
METHODS = entries(sampler, dts, {"tree_sampling": tree_sampling, "tree_sampling_guided": guided}, _DPS)


# cells


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    kind: str
    bed: str
    method: str
    settings: How
    budget: int
    seed: int


def cell(job: Job, bed: Bed, target: Target, batch_size: int) -> Row:
    """Run a cell; one that fails says why, and has no metrics."""
    setup = METHODS[job.method].make(bed, **job.settings)
    budget = ts.Budget(nfe=job.budget, iterations=ITERATIONS * job.budget)
    began = time.perf_counter()
    try:
        result = ts.search(setup.kernel, bed.reward, setup.method, budget=budget, seed=job.seed, batch_size=batch_size)
        found = grade(result, setup.weighted, bed, target, job.seed)
    except FAILURES as error:
        found = {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
    return job.row | found | where_it_ran()


def grade(result: SearchResult, weighted: bool, bed: Bed, target: Target, seed: int) -> Row:
    """Metrics of 2,000 draws, and what they cost."""
    task, cost = result.tasks[0], result.cost
    chance = np.random.default_rng(seed)
    rows = task.draw_rows(DRAWS, seed) if weighted else chance.integers(0, len(task.leaves), DRAWS)
    draws, log_z = task.samples[torch.from_numpy(rows)], task.log_z if weighted else None
    return {
        "mmd2": target.reference.mmd2(draws),
        "mode_error": total_variation(bed.masses(draws), target.masses),
        "w1": target.reference.w1(draws),
        "mean_reward": float(task.rewards[torch.from_numpy(rows)].mean()),
        "log_z": log_z,
        "log_z_error": None if log_z is None else abs(log_z - target.log_z),
        "distinct": len(np.unique(rows)),
        "roots": len(np.unique(task.tree.roots(task.leaves[rows]))),
        "ess": task.diagnostics["ess"] if weighted else float(len(task.leaves)),
        "samples": len(task.leaves),
        "nfe": cost.nfe,
        "work": cost.nfe + 2 * cost.backward_nfe,
        "reward_calls": cost.reward_calls,
        "seconds": cost.seconds,
        "nodes": len(task.tree),
    }


def choose(bed: str, method: str, cells: Cells, budget: int) -> Row:
    """The settings of lowest mean MMD² among those of the grid that never failed."""
    scores = []
    for how in METHODS[method].grid:
        rows = cells.where(kind="tuning", bed=bed, method=method, settings=how, budget=budget)
        found = [row["mmd2"] for row in rows if row.get("mmd2") is not None]
        scores.append(float(np.mean(found)) if found and len(found) == len(rows) else None)
    return chosen(METHODS[method].grid, scores)


def methods_of(bed: Bed, names: Sequence[str]) -> tuple[str, ...]:
    """Those that the bed allows."""
    return tuple(name for name in names if name != "rejection" or bed.r_max is not None)


def tuning(bed: Bed, names: Sequence[str], seeds: Sequence[int], budget: int) -> Iterator[Job]:
    """Every setting of methods that have a choice."""
    for (method, how), seed in product(tuned(methods_of(bed, names), METHODS), seeds):
        yield Job("tuning", bed.name, method, how, budget, seed)


Choices = dict[tuple[str, str], Row]


def measured(choices: Choices, budgets: Sequence[int], seeds: Sequence[int]) -> Iterator[Job]:
    """Chosen settings and published ones of every bed and method, small budgets first."""
    beds = dict.fromkeys(bed for bed, _ in choices)
    for budget, bed in product(budgets, beds):
        for (method, choice), seed in product([(m, c) for (b, m), c in choices.items() if b == bed], seeds):
            for how in (choice["picked"], choice["published"])[: 1 + (choice["picked"] != choice["published"])]:
                yield Job("cell", bed, method, how, budget, seed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    beds: tuple[str, ...] = tuple(BEDS)
    """which beds"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    nfe: tuple[str, ...] = ("10k", "100k", "1M")
    """network evaluations of a cell"""
    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    """of cells"""
    tuning_seeds: tuple[int, ...] = (0, 1)
    """of tuning"""
    tuning_nfe: str = "10k"
    """network evaluations of a tuning cell"""
    pool_scale: float = 1.0
    """size of the pools of rollouts behind references, 1 for those of the report"""
    batch_size: int = 4096
    """rows of a forward pass"""
    out: Path = Path("runs/results/mixtures.jsonl")
    """one row a cell"""
    work: Path = Path("runs/mixtures")
    """references"""

    def run(self) -> int:
        budgets = sorted({n for text in self.nfe if (n := count(text)) is not None})
        check_seeds(self.seeds, self.tuning_seeds)
        check_names("bed", self.beds, BEDS)
        check_names("method", self.methods, METHODS)
        beds = {name: BEDS[name]() for name in self.beds}
        with locked(self.work):
            cells = Cells(self.out, KEY, {"tuning_nfe": self.tuning_nfe, "pool_scale": self.pool_scale})

            @cache
            def target(name: str) -> Target:
                return target_of(beds[name], cells, self.work, self.pool_scale)

            def run(job: Job) -> Row:
                return cell(job, beds[job.bed], target(job.bed), self.batch_size)

            every = Sweep(cells, run, lambda row: f"MMD² {row['mmd2']:.5f}")
            every.fill(measured(self._tuned(every, list(beds.values())), budgets, self.seeds))
        return 0

    def _tuned(self, every: Sweep[Job], beds: Sequence[Bed]) -> Choices:
        """What was chosen, by bed and method."""
        budget, found = count(self.tuning_nfe) or 0, {}
        every.fill(job for bed in beds for job in tuning(bed, self.methods, self.tuning_seeds, budget))
        for bed in beds:
            for name in methods_of(bed, self.methods):
                choose_here = partial(choose, bed.name, name, every.cells, budget)
                found[bed.name, name] = every.choice({"bed": bed.name, "method": name}, choose_here)
        return found


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and the figure from what has been run."""

    rows: tuple[Path, ...] = (Path("runs/results/mixtures.jsonl"),)
    """what `run` wrote; files that are not there are left out"""
    out: Path = Path("runs/results/mixtures.md")
    """the tables; the figure stands beside them"""

    def run(self) -> int:
        names = {name: methods_of(make(), tuple(METHODS)) for name, make in BEDS.items()}
        print(mixtures_report.write(self.rows, self.out, KEY, names))
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("mixtures", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
