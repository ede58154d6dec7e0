"""What drafts know of rollouts: rank correlations of their rewards, by evaluations, by level, and by what a draft does.

    python -m experiments.drafts.correlation run
    python -m experiments.drafts.correlation report

States come from independent paths, one a path, at a level t; each is drafted and finished on the noise of its own path.

    draft          as a search drafts: levels spaced by noise, each leap with a probe that has seen its noise
    held           the same levels without probes, x̂_0 of the state that a leap leaves: the coarse chain
    even           the coarse chain on levels evenly spaced in t
    fresh          as `draft`, with other noise than the path's

The figures are Spearman's ρ with 95 % percentile bounds of a bootstrap over paths (every column draws the same paths),
and how many of the tenth of the paths with the best drafts are among the tenth with the best rollouts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.mixtures.beds import BEDS as MIXTURES
from experiments.mnist.targets import kernel_on
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import resamples
from experiments.shared.sweep import FAILURES, Sweep, command_line, reporting
from treesearch.backends.base import describe
from treesearch.core.noise import child_keys, root_key
from treesearch.engine.asking import encode, without_graph
from treesearch.engine.drafting import Leaps
from treesearch.engine.model import Model
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward
from treesearch.rewards.images import classifier, image

F64 = NDArray[np.float64]
EVALUATIONS = (25, 10, 5, 3, 2)
KINDS: dict[str, tuple[int, ...]] = {"draft": EVALUATIONS, "held": (10, 5, 3), "even": (10, 5, 3), "fresh": (10,)}
KEY = ("bed", "level", "paths", "seed")
DRAWS, BATCH = 1_000, 64


@dataclass(frozen=True)
class Bed:
    """A kernel, what its samples are scored by, and the levels that drafts begin at.

    Args:
        kernel: made when it is needed.
        rewards: by name.
        levels: t.
        paths: how many.
        prompts: of the one task, None for a kernel that takes none.
    """

    kernel: Callable[[], Any]
    rewards: Mapping[str, Callable[[], Reward]]
    levels: tuple[int, ...]
    paths: int
    prompts: Callable[[], list[Any] | None] = lambda: None


def latents(*, unguided: bool = False) -> Any:
    """Stable Diffusion of random weights: its chain and its VAE, without a meaning.

    Args:
        unguided: whether drafts leave guidance out, and take one row an evaluation in place of two.
    """
    from experiments.bench.architectures import pipeline
    from treesearch.backends.pipelines import DiffusersKernel
    from treesearch.backends.wrappers.drafted import Drafted

    pipe = pipeline("sd", "tiny", torch.device("cpu"), torch.float32)
    guided, other = (DiffusersKernel(pipe, num_steps=50, eta=1.0, guidance_scale=scale) for scale in (7.5, 1.0))
    return Drafted(guided, other, ratio=0.5) if unguided else guided


def maze() -> Any:
    """The shipped model of plans."""
    from treesearch.backends.models.trajectory import maze_kernel

    return maze_kernel("medium", num_steps=20)


def plan() -> Reward:
    from treesearch.rewards.trajectories.maze import maze_plan

    return maze_plan("medium")


def ends() -> list[Any]:
    """A start and a goal."""
    from experiments.planning.pointmaze import held_out_pairs

    pair = held_out_pairs("medium", 1, 0, min_cells=8)[0]
    return [{"start": [*pair.start, 0.0, 0.0], "goal": list(pair.goal)}]


def mixture(name: str) -> Bed:
    return Bed(lambda: MIXTURES[name]().kernel(), {"tilt": lambda: MIXTURES[name]().reward}, (100, 60, 30), 2_000)


DIGITS = {"log p(8)": partial(classifier.digit, 8), "brightness": image.brightness, "JPEG size": image.compressibility}
BEDS: dict[str, Bed] = {
    "mnist": Bed(partial(kernel_on, "cpu"), DIGITS, (50, 25), 300),
    "mix16_hard": mixture("mix16_hard"),
    "mix64_hard": mixture("mix64_hard"),
    "maze": Bed(maze, {"plan": plan}, (20, 10), 300, ends),
    "sd": Bed(latents, {"brightness": image.brightness}, (50, 25), 100, lambda: ["a cat"]),
    "sd, unguided drafts": Bed(
        partial(latents, unguided=True), {"brightness": image.brightness}, (50, 25), 100, lambda: ["a cat"]
    ),
}


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    bed: str
    level: int
    paths: int
    seed: int


@cache
def model_of(bed: str, even: bool = False) -> Model:
    """The kernel, its drafts on levels evenly spaced in t where that is asked."""
    of = BEDS[bed]
    kernel, prompts, reward = of.kernel(), of.prompts(), next(iter(of.rewards.values()))()
    spec = describe(kernel, identify=False)
    if even:
        spec = spec._replace(draft_times=tuple(t / spec.num_steps for t in range(spec.num_steps + 1)))
    encoded = None if prompts is None else encode(kernel, prompts)
    return Model(kernel, spec, reward, prompts=prompts, encoded=encoded, batch_size=BATCH)


def walk(model: Model, x: Tensor, t: int, key: NDArray[np.uint64], down_to: int = 0) -> Tensor:
    """States at a level below, on the noise of the keys."""
    for level in range(t, down_to, -1):
        t_, task = np.full(len(x), level), np.zeros(len(x), np.int64)
        law, _ = model.evaluate(x, t_, task)
        x, _ = model.draw(law, key, t_)
    return x


def drafted(leaps: Leaps, x: Tensor, t: int, key: NDArray[np.uint64], probing: bool) -> Tensor:
    """Where drafts end, whether their leaps probe or hold x̂_0 of what they leave."""
    task, end, begun = np.zeros(len(x), np.int64), torch.zeros_like(x), np.zeros(len(x), np.bool_)
    while t:
        x, end, *_ = leaps.leap(x, np.full(len(x), t), task, key, end, begun)
        t, begun = int(leaps.below[t]), np.full(len(x), probing)
    return x


def by_batches(of: Callable[..., Tensor], x: Tensor, key: NDArray[np.uint64]) -> Tensor:
    """What a function makes of states and their keys."""
    return torch.cat([of(x[i : i + BATCH], key=key[i : i + BATCH]) for i in range(0, len(x), BATCH)])


@without_graph()
def measured(job: Job) -> Row:
    """A cell: ρ by reward, kind and evaluations."""
    try:
        model, level = model_of(job.bed), job.level
        top = model.spec.num_steps
        root = np.array([root_key(job.seed, 0)], np.uint64)
        key = child_keys(root, top + 1, np.arange(job.paths), at_root=True)
        other = child_keys(np.array([root_key(job.seed, 1)], np.uint64), top + 1, np.arange(job.paths), at_root=True)
        start = model.prior(np.zeros(job.paths, np.int64), model.prior_noise(key))[0]
        x = by_batches(partial(_walk, model, top, level), start, key)
        full = rewards(job.bed, by_batches(partial(_walk, model, level, 0), x, key))
        found: dict[str, Any] = {name: {kind: {} for kind in KINDS} for name in full}
        for kind, evaluations in KINDS.items():
            for m in (m for m in evaluations if m <= top):
                leaps = Leaps(model_of(job.bed, even=kind == "even"), m)
                end = by_batches(partial(_draft, leaps, level, kind), x, other if kind == "fresh" else key)
                for name, r in rewards(job.bed, end).items():
                    found[name][kind][str(m)] = [int(leaps.left[level]), *agreement(r, full[name])]
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    return job.row | {"rewards": found} | where_it_ran()


def _walk(model: Model, t: int, down_to: int, x: Tensor, key: NDArray[np.uint64]) -> Tensor:
    return walk(model, x, t, key, down_to)


def _draft(leaps: Leaps, t: int, kind: str, x: Tensor, key: NDArray[np.uint64]) -> Tensor:
    return drafted(leaps, x, t, key, kind in ("draft", "fresh"))


def rewards(bed: str, x: Tensor) -> dict[str, F64]:
    """Of states x_0, each reward, (n,)."""
    model = model_of(bed)
    samples, prompts = model.kernel.decode(x), BEDS[bed].prompts()
    told = None if prompts is None else prompts * len(x)
    return {name: make()(samples, told).double().numpy() for name, make in BEDS[bed].rewards.items()}


def agreement(draft: F64, full: F64) -> list[float]:
    """Spearman's ρ, its bounds, and the share of the best tenth that the best drafts find."""
    picks = resamples(len(full), DRAWS)
    low, high = np.quantile(spearman(draft[picks], full[picks]), [0.025, 0.975])
    best = max(1, len(full) // 10)
    found = set(np.argsort(-draft, kind="stable")[:best]) & set(np.argsort(-full, kind="stable")[:best])
    return [float(spearman(draft[None], full[None])[0]), float(low), float(high), len(found) / best]


def spearman(one: F64, other: F64) -> F64:
    """Correlations of ranks in each row of (k, n), ties at their mean; 0 where one does not vary."""
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (one, other))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.zeros_like(size), where=size > 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    beds: tuple[str, ...] = tuple(BEDS)
    """which"""
    paths: int | None = None
    """of each bed; its own number by default"""
    seed: int = 0
    """of all noise"""
    out: Path = Path("runs/results/drafts/correlation.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), measured, lambda row: f"{len(row['rewards'])} rewards")
        every.fill(Job(bed, t, self.paths or BEDS[bed].paths, self.seed) for bed in self.beds for t in BEDS[bed].levels)
        return 0


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    return (
        "# What drafts know of rollouts\n\nSpearman's ρ of the rewards of draft and finished rollout, 95 % bounds, and "
        "in brackets the share of the best tenth of rollouts that is among the best tenth of drafts. Columns are of "
        "drafts of so many evaluations from T; before the colon stands how many of them are left from the level t. "
        "What the rows are is in the head of `experiments/drafts/correlation.py`.\n\n"
        + "\n\n".join(section(row, name) for row in done for name in row["rewards"])
        + f"\n\nMachine: {done[0]['machine']}.\n"
    )


def section(row: Row, reward: str) -> str:
    """A table: kinds by evaluations."""
    of = row["rewards"][reward]
    columns = list(of["draft"])
    lines = [[kind, *(cell(of[kind].get(m)) for m in columns)] for kind in KINDS]
    table = markdown_table(lines, ("", *columns))
    return f"## {row['bed']}, {reward}, from t = {row['level']}, {row['paths']} paths\n\n{table}"


def cell(found: Sequence[float] | None) -> str:
    if found is None:
        return "–"
    left, rho, low, high, best = found
    return f"{left}: {rho:.2f} ({low:.2f} to {high:.2f}) [{best:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    commands = {"run": Run, "report": reporting("drafts/correlation", KEY, report)}
    return command_line("correlation", commands, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
