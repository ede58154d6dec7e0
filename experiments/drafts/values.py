"""What a node is worth, by its endpoint, by drafts and by rollouts: the error against what it costs, by level.

    python -m experiments.drafts.values run
    python -m experiments.drafts.values report

The value of a state x_t is the mean reward of the samples below it, on the shipped MNIST model at T = 50. States come
from independent paths, one a path; the truth of each is the mean of many rollouts on fresh noise. What estimates it:

    endpoint          r(x̂_0), one evaluation
    draft of m        a draft's reward on noise of its own; m evaluations from T, fewer below
    student of m      the same, by the endpoints of the shipped student (`--student`), charged as its operations count
    rollout           one more rollout, t evaluations

Errors are root mean squares over states, in standard deviations of the reward among samples; beside them the error that
is left once offset and slope are fitted to the truth, as methods fit them, which is sd(V) √(1 - ρ²).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.mnist.targets import SEARCHED, T, kernel_on
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from treesearch.backends.base import describe
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.core.noise import child_keys, root_key
from treesearch.engine.asking import without_graph
from treesearch.engine.drafting import Leaps
from treesearch.engine.model import Model
from treesearch.registry import registry
from treesearch.report.tables import markdown_table

F64 = NDArray[np.float64]
Fresh = Callable[[int], NDArray[np.uint64]]
LEVELS = (50, 40, 30, 20, 10, 5)
DRAFTS, STEPS = (2, 3, 5, 10), (2, 4)  # evaluations of drafts, and of students
KEY = ("level", "states", "rollouts", "student", "seed")


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    level: int
    states: int
    rollouts: int
    student: str
    seed: int


@cache
def model_of(student: str) -> Model:
    """The shipped model, its drafts by a student where one is named."""
    kernel: Any = kernel_on("cpu")
    if student:
        kernel = Drafted(kernel, registry.kernel(student))
    return Model(kernel, describe(kernel), SEARCHED["conjunction"]())


def walk(model: Model, x: Tensor, t: int, key: NDArray[np.uint64], down_to: int = 0) -> Tensor:
    """States at a level below, on the noise of the keys."""
    task = np.zeros(len(x), np.int64)
    while t > down_to:
        levels = np.full(len(x), t)
        law, _ = model.evaluate(x, levels, task)
        x, _ = model.draw(law, key, levels)
        t -= 1
    return x


def draft(model: Model, m: int, x: Tensor, t: int, key: NDArray[np.uint64]) -> Tensor:
    """Where drafts end."""
    leaps, task, end, begun = (
        Leaps(model, m),
        np.zeros(len(x), np.int64),
        torch.zeros_like(x),
        np.zeros(len(x), np.bool_),
    )
    while t > 0:
        x, end, *_ = leaps.leap(x, np.full(len(x), t), task, key, end, begun)
        t, begun = int(leaps.below[t]), np.ones(len(x), np.bool_)
    return x


def rewards(model: Model, x: Tensor) -> dict[str, F64]:
    """Of states x_0, each reward, (n,)."""
    samples = model.kernel.decode(x)
    return {name: make()(samples, None).double().numpy() for name, make in SEARCHED.items()}


@without_graph()
def measured(job: Job) -> Row:
    """A cell: each estimator's errors and cost, by reward."""
    try:
        plain, level = model_of(""), job.level
        key = child_keys(np.array([root_key(job.seed, level)], np.uint64), T + 1, np.arange(job.states), at_root=True)
        x, _ = plain.prior(np.zeros(job.states, np.int64), plain.prior_noise(key))
        x = walk(plain, x, T, key, level)
        fresh = partial(_fresh, key, level)
        below = [rewards(plain, walk(plain, x, level, fresh(i))) for i in range(job.rollouts)]
        guesses = estimates(job, x, fresh)
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    told: dict[str, Any] = {}
    for name in SEARCHED:
        found = np.stack([r[name] for r in below])  # (rollouts, states)
        truth, scale = found.mean(0), float(found.std())
        told[name] = {
            "noise": float(found.std(0).mean() / scale / np.sqrt(job.rollouts)),
            "spread": float(truth.std() / scale),
            "errors": {guess: errors(r[name], truth, scale) for guess, (_, r) in guesses.items()},
        }
    return job.row | {"rewards": told, "nfe": {name: nfe for name, (nfe, _) in guesses.items()}} | where_it_ran()


