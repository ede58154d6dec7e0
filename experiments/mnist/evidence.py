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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.mnist import judge
from experiments.mnist import report as mnist_evidence_report
from experiments.mnist.report import Names
from experiments.mnist.train_classifiers import load_split
from experiments.shared.baselines import Setup
from experiments.shared.evidence import Cells, Reference, Row, check_seeds, command_line, locked, where_it_ran
from experiments.shared.grids import Entry, How, baseline, chosen, entries, pick, schedules
from treesearch.backends.guidance import TrustRegion
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.cli.arguments import count
from treesearch.errors import StoreError, TreeSearchError
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward
from treesearch.rewards.images import classifier, image

T = 50
LEVELS = (50, 40, 30, 20, 10)
DRAWS = 2_000
PART = 500  # rollouts of a file of the pool
POOL_SEED = 9_000_000
ENOUGH = 500  # accepted draws, below which the pool is resampled
KEY = ("kind", "target", "method", "settings", "budget", "seed", "pool")
FAILURES = (TreeSearchError, ArithmeticError, ValueError)
SCHEDULES = schedules(LEVELS)


# targets


@dataclass(frozen=True)
class Target:
    """A reward, the classes that it asks for, and what else it asks of images of them."""

    reward: Callable[[], Reward]
    digits: tuple[int, ...]
    also: Callable[[], Reward] | None = None


def heavy() -> Reward:
    """-200 |mean pixel - .2|."""
    return 200.0 * image.brightness(target=0.2)


def conjunction() -> Reward:
    """log p(8 | x) - 200 |mean pixel - .2|."""
    return classifier.digit(8) + heavy()


TARGETS = {
    "digit": Target(partial(classifier.digit, 8), (8,)),
    "even": Target(classifier.even, (0, 2, 4, 6, 8)),
    "conjunction": Target(conjunction, (8,), heavy),
}
SEARCHED: dict[str, Callable[[], Reward]] = {
    "conjunction": conjunction,
    "compressibility": image.compressibility,
    "composite": lambda: classifier.digit(8) + 10.0 * image.brightness(),
}


# methods


def sampler(name: str, kernel: Any, reward: Reward, **how: Any) -> Setup:
    """One of `experiments.shared.baselines`."""
    return baseline(kernel, reward, SCHEDULES, name, **how)


def searcher(method: Callable[..., Any], kernel: Any, reward: Reward, **how: Any) -> Setup:
    """A method of treesearch itself."""
    return Setup(kernel, method(**how))


def guided(kernel: Any, reward: Reward) -> Setup:
    """TreeSampling on a kernel that leans towards the reward's gradient."""
    return Setup(TrustRegion(kernel, reward), ts.TreeSampling())


_DPS: tuple[How, ...] = (
    {"normalise": "residual"},
    {"scale": 1.0},
    {"scale": 0.1},
    {"normalise": "gradient", "scale": 0.03},
    {"normalise": "gradient", "scale": 0.1},
    {"normalise": "gradient", "scale": 0.3},
)
_dts = partial(searcher, partial(ts.DiffusionTreeSampling, branch_at=LEVELS))
_own = {"tree_sampling": partial(searcher, ts.TreeSampling), "tree_sampling_guided": guided}
METHODS = entries(sampler, _dts, _own, _DPS)
CORE = ("importance", "tree_sampling", "fk_difference", "dts", "dps", "das", "tds", "tree_sampling_guided")
_STAR = partial(ts.DiffusionTreeSearch, branch_at=LEVELS)
SEARCHERS: dict[str, Entry] = {
    "best_of_n": Entry(partial(searcher, ts.BestOfN), anytime=True),
    "dts_star": Entry(partial(searcher, _STAR), ({"widening_c": 2.0, "widening_alpha": 0.8},), anytime=True),
    "dts_star_narrow": Entry(partial(searcher, _STAR), ({"widening_c": 1.0, "widening_alpha": 0.5},), anytime=True),
    "tree_search": Entry(partial(searcher, ts.TreeSearch), anytime=True),
    "mcts": Entry(partial(searcher, partial(ts.MCTS, branch_at=LEVELS)), anytime=True),
    "fk_max": Entry(partial(sampler, "fk_max"), ({"lam": 10.0, "resampling": "multinomial"},)),
    "beam": Entry(partial(searcher, ts.BeamSearch)),
    "rollover": Entry(partial(searcher, ts.RolloverBudget)),
}


# references


@dataclass(frozen=True)
class Known:
    """What draws of a target are compared with.

    Args:
        real: real images.
        model: π of the chain.
        log_z: of the pool.
    """

    real: Reference
    model: Reference
    log_z: float


