"""Values learnt from finished rollouts, for a rare conjunction: where weights die, and what learnt values save.

    r = log p(8 | x) - κ |mean pixel - .2|, κ = 200,   T = 50        MNIST's conjunction of `experiments.mnist.targets`

By r(x̂_0) populations die at the first levels: the mean pixel of x_0 is known there to .02 to .04, and κ makes 4 to 8
nats of that. A value that knows it is a regression on two features of x̂_0, fitted level by level on rollouts:

    v(x_t, t) = log E[p(8 | x_0)] + log E[exp(-κ |M - .2|)]
    E[p(8 | x_0)] = 1/(1 + exp(-a_t logit p(8 | x̂_0) - b_t)),   M ~ N(c_t m(x̂_0) + d_t, s_t²), m the mean pixel

in closed form, as if both parts were independent given x_t. Each level is fitted with two neighbours on either side.

    levels    the rollouts of one pilot, half to fit and half to test: for weights exp(v_t) the share of them that is
              left after the step to exp(v_{t-1}) ("step"), and to exp(r) at x_0 ("rest"), as effective sample sizes
              the variance of log Ẑ is about Σ (1/step - 1)/K
    search    log Ẑ, ESS and roots at equal work, NFE + 2 · backward passes; the pilot that a value learnt from counts.
              das: published. learnt: FK, held states scored by v. learnt tds: and steps along its gradient. learnt
              tree: TreeSampling on v. learnt twice: half of the pilot is a second wave, whose states are resampled
              once, by the v of the first, at t = 35, and then go on without selection: v is fitted again, on both
              MMD² to π of judge features of 2,000 draws, as in `experiments.mnist.evidence`, whose pool is the
              reference and is made where it is not there

What a steered wave finished cannot be learnt from as it is: its leaves are survivors, and how often a state fails died
with the others. Hence the second wave, unselected below its branching as rollouts of a tree are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

import treesearch as ts
from experiments.mnist import judge
from experiments.mnist.references import model_draws, pool_part
from experiments.mnist.targets import DRAWS, T, conjunction, kernel_on
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.distances import Reference
from experiments.shared.evidence_duels import gap
from experiments.shared.stats import mean_se
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from treesearch.backends.guidance import DAS, TDS, Valued
from treesearch.report.tables import markdown_table
from treesearch.rewards.images.classifier import digit

F64 = NDArray[np.float64]
KAPPA, TARGET = 200.0, 0.2
BEYOND = 2  # neighbouring levels on either side of one that is fitted
KEY = ("part", "arm", "work", "seed")
SHARE = 0.2  # of the work, for a pilot
ARMS = ("das", "learnt", "learnt twice", "learnt tds", "learnt tree")
BRANCH = 35  # where the second wave of a pilot is resampled


class Parts(NamedTuple):
    """What rollouts showed, by level."""

    odds: F64  # logit p(8 | x̂_0), (T + 1, n), that of x_0 first
    mean: F64  # mean pixel


@dataclass(frozen=True, eq=False)
class Learnt:
    """v(x_t, t), see the head of the file.

    Args:
        table: a_t, b_t, c_t, d_t, s_t, (T + 1, 5) float64.
    """

    table: Tensor
    rewards_per_nfe = 1  # a classifier call

    def __call__(self, x: Tensor, t: Tensor, law: Any, cond: Any) -> Tensor:
        odds, mean = features(law.endpoint)
        return self.of(odds, mean, t)

    def of(self, odds: Tensor, mean: Tensor, t: Tensor) -> Tensor:
        """v of features (n,) at levels (n,)."""
        a, b, c, d, s = self.table.to(odds.device)[t].unbind(-1)
        return -torch.nn.functional.softplus(-a * odds - b) + near(c * mean + d - TARGET, s)


def near(mu: Tensor, s: Tensor) -> Tensor:
    """log E[exp(-κ |X|)] for X ~ N(mu, s²)."""
    half, ratio = 0.5 * (KAPPA * s) ** 2, mu / s
    sides = [half - KAPPA * mu + log_ndtr(ratio - KAPPA * s), half + KAPPA * mu + log_ndtr(-ratio - KAPPA * s)]
    return torch.logaddexp(*sides)


def log_ndtr(z: Tensor) -> Tensor:
    return torch.special.log_ndtr(z)


def features(x0: Tensor) -> tuple[Tensor, Tensor]:
    """logit p(8 | x) and the mean pixel of images of states (n, ...), float64, with their graph."""
    images = kernel_on("cpu").decode(x0)
    p = digit(8).attached(images).double().clamp(max=-1e-9)
    return p - torch.log(-torch.expm1(p)), images.double().mean((1, 2, 3))


@torch.no_grad()
def pilot(n: int, seed: int, value: Learnt | None = None) -> Parts:
    """Features along n rollouts of the model; with a value they branch once, and what was before counts for nothing."""
    kernel, rng, found = kernel_on("cpu"), torch.Generator().manual_seed(seed), []
    for first in range(0, n, 100):
        m = min(100, n - first)
        x, path = torch.randn(m, *kernel.state_shape, generator=rng), []
        for t in range(T, 0, -1):
            law = kernel.transition(x, torch.full((m,), t))
            if value is not None and t == BRANCH:
                w = value.of(*features(law.endpoint), torch.full((m,), t)).softmax(0)
                x = x[torch.multinomial(w, m, replacement=True, generator=rng)]
                law = kernel.transition(x, torch.full((m,), t))
            path.append(features(law.endpoint))
            x = law.sample(torch.randn(x.shape, generator=rng))
        path.append(features(x))
        found.append([torch.stack(of[::-1]) for of in zip(*path, strict=True)])
    odds, mean = (torch.cat(of, 1).numpy() for of in zip(*found, strict=True))
    return Parts(odds, mean)


def fit(*waves: Parts) -> Learnt:
    """The regression of x_0's parts on those of x̂_0, level by level; a second wave counts from its branching on."""
    table = torch.zeros(T + 1, 5, dtype=torch.float64)
    table[0] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1e-6])
    both = Parts(*(np.concatenate(of, 1) for of in zip(*waves, strict=True)))
    for t in range(1, T + 1):
        seen = both if t + BEYOND <= BRANCH else waves[0]
        eight = 1 / (1 + np.exp(-seen.odds[0]))
        near_by = slice(max(1, t - BEYOND), min(T, t + BEYOND) + 1)
        odds, mean = seen.odds[near_by], seen.mean[near_by]
        a, b = logistic(odds.ravel(), np.tile(eight, len(odds)))
        c, d = np.polyfit(mean.ravel(), np.tile(seen.mean[0], len(mean)), 1)
        s = float((seen.mean[0] - c * seen.mean[t] - d).std())
        table[t] = torch.tensor([a, b, c, d, max(s, 1e-6)])
    return Learnt(table)


