"""Every baseline and the trees on the shipped MNIST model at equal NFE: sampling, search, anytime.

    python -m experiments.mnist.evidence run --data mnist.npz
    python -m experiments.mnist.evidence run --part search
    python -m experiments.mnist.evidence report

Sampling. π(x_0) ∝ p(x_0) exp(r(x_0)) of the chain with T = 50, DDIM with eta = 1, for

    digit        r = log p(8 | x)                                     importance sampling has an ESS fraction of 9 %
    even         r = max over even c of log p(c | x)                  49 %
    conjunction  r = log p(8 | x) - 200 |mean pixel - .2|             heavy eights: .6 %

(fractions of 2,000 rollouts; those of the pool are in the report). Features are the penultimate layer of the judge
(`experiments.mnist.judge`), which no search can reach. Two references: real images of the class, train and test
together, for the conjunction accepted with probability exp of its second term; and π of this very chain, from a pool
of rollouts with seeds of their own, by rejection (r <= 0), or by systematic resampling with the weights exp(r) where
fewer than 500 are accepted. Metrics are of 2,000 draws with replacement, distinct leaves and roots beside them.

    FID = |m - m'|² + tr(S + S' - 2 (S S')^1/2)          Fréchet distance in judge features, not on Inception's scale
    diversity = mean over pairs of draws of 1 - cos      of judge features

Protocol. Settings are chosen among at most six (`experiments.shared.grids`) by MMD² to π at 10^4 NFE on the tuning
seed; then the chosen ones are run, then the published ones. Grids, scores and choices are rows too. A cell keeps
features, rewards and weights of its leaves in `--work`.

Search. Best reward against NFE of greedy methods. Best-of-N takes its rollouts from the pool: rewards share them, and
their seconds are in no row. Best-of-N, DTS*, TreeSearch and MCTS are anytime: a smaller budget is a prefix of
a larger one, and a cell's curve is its history. FK (max potential, λ = 10, one population), beams and rollover budgets
get a run a budget.

Sources: Diffusion Tree Sampling: Scalable Inference-time Alignment of Diffusion Models (Jain et al., 2025), section 5.2
and appendix F. GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), eq. 6, for the FID.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from experiments.mnist import report as mnist_evidence_report
from experiments.mnist.references import Known, pool_part, references
from experiments.mnist.report import Names
from experiments.mnist.searches import Host, Job, measure, sampled, searched
from experiments.mnist.targets import CORE, METHODS, PART, SEARCHED, SEARCHERS, TARGETS
from experiments.shared.cells import Cells, Row, locked
from experiments.shared.grids import How, check_names, chosen
from experiments.shared.sweep import Sweep, check_seeds, command_line, tuned
from treesearch.cli.arguments import count
from treesearch.errors import StoreError

KEY = ("kind", "target", "method", "settings", "budget", "seed", "pool")


def choose(target: str, method: str, cells: Cells, budget: int, pool: int) -> Row:
    """The settings of lowest mean MMD² to π among those of the grid that never failed."""
    scores = []
    for how in METHODS[method].grid:
        found = cells.where(
            kind="tuning distances", target=target, method=method, settings=how, budget=budget, pool=pool
        )
        scores.append(float(np.mean([row["mmd2_model"] for row in found])) if found else None)
    return chosen(METHODS[method].grid, scores)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    data: Path = Path("mnist.npz")
    """npz file with train_x, train_y, test_x, test_y, for the real images"""
    part: Literal["sampling", "search"] = "sampling"
    """which table"""
    targets: tuple[str, ...] = ("digit", "even")
    """of sampling; conjunction is the third"""
    methods: tuple[str, ...] = CORE
    """of sampling; all for every one"""
    rewards: tuple[str, ...] = tuple(SEARCHED)
    """of the search"""
    searchers: tuple[str, ...] = tuple(SEARCHERS)
    """methods of the search"""
    nfe: tuple[str, ...] = ("50k",)
    """network evaluations of a sampling cell"""
    levels: tuple[str, ...] = ("1k", "3k", "10k", "30k", "100k")
    """network evaluations of the search"""
    seeds: tuple[int, ...] = (100, 101, 102)
    """of cells"""
    tuning_seeds: tuple[int, ...] = (0,)
    """of tuning"""
    tuning_nfe: str = "10k"
    """network evaluations of a tuning cell"""
    pool: int = 10_000
    """rollouts behind the references"""
    batch_size: int = 64
    """rows of a forward pass"""
    device: str = "cpu"
    """where the model runs"""
    out: Path = Path("runs/results/mnist_evidence.jsonl")
    """one row a cell"""
    work: Path = Path("runs/mnist_evidence")
    """the pool, and features of leaves"""

    def run(self) -> int:
        check_seeds(self.seeds, self.tuning_seeds)
        check_names("target", self.targets, TARGETS)
        check_names("method", self.names, METHODS)
        check_names("reward", self.rewards, SEARCHED)
        check_names("searcher", self.searchers, SEARCHERS)
        if self.part == "sampling" and not self.data.exists():
            raise StoreError(f"no file {self.data}: name an npz file of MNIST with --data")
        with locked(self.work):
            cells = Cells(self.out, KEY)
            (self._sample if self.part == "sampling" else self._search)(cells)
        return 0

    @property
    def names(self) -> tuple[str, ...]:
        """Methods of sampling."""
        return tuple(METHODS) if self.methods == ("all",) else self.methods

    @property
    def host(self) -> Host:
        """Where cells run."""
        return Host(device=self.device, batch_size=self.batch_size, work=self.work, seeds=self.seeds)

    def _sample(self, cells: Cells) -> None:
        known = self._references(cells)
        then = partial(self._measure, cells, known)
        every: Sweep[Job] = Sweep(cells, lambda job: sampled(job, self.host), words, then)
        tuning_nfe, places = whole(self.tuning_nfe), list(product(self.names, self.targets))
        grids = [(t, name, how) for m in self.names for t in self.targets for name, how in tuned([m], METHODS)]
        every.fill(jobs("tuning", grids, [tuning_nfe], self.tuning_seeds))
        picked = []
        for m, t in places:
            row = every.choice({"target": t, "method": m}, partial(choose, t, m, cells, tuning_nfe, self.pool))
            picked.append((t, m, row["picked"]))
        published = [(t, m, METHODS[m].grid[0]) for m, t in places]
        for which in (picked, published):
            every.fill(jobs("cell", which, sorted(map(whole, self.nfe)), self.seeds))

    def _search(self, cells: Cells) -> None:
        levels = sorted(map(whole, self.levels))
        found = [
            job
            for name in self.searchers
            for budget in (levels[-1:] if SEARCHERS[name].anytime else levels)
            for job in jobs("search", [(r, name, SEARCHERS[name].grid[0]) for r in self.rewards], [budget], self.seeds)
        ]
        every: Sweep[Job] = Sweep(cells, lambda job: searched(job, self.host), words)
        every.fill(sorted(found, key=lambda job: job.budget))

    def _references(self, cells: Cells) -> Callable[[str], Known]:
        """References by target, made when they are first asked for; their rows are there at once."""

        @cache
        def images() -> Tensor:
            parts = [pool_part(self.work, i, self.batch_size, self.device) for i in range(-(-self.pool // PART))]
            return torch.cat(parts)[: self.pool]

        @cache
        def known(name: str) -> Known:
            found, row = references(name, images(), self.data)
            if row not in cells:
                cells.add(row)
            return found

        for name in self.targets:
            if {"kind": "reference", "target": name, "pool": self.pool} not in cells:
                known(name)
        return known

    def _measure(self, cells: Cells, known: Callable[[str], Known], job: Job) -> None:
        wanted = job.row | {"kind": f"{job.kind} distances", "pool": self.pool}
        row = cells.where(**job.row)[0]
        if wanted not in cells and "error" not in row and job.file(self.work).exists():
            cells.add(measure(job, row, known(job.target), self.pool, self.work))


def jobs(
    kind: str, what: Sequence[tuple[str, str, How]], budgets: Sequence[int], seeds: Sequence[int]
) -> Iterator[Job]:
    """Cells of targets, methods and settings, small budgets first."""
    for budget, (target, method, how), seed in product(budgets, what, seeds):
        yield Job(kind, target, method, how, budget, seed)


def words(row: Row) -> str:
    """What a cell says."""
    return f"{row.get('best', row.get('mean_reward')):.4g}"


def whole(text: str) -> int:
    """50k -> 50,000."""
    return count(text) or 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and figures from what has been run."""

    rows: tuple[Path, ...] = tuple(Path(f"runs/results/mnist_{part}.jsonl") for part in ("evidence", "search"))
    """what `run` wrote; files that are not there are left out"""
    out: Path = Path("runs/results/mnist_evidence.md")
    """the tables; the figures stand beside them"""

    def run(self) -> int:
        levels = tuple(map(whole, Run.levels))
        names = Names(tuple(TARGETS), tuple(METHODS), tuple(SEARCHED), tuple(SEARCHERS), levels=levels)
        print(mnist_evidence_report.write(self.rows, self.out, KEY, names))
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("mnist_evidence", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