def pool_part(work: Path, i: int, batch_size: int, device: str) -> Tensor:
    """Images (500, 1, 28, 28) of part i of the pool, from its file or made."""
    file = work / "pool" / f"part-{i:03d}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        free = Reward(lambda samples, _: torch.zeros(len(samples), dtype=torch.float64), "none")
        method = ts.BestOfN(n=PART, lam=0.0)
        found = ts.search(kernel_on(device), free, method, seed=POOL_SEED + i, batch_size=batch_size)
        temporary = file.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, images=found.samples.cpu().numpy())
        temporary.replace(file)
        print(f"pool, part {i}: {found.cost.seconds:.0f} s", flush=True)
    return torch.from_numpy(np.load(file)["images"])


def model_draws(images: Tensor, reward: Reward) -> tuple[Tensor, Row]:
    """2,000 draws of π, or as many as are accepted, and figures of the pool."""
    r = torch.cat([reward(part) for part in images.split(PART)])
    chance, w = np.random.default_rng(POOL_SEED), r.exp()
    accepted = np.flatnonzero(chance.random(len(r)) < w.numpy())[:DRAWS]
    how, rows = "rejection", accepted
    if len(accepted) < ENOUGH:
        cdf = np.cumsum(w.numpy())
        how, rows = "resampling", np.searchsorted(cdf, (np.arange(DRAWS) + chance.random()) / DRAWS * cdf[-1])
    facts = {
        "how": how,
        "pool": len(r),
        "accepted": len(accepted),
        "distinct": len(np.unique(rows)),
        "log_z": float(w.mean().log()),
        "log_z_se": float(w.std() / w.mean() / len(r) ** 0.5),
        "ess_fraction": float(w.sum() ** 2 / (w**2).sum() / len(r)),
        "mean_reward": float((w * r).sum() / w.sum()),
        "prior_reward": float(r.mean()),
    }
    return images[torch.from_numpy(rows)], facts


def real_images(data: Path, target: Target) -> Tensor:
    """Images (n, 1, 28, 28) of the classes in [0, 1], at most 2,000 of them."""
    splits = [load_split(data, split) for split in ("train", "test")]
    images, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    x = images[torch.isin(labels, torch.tensor(target.digits))].float() / 255
    chance = np.random.default_rng(POOL_SEED)
    if target.also is not None:
        x = x[torch.from_numpy(chance.random(len(x))) < target.also()(x).exp()]
    return x[torch.from_numpy(chance.permutation(len(x))[:DRAWS])]


def references(name: str, images: Tensor, data: Path) -> tuple[Known, Row]:
    """Both references of a target, and what is known of them."""
    target = TARGETS[name]
    draws, facts = model_draws(images, target.reward())
    real = real_images(data, target)
    known = Known(Reference(judge.grade(real)[1]), Reference(judge.grade(draws)[1]), facts["log_z"])
    between = distances(known.model.draws, known.real, "real")
    floors = {f"floor_mmd2_{side}": getattr(known, side).floor().mmd2 for side in ("real", "model")}
    row = {"kind": "reference", "target": name, "real": len(real)} | facts | floors
    return known, row | {f"model_to_{k}": v for k, v in between.items()} | where_it_ran()


# distances


def frechet(x: Tensor, y: Tensor) -> float:
    """|m - m'|² + tr(S + S' - 2 (S S')^1/2) of two sets of features (n, D)."""
    x, y = x.double(), y.double()
    left, right = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp_min(0).sqrt().sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return float(gap + left.trace() + right.trace() - 2 * cross)


def diversity(x: Tensor) -> float:
    """Mean over pairs of different draws of 1 - cosine, of features (n, D)."""
    unit, n = torch.nn.functional.normalize(x.double(), dim=1), len(x)
    return float(1 - (unit.sum(0).square().sum() - n) / (n * (n - 1)))


def distances(features: Tensor, to: Reference, side: str) -> Row:
    """FID and unbiased MMD² to a reference."""
    return {f"fid_{side}": frechet(features, to.draws), f"mmd2_{side}": to.mmd2(features)}


# cells


@dataclass(frozen=True)
class Job:
    """A cell to run."""

    kind: str
    target: str
    method: str
    settings: How
    budget: int
    seed: int

    @property
    def row(self) -> Row:
        """Its identity."""
        return {name: getattr(self, name) for name in KEY[:-1]}

    def file(self, work: Path) -> Path:
        """Where its leaves are kept."""
        settings = ",".join(f"{k}={v}" for k, v in sorted(self.settings.items())) or "default"
        return work / "leaves" / f"{self.kind}-{self.target}-{self.method}-{settings}-{self.budget}-{self.seed}.npz"


@cache
def kernel_on(device: str) -> Any:
    """The model, read once."""
    return mnist_kernel(num_steps=T, eta=1.0, device=device)