def logistic(odds: F64, share: F64) -> tuple[float, float]:
    """a, b of E[share] = 1/(1 + exp(-a odds - b)), a drawn to 1 a little."""

    def loss(of: F64) -> float:
        z = of[0] * odds + of[1]
        return float(np.mean(np.logaddexp(0, z) - share * z) + 0.003 * ((of[0] - 1) ** 2 + 0.1 * of[1] ** 2))

    a, b = minimize(loss, [0.5, -1.0]).x
    return float(a), float(b)


def levels(n: int, seed: int) -> Row:
    """ESS shares of both values, by level, on the second half of the rollouts."""
    seen = pilot(n, seed)
    half, rest = n // 2, Parts(seen.odds[:, n // 2 :], seen.mean[:, n // 2 :])
    value = fit(Parts(seen.odds[:, :half], seen.mean[:, :half]))
    r = -np.logaddexp(0, -rest.odds) - KAPPA * np.abs(rest.mean - TARGET)
    at = [torch.full((n - half,), t) for t in range(T + 1)]
    odds, mean = (torch.from_numpy(of) for of in rest)
    v = np.stack([value.of(odds[t], mean[t], at[t]).numpy() for t in range(T + 1)])
    v[0] = r[0]
    found: Row = {"n": n, "nfe": n * T, "spread": value.table[:, 4].tolist()}
    for name, of in (("endpoints", r), ("learnt", v)):
        found[f"{name} step"] = [left(of[t], of[t - 1]) for t in range(1, T + 1)]
        found[f"{name} rest"] = [left(of[t], r[0]) for t in range(1, T + 1)]
    return found