def _fresh(key: NDArray[np.uint64], level: int, i: int) -> NDArray[np.uint64]:
    """Keys of further children of the states."""
    return child_keys(key, level, np.full(len(key), i + 1))


def estimates(
    job: Job, x: Tensor, fresh: Callable[[int], NDArray[np.uint64]]
) -> dict[str, tuple[float, dict[str, F64]]]:
    """NFE and rewards of each estimator at states x."""
    plain, t = model_of(""), job.level
    law, _ = plain.evaluate(x, np.full(len(x), t), np.zeros(len(x), np.int64))
    found = {"endpoint": (1.0, rewards(plain, law.endpoint))}
    for i, m in enumerate(DRAFTS):
        own = fresh(job.rollouts + i)
        found[f"draft of {m}"] = (plain.spec.draft_prices(m)[t], rewards(plain, draft(plain, m, x, t, own)))
    for i, m in enumerate(STEPS if job.student else ()):
        other, own = model_of(job.student), fresh(job.rollouts + len(DRAFTS) + i)
        steps = Leaps(other, m).left[t]
        nfe = round(float(steps * other.spec.draft_ratio), 2)
        found[f"student of {m}"] = (nfe, rewards(other, draft(other, m, x, t, own)))
    found["rollout"] = (float(t), rewards(plain, walk(plain, x, t, fresh(job.rollouts + 99))))
    return found


def errors(guess: F64, truth: F64, scale: float) -> list[float]:
    """Root mean square error, and what is left of it after a fit; in standard deviations of the reward."""
    rho = float(np.corrcoef(guess, truth)[0, 1]) if guess.std() > 0 and truth.std() > 0 else 0.0
    left = float(truth.std()) * np.sqrt(1 - rho**2)
    return [float(np.sqrt(np.mean((guess - truth) ** 2)) / scale), float(left / scale)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    states: int = 48
    """a level and seed"""
    rollouts: int = 48
    """that make the truth of a state"""
    student: str = ""
    """an expression of the student, such as "student('mnist')"; none by default"""
    seeds: int = 3
    """how many"""
    levels: tuple[int, ...] = LEVELS
    """of the states"""
    out: Path = Path("runs/results/drafts/values.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), measured, lambda row: f"{len(row['nfe'])} estimators")
        seeds = range(self.seeds)
        every.fill(Job(t, self.states, self.rollouts, self.student, seed) for seed in seeds for t in self.levels)
        return 0


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    first = done[0]
    by = f", the student `{first['student']}`" if first["student"] else ""
    seeds = len({row["seed"] for row in done})
    return (
        f"# The value of a node\n\n`mnist(num_steps={T})`, {first['states']} states a level and seed, {seeds} seeds, "
        f"the truth of a state from {first['rollouts']} rollouts{by}. Each cell: NFE, root mean square "
        "error, and (in brackets) what is left after offset and slope are fitted; in standard deviations of the reward "
        "among the samples below states of that level; means over seeds. What the estimators are is in the head of "
        "`experiments/drafts/values.py`. `spread` is the standard deviation of the values themselves: an error that "
        "large after the fit is no knowledge at all; `noise` is the standard error of the truth.\n\n"
        + "\n\n".join(section(done, reward) for reward in SEARCHED)
        + f"\n\nMachine: {first['machine']}.\n"
    )


def section(rows: Sequence[Row], reward: str) -> str:
    """A reward's table: estimators by level."""
    levels = sorted({row["level"] for row in rows}, reverse=True)
    at = {t: [row for row in rows if row["level"] == t] for t in levels}
    names = list(rows[0]["nfe"])
    lines = [[name, *(cell(at[t], reward, name) for t in levels)] for name in names]
    for what in ("spread", "noise"):
        lines.append([what, *(f"{np.mean([row['rewards'][reward][what] for row in at[t]]):.2f}" for t in levels)])
    return f"## {reward}\n\n{markdown_table(lines, ('estimator', *(f't = {t}' for t in levels)))}"


def cell(rows: Sequence[Row], reward: str, name: str) -> str:
    error, left = np.mean([row["rewards"][reward]["errors"][name] for row in rows], 0)
    return f"{rows[0]['nfe'][name]:g}: {error:.2f} ({left:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("values", {"run": Run, "report": reporting("drafts/values", KEY, report)}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