def attempt(job: Job, entry: Entry, reward: Reward, run: Run) -> tuple[Row, Setup | None, SearchResult | None]:
    """Run a cell; one that fails says why."""
    began = time.perf_counter()
    try:
        setup = entry.make(kernel_on(run.device), reward, **job.settings)
        budget = ts.Budget(nfe=job.budget)
        result = ts.search(setup.kernel, reward, setup.method, budget=budget, seed=job.seed, batch_size=run.batch_size)
    except FAILURES as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}, None, None
    return costs(result), setup, result


def costs(result: SearchResult) -> Row:
    """What it took."""
    cost, tree = result.cost, result.tree
    return {
        "nfe": cost.nfe,
        "work": cost.nfe + 2 * cost.backward_nfe,
        "reward_calls": cost.reward_calls,
        "seconds": cost.seconds,
        "nodes": len(tree),
        "tree_bytes": sum(getattr(tree, name).nbytes for name in tree.COLUMNS),
        "state_bytes": int((tree.slot >= 0).sum()) * 28 * 28 * 4,
    }


def sampled(job: Job, run: Run) -> Row:
    """A sampling cell; its leaves go to a file."""
    found, setup, result = attempt(job, METHODS[job.method], TARGETS[job.target].reward(), run)
    if result is None or setup is None:
        return job.row | found | where_it_ran()
    try:
        return job.row | found | graded(job, setup, result.tasks[0], run.work) | where_it_ran()
    except FAILURES as error:
        return job.row | found | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()


def graded(job: Job, setup: Setup, task: TaskResult, work: Path) -> Row:
    """Metrics of 2,000 draws that need no reference."""
    n, chance = len(task.leaves), np.random.default_rng(job.seed)
    rows = task.draw_rows(DRAWS, job.seed) if setup.weighted else chance.integers(0, n, DRAWS)
    unique, again = np.unique(rows, return_inverse=True)
    probs, features = judge.grade(task.fetch(task.leaves[unique]).float().cpu())
    file = job.file(work)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, features=features.numpy(), again=again)
    right = torch.isin(probs.argmax(1), torch.tensor(TARGETS[job.target].digits))
    return {
        "mean_reward": float(task.rewards[torch.from_numpy(rows)].mean()),
        "judge_accuracy": float(right[torch.from_numpy(again)].double().mean()),
        "judge_probability": float(probs[:, list(TARGETS[job.target].digits)].sum(1)[torch.from_numpy(again)].mean()),
        "diversity": diversity(features[torch.from_numpy(again)]),
        "log_z": task.log_z if setup.weighted else None,
        "distinct": len(unique),
        "roots": len(np.unique(task.tree.roots(task.leaves[unique]))),
        "ess": task.diagnostics["ess"] if setup.weighted else float(n),
        "samples": n,
    }


def measure(job: Job, row: Row, known: Known, pool: int, work: Path) -> Row | None:
    """Distances of a cell's draws; None where its leaves are not kept here."""
    if not job.file(work).exists():
        return None
    stored = np.load(job.file(work))
    features = torch.from_numpy(stored["features"][stored["again"]])
    log_z = row.get("log_z")
    return (
        job.row
        | {"kind": f"{job.kind} distances", "pool": pool}
        | distances(features, known.real, "real")
        | distances(features, known.model, "model")
        | {"log_z_error": None if log_z is None else abs(log_z - known.log_z)}
    )


def rolled_out(job: Job, run: Run) -> Row:
    """A cell of best-of-N: it does not look at the reward, so its rollouts are consecutive parts of the pool."""
    count, parts = job.budget // T, -(-job.budget // (T * PART))
    first = run.seeds.index(job.seed) * parts
    files = [pool_part(run.work, first + i, run.batch_size, run.device) for i in range(parts)]
    images = torch.cat(files)[:count]
    rewards = torch.cat([SEARCHED[job.target]()(part) for part in images.split(PART)])
    best = torch.cummax(rewards, 0).values.tolist()
    return job.row | {
        "nfe": count * T,
        "work": count * T,
        "reward_calls": count,
        "best": best[-1],
        "judge_of_best": judge.grade(images[rewards.argmax()][None])[0][0].tolist(),
        "curve": improvements([{"nfe": (i + 1) * T, "best_reward": b} for i, b in enumerate(best)]),
        "rewards": rewards.tolist(),
    }


def searched(job: Job, run: Run) -> Row:
    """A search cell: the best reward, and where it was improved."""
    if job.method == "best_of_n":
        return rolled_out(job, run) | where_it_ran()
    found, _, result = attempt(job, SEARCHERS[job.method], SEARCHED[job.target](), run)
    if result is None:
        return job.row | found | where_it_ran()
    best, images = float(result.rewards.max()), result.best()[0].float().cpu()
    probs = judge.grade(images)[0][0]
    extra: Row = {"best": best, "judge_of_best": probs.tolist()}
    if SEARCHERS[job.method].anytime:
        extra["curve"] = improvements(result.history)
    return job.row | found | extra | where_it_ran()