def left(before: F64, after: F64) -> float:
    """(Σ w g)² / Σ w g² for w ∝ exp(before), Σ w = 1, and g = exp(after - before): 1 where no weight is lost."""
    w, g = np.exp(before - before.max()), np.exp(after - before - (after - before).max())
    w /= w.sum()
    return float((w @ g) ** 2 / (w @ g**2))


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    part: str
    arm: str
    work: int
    seed: int


@cache
def truth(work: Path, parts: int) -> Reference:
    """π's own draws, from rollouts."""
    images = torch.cat([pool_part(work, i, 64, "cpu") for i in range(parts)])
    return Reference(judge.grade(model_draws(images, conjunction())[0])[1])


@cache
def learnt(n: int, seed: int, twice: bool) -> Learnt:
    """The value of a pilot of n rollouts."""
    if not twice:
        return fit(pilot(n, 7_000_000 + seed))
    first = pilot(n // 2, 7_000_000 + seed)
    return fit(first, pilot(n - n // 2, 8_000_000 + seed, fit(first)))


def searched(job: Job, pi: Reference) -> Row:
    """A cell of the searches."""
    reward, kernel = conjunction(), kernel_on("cpu")
    guide: Any
    n = 0 if job.arm == "das" else round(SHARE * job.work / T)
    room = job.work - n * T
    if job.arm == "das":
        guide = DAS(kernel, reward)
        k, schedule = room // (3 * T - 2), guide.schedule
        tempering = guide.tempering(schedule)
        method = ts.FeynmanKac(num_particles=k, schedule=schedule, tempering=tempering, resampling="ssp")
    else:
        value = learnt(n, job.seed, job.arm == "learnt twice")
        guided = job.arm == "learnt tds"
        guide = TDS(kernel, reward, value=value) if guided else Valued(kernel, reward, value)
        schedule, k = (*range(T - 1, 1, -1), 0), room // (3 * T - 2 if guided else T)
        method = ts.FeynmanKac(num_particles=k, schedule=schedule) if "tree" not in job.arm else ts.TreeSampling()
    budget = ts.Budget(nfe=k * T)
    try:
        found = ts.search(guide, reward, method, budget=budget, seed=job.seed, progress=False)
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    task = found.tasks[0]
    rows = task.draw_rows(DRAWS, job.seed)
    drawn, again = np.unique(task.leaves[rows], return_inverse=True)
    features = judge.grade(task.fetch(drawn).float())[1]
    spent = {"nfe": found.cost.nfe + n * T, "backward": found.cost.backward_nfe, "seconds": found.cost.seconds}
    ess = {"ess": task.diagnostics["ess"], "ess_levels": task.diagnostics.get("ess_levels", [[]])[0]}
    roots = {"roots": len(np.unique(task.tree.roots(drawn))), "log_z": task.log_z, "k": k, "pilot": n}
    reward_of = float(task.rewards[torch.from_numpy(rows)].mean())
    far = {"mmd2_model": pi.mmd2(features[torch.from_numpy(again)]), "mean_reward": reward_of}
    return job.row | roots | far | ess | spent | where_it_ran()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    rollouts: int = 500
    """of the pilot of the levels"""
    arms: tuple[str, ...] = ARMS
    """of the searches"""
    work: int = 50_000
    """NFE + 2 · backward passes of a search"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the searches"""
    pool: Path = Path("runs/mnist_evidence")
    """folder of the pool of `experiments.mnist.evidence`"""
    parts: int = 20
    """of 500 rollouts, of the pool"""
    out: Path = Path("runs/results/observations/conjunction.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)

        def run(job: Job) -> Row:
            return (
                job.row | levels(self.rollouts, job.seed)
                if job.part == "levels"
                else searched(job, truth(self.pool, self.parts))
            )

        every: Sweep[Job] = Sweep(Cells(self.out, KEY), run, said)
        every.fill([Job("levels", "", 0, 1)])
        every.fill(Job("search", arm, self.work, seed) for seed in self.seeds for arm in self.arms)
        return 0


def said(row: Row) -> str:
    """What a cell says."""
    return f"log Z {row['log_z']:.2f}, ESS {row['ess']:.0f}, roots {row['roots']}" if "log_z" in row else "done"


COLUMNS = (
    "arm",
    "K",
    "pilot",
    "NFE",
    "MMD² × 10³",
    "less that of das",
    "log Ẑ",
    "ESS / K",
    "smallest ESS / K",
    "roots",
    "seeds",
)
SHOWN = (50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 1)


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    of = [row for row in rows if row["part"] == "levels"]
    done = [row for row in rows if row["part"] == "search" and "error" not in row]
    if not of:
        raise ValueError("there are no rows: run the experiment first")
    names = [f"{value} {what}" for what in ("step", "rest") for value in ("endpoints", "learnt")]
    body = [[str(t), f"{of[0]['spread'][t]:.4f}", *(f"{of[0][name][t - 1]:.3f}" for name in names)] for t in SHOWN]
    spent = {name: sum(1 / share - 1 for share in of[0][f"{name} step"]) for name in ("endpoints", "learnt")}
    search = "".join(section(done, work) for work in sorted({row["work"] for row in done}))
    return (
        "# A rare conjunction: values learnt from finished rollouts\n\nlog p(8 | x) - 200 |mean pixel - .2| on "
        f"`mnist(num_steps={T})`; what the columns are is in the head of `experiments/observations/conjunction.py`.\n\n"
        f"## Where weights die\n\n{of[0]['n']} rollouts, half of them to fit. s is what the mean pixel of x_0 is known "
        f"to.\n\n"
        f"{markdown_table(body, ('t', 's', *names))}\n\nΣ (1/step - 1), the variance of log Ẑ times K where every step "
        f"resamples: {spent['endpoints']:,.0f} by endpoints, {spent['learnt']:,.0f} by learnt values; importance "
        "sampling has 138, by 10,000 rollouts. At low levels a few rollouts have most of the weight: their shares are "
        "rough, and rather too large.\n"
        f"{search or SILENT}"
    )


SILENT = "\n## Searches\n\nNot run.\n"


def section(rows: Sequence[Row], work: int) -> str:
    """The searches of equal work."""
    return (
        f"\n## Searches, {work:,} of NFE + 2 · backward passes\n\nlog Z is -5.64 ± .12 by 10,000 rollouts, the draws "
        "of π are of the same. Mean ± standard error over seeds; the difference to das, paired by seed, with its 95 % "
        "interval (Student's t).\n\n"
        f"{markdown_table(lines([row for row in rows if row['work'] == work]), COLUMNS)}\n"
    )


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line an arm."""
    found = []
    das = {row["seed"]: 1e3 * row["mmd2_model"] for row in rows if row["arm"] == "das"}
    for arm in (name for name in ARMS if any(row["arm"] == name for row in rows)):
        of = [row for row in rows if row["arm"] == arm]
        smallest = [min(row["ess_levels"]) / row["k"] for row in of if row["ess_levels"]]
        far = [1e3 * row["mmd2_model"] for row in of]
        cells = [[row["log_z"] for row in of], [row["ess"] / row["k"] for row in of], smallest]
        texts = [mean_se(values).text() if values else "-" for values in (*cells, [row["roots"] for row in of])]
        apart = gap(dict(zip([row["seed"] for row in of], far, strict=True)), das) if arm != "das" else None
        texts = [f"{of[0]['nfe']:,}", mean_se(far).text(), "-" if apart is None else apart.text(1.0), *texts]
        found.append([arm, str(of[0]["k"]), str(of[0]["pilot"]), *texts, str(len(of))])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line(
        "conjunction", {"run": Run, "report": reporting("observations/conjunction", KEY, report)}, argv, __doc__
    )


if __name__ == "__main__":
    sys.exit(main())