def improvements(history: Sequence[Row]) -> list[list[float]]:
    """[NFE, best reward] where it rose."""
    curve: list[list[float]] = []
    for record in history:
        best = record["best_reward"]
        if best is not None and (not curve or best > curve[-1][1]):
            curve.append([record["nfe"], best])
    return curve


def choose(target: str, method: str, cells: Cells, budget: int, pool: int) -> Row:
    """The settings of lowest mean MMD² to π among those of the grid that never failed, as a row."""
    scores = []
    for how in METHODS[method].grid:
        found = cells.where(
            kind="tuning distances", target=target, method=method, settings=how, budget=budget, pool=pool
        )
        scores.append(float(np.mean([row["mmd2_model"] for row in found])) if found else None)
    return {"kind": "choice", "target": target, "method": method} | chosen(METHODS[method].grid, scores)


# the command


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
        for what, names, known in (
            ("target", self.targets, TARGETS),
            ("method", self.names, METHODS),
            ("reward", self.rewards, SEARCHED),
            ("searcher", self.searchers, SEARCHERS),
        ):
            for name in names:
                pick(what, name, known)
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

    def _sample(self, cells: Cells) -> None:
        known = self._references(cells)
        grids = [(t, m, how) for m in self.names for t in self.targets for how in METHODS[m].grid]
        grids = [each for each in grids if len(METHODS[each[1]].grid) > 1]
        tuning = list(self._product("tuning", grids, [whole(self.tuning_nfe)], self.tuning_seeds))
        self._fill(tuning, cells, sampled, known)
        choices = {(t, m): self._choice(t, m, cells)["picked"] for m in self.names for t in self.targets}
        published = {(t, m): METHODS[m].grid[0] for t, m in choices}
        for which in (choices, published):
            jobs = [(t, m, how) for (t, m), how in which.items()]
            self._fill(list(self._jobs("cell", jobs)), cells, sampled, known)

    def _search(self, cells: Cells) -> None:
        levels = sorted(whole(text) for text in self.levels)
        jobs = [
            job
            for name in self.searchers
            for budget in (levels[-1:] if SEARCHERS[name].anytime else levels)
            for job in self._product(
                "search", [(r, name, SEARCHERS[name].grid[0]) for r in self.rewards], [budget], self.seeds
            )
        ]
        self._fill(sorted(jobs, key=lambda job: job.budget), cells, searched)

    def _jobs(self, kind: str, what: Sequence[tuple[str, str, How]]) -> list[Job]:
        return list(self._product(kind, what, sorted(whole(text) for text in self.nfe), self.seeds))

    def _product(
        self, kind: str, what: Sequence[tuple[str, str, How]], budgets: Sequence[int], seeds: Sequence[int]
    ) -> Iterator[Job]:
        for budget, (target, method, how), seed in product(budgets, what, seeds):
            yield Job(kind, target, method, how, budget, seed)

    def _choice(self, target: str, method: str, cells: Cells) -> Row:
        found = cells.where(kind="choice", target=target, method=method)
        if not found:
            cells.add(choose(target, method, cells, whole(self.tuning_nfe), self.pool))
        return cells.where(kind="choice", target=target, method=method)[0]

    def _references(self, cells: Cells) -> dict[str, Known]:
        parts = [pool_part(self.work, i, self.batch_size, self.device) for i in range(-(-self.pool // PART))]
        images, known = torch.cat(parts)[: self.pool], {}
        for name in self.targets:
            known[name], row = references(name, images, self.data)
            if row not in cells:
                cells.add(row)
        return known

    def _measure(self, job: Job, cells: Cells, known: Known) -> None:
        wanted = job.row | {"kind": f"{job.kind} distances", "pool": self.pool}
        row = cells.where(**job.row)[0]
        if wanted in cells or "error" in row:
            return
        if (found := measure(job, row, known, self.pool, self.work)) is not None:
            cells.add(found)

    def _fill(
        self,
        jobs: Sequence[Job],
        cells: Cells,
        fill: Callable[[Job, Run], Row],
        known: dict[str, Known] | None = None,
    ) -> None:
        for i, job in enumerate(jobs):
            new = job.row not in cells
            row = fill(job, self) if new else cells.where(**job.row)[0]
            if new:
                cells.add(row)
            if known is not None:
                self._measure(job, cells, known[job.target])
            if not new:
                continue
            said = row.get("error") or f"{row.get('best', row.get('mean_reward')):.4g}"
            print(
                f"{i + 1}/{len(jobs)} {job.kind} {job.target} {job.method} {job.settings} {job.budget} {job.seed}: "
                f"{said}, {row.get('seconds', 0):.0f} s",
                flush=True,
            )


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
