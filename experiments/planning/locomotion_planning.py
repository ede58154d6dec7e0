"""Locomotion by planning: return of every method at equal NFE, beside the behaviour that the model was trained on.

    python -m experiments.planning.locomotion_planning run --weights runs/locomotion/halfcheetah.safetensors
    python -m experiments.planning.locomotion_planning report --data runs/locomotion/halfcheetah.npz

Every decision plans H steps for `episodes` environments at once, executes the first `steps` actions of the plan with
the highest return, as the model predicts it, and replans; with `warm`, from its last plans, noised to T/2, so that the
same NFE pay for twice as many. A cell is one method at one budget from one set of first states; its budget is in
rollouts, n·T NFE for each decision and environment. The base sampler executes its first plan. Settings are chosen among
at most four by mean return at the smallest budget above one, on seeds of their own, cold, replanning every two steps.

Intervals are of the percentile bootstrap over episodes; differences are of episodes with the same first state. The
behaviour's return is that of whole episodes of the data, cut to the same number of steps.

Source: Planning with Diffusion for Flexible Behavior Synthesis (Janner et al., 2022), section 5.3.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import treesearch as ts
from experiments.planning.locomotion import Array, Runners, make
from experiments.planning.methods import NARROW, Setup
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, locked, read, where_it_ran
from experiments.shared.grids import Entry, How, check_names, first_best
from experiments.shared.stats import bootstrap
from experiments.shared.sweep import FAILURES, Sweep, check_seeds, command_line, tuned
from experiments.shared.tables import table
from treesearch.backends.guidance.diffuser import Diffuser
from treesearch.backends.models.trajectory import TrajectoryKernel, trajectory_kernel
from treesearch.offline.data import joined
from treesearch.offline.readers import read_npz
from treesearch.rewards.trajectories.trajectory import discounted_return

FIRST_STATES = 9_000_000  # seeds of first states, apart from those of the data
KEY = ("split", "method", "settings", "rollouts", "steps", "warm", "seed")
BASE, FK = "best_of_n", "fk"
STEPS = 2  # executed before the next decision, where nothing else is said


def plain(method: Callable[..., Any], kernel: TrajectoryKernel, **how: Any) -> Setup:
    """A method of treesearch on the bare chain."""
    return Setup(kernel, discounted_return(kernel.channels, 1.0), method(**how))


def value_guided(kernel: TrajectoryKernel, **how: Any) -> Setup:
    """Diffuser's rule with the predicted return; the best of as many guided samples as the budget allows."""
    reward = discounted_return(kernel.channels, 1.0)
    return Setup(Diffuser(kernel, reward, **how), reward, ts.BestOfN())


def at_every_level(method: Callable[..., Any], kernel: TrajectoryKernel, **how: Any) -> Setup:
    """A method that scores endpoints, at every level that has noise below it."""
    return plain(method, kernel, schedule=(*range(kernel.num_steps - 1, 1, -1), 0), **how)


METHODS: dict[str, Entry] = {
    "base": Entry(partial(plain, partial(ts.BestOfN, n=1)), budgets=(1,)),
    "best_of_n": Entry(partial(plain, ts.BestOfN)),
    "fk": Entry(partial(plain, ts.FeynmanKac), ({"lam": 0.3}, {"lam": 1.0}, {"lam": 3.0})),
    "fk_every": Entry(partial(at_every_level, ts.FeynmanKac), ({"lam": 0.3}, {"lam": 1.0}, {"lam": 3.0})),
    "beam": Entry(
        partial(at_every_level, ts.BeamSearch),
        ({"beam_width": 1, "branching": 8}, {"beam_width": 2, "branching": 4}, {"beam_width": 4, "branching": 2}),
    ),
    "dts_star": Entry(
        partial(plain, partial(ts.DiffusionTreeSearch, wave=1)),
        (NARROW, NARROW | {"c_uct": 0.3}, NARROW | {"c_uct": 3.0}, NARROW | {"backup": "max"}),
    ),
    "tree_search": Entry(partial(plain, partial(ts.TreeSearch, wave=1))),
    "tree_looks": Entry(partial(plain, partial(ts.TreeSearch, looks="endpoints")), ({}, {"fresh": 0.0})),
    "diffuser": Entry(value_guided, ({"scale": 0.1}, {"scale": 1.0}, {"scale": 10.0})),
}


def control(
    setup: Setup, runners: Runners, *, rollouts: int, steps: int, length: int, seed: int, warm: bool = False
) -> ts.Planner:
    """Run `length` steps, planning every `steps` of them; returns the planner, whose decisions say what it cost.

    Args:
        setup: what plans.
        runners: environments at their first states.
        rollouts: budget of a decision for one environment.
        warm: whether decisions go on from the plans of the one before.
    """
    planner = ts.Planner(
        setup.kernel,
        setup.reward,
        setup.method,
        budget=ts.Budget(nfe=rollouts * setup.kernel.num_steps),
        steps=steps,
        warm_start=warm,
        max_decisions=length,
        seed=seed,
        batch_size=256,
    )
    for begin in range(0, length, steps):
        if not runners.alive.any():
            break
        actions = planner.act_many(runners.observations, active=runners.alive.tolist())
        runners.run(actions.numpy()[:, : length - begin])
    return planner


def behaviour_returns(data: Sequence[Path], length: int) -> Array:
    """Return of the first `length` steps of each episode in some files; those that a limit cut earlier are left out.

    Raises:
        ValueError: no episode is that long.
    """
    found = joined([read_npz(path) for path in data])
    kept = [
        found.rewards[end - n : min(end, end - n + length)].sum(dtype=np.float64)
        for end, n, over in zip(found.ends, found.lengths, found.terminated, strict=True)
        if n >= length or over
    ]
    if not kept:
        raise ValueError(f"{', '.join(path.name for path in data)}: no episode has {length} steps")
    return np.array(kept)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    split: str  # tune or test
    method: str
    settings: How
    rollouts: int
    steps: int
    warm: bool
    seed: int


@cache
def kernel_of(weights: Path, num_steps: int, horizon: int | None, device: str) -> TrajectoryKernel:
    """The model, read once."""
    return trajectory_kernel(weights, num_steps, horizon=horizon, device=device)


def played(job: Job, run: Run) -> Row:
    """A cell; one that fails says why."""
    began = time.perf_counter()
    kernel = kernel_of(run.weights, run.num_steps, run.horizon, run.device)
    seeds = [FIRST_STATES + 1_000 * job.seed + i for i in range(run.episodes)]
    runners = Runners(partial(make, run.environment), seeds)
    try:
        setup = METHODS[job.method].make(kernel, **job.settings)
        planner = control(
            setup,
            runners,
            rollouts=job.rollouts,
            steps=job.steps,
            length=run.length,
            seed=job.seed,
            warm=job.warm,
        )
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
    made = planner.decisions
    planned = sum(sum(d.planned) for d in made)
    return job.row | {
        "returns": runners.returns.tolist(),
        "alive": int(runners.alive.sum()),
        "nfe": sum(d.nfe for d in made) / planned,
        "predicted": float(np.mean([np.nanmean(d.rewards) for d in made])),
        "planning_seconds": sum(d.seconds for d in made) / planned,
        "seconds": time.perf_counter() - began,
        **where_it_ran(),
    }


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    weights: Path = Path("runs/locomotion/halfcheetah.safetensors")
    """a model with a reward channel"""
    environment: str = "HalfCheetah-v5"
    """gymnasium id"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which methods"""
    rollouts: tuple[int, ...] = (1, 8)
    """budgets of a decision"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the figures"""
    tuning_seeds: tuple[int, ...] = (100,)
    """of the choice of settings"""
    episodes: int = 8
    """environments of a cell"""
    length: int = 100
    """steps of an episode"""
    steps: tuple[int, ...] = (STEPS,)
    """executed before the next decision"""
    warm: tuple[bool, ...] = (False,)
    """whether decisions go on from the plans of the one before"""
    horizon: int | None = None
    """rows of a plan; None for the model's own"""
    num_steps: int = 10
    """T of the chain"""
    device: str = "cpu"
    """of the model"""
    out: Path = Path("runs/results/locomotion.jsonl")
    """row file"""

    def run(self) -> int:
        """Run the cells; the exit code."""
        check_seeds(self.seeds, self.tuning_seeds)
        check_names("method", self.methods, METHODS)
        with locked(self.out.parent / f".{self.out.stem}"):
            cells = Cells(self.out, KEY, self._asked())

            def words(row: Row) -> str:
                return f"{np.mean(row['returns']):.0f}, {row['nfe']:,.0f} NFE a decision"

            every: Sweep[Job] = Sweep(cells, lambda job: played(job, self), words)
            every.fill(self._tuning())
            every.fill(self._figures({name: chosen(name, cells.rows) for name in self.methods}))
        return 0

    def _asked(self) -> Row:
        kernel = kernel_of(self.weights, self.num_steps, self.horizon, self.device)
        own = {name: getattr(self, name) for name in ("environment", "episodes", "length", "num_steps")}
        return own | {"horizon": kernel.horizon, "fingerprint": kernel.fingerprint}

    def _tuning(self) -> Iterator[Job]:
        at = min((n for n in self.rollouts if n > 1), default=1)
        for (method, how), seed in product(tuned(self.methods, METHODS), self.tuning_seeds):
            yield Job("tune", method, how, at, STEPS, False, seed)

    def _figures(self, picked: dict[str, How]) -> Iterator[Job]:
        for seed, steps, warm, method in product(self.seeds, self.steps, self.warm, self.methods):
            for rollouts in METHODS[method].budgets or self.rollouts:
                yield Job("test", method, picked[method], rollouts, steps, warm, seed)


def chosen(method: str, rows: Sequence[Row]) -> How:
    """The settings of the highest mean return among the cells for tuning."""
    grid = METHODS[method].grid
    cells = [row for row in rows if row["split"] == "tune" and row["method"] == method and "error" not in row]
    means = [[np.mean(row["returns"]) for row in cells if row["settings"] == how] for how in grid]
    return grid[first_best([float(np.mean(found)) if found else None for found in means], max)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables from the rows."""

    out: Path = Path("runs/results/locomotion.jsonl")
    """row file"""
    data: tuple[Path, ...] = ()
    """what the model was trained on, for the behaviour's return"""
    to: Path = Path("runs/results/locomotion.md")
    """the tables"""

    def run(self) -> int:
        """Write the report; the exit code."""
        rows = [row for row in read(self.out) if row["split"] == "test" and "error" not in row]
        if not rows:
            raise ValueError(f"{self.out} has no cell yet: run the experiment first")
        text = f"# Locomotion\n\n{EXPLAINED}\n\n{behaviour_line(rows, self.data)}\n\n{tables(rows)}\n"
        self.to.parent.mkdir(parents=True, exist_ok=True)
        self.to.write_text(text)
        print(text)
        return 0


EXPLAINED = (
    "Return with 95 % bootstrap intervals over episodes. A budget of n rollouts is n·T NFE for each decision and "
    "environment; differences are of episodes with the same first state."
)


def behaviour_line(rows: Sequence[Row], data: Sequence[Path]) -> str:
    """The behaviour's return over as many steps."""
    if not data:
        return "The behaviour's return: not run (--data)."
    found = behaviour_returns(data, rows[0]["asked"]["length"])
    return (
        f"The behaviour's return over {rows[0]['asked']['length']} steps, {len(found)} episodes of the data: "
        f"{bootstrap(found[None]).text(1.0)}; its best episode {found.max():.0f}."
    )


def tables(rows: Sequence[Row]) -> str:
    """Returns by method and budget, predictions, differences to best-of-N and FK; the same for other ways to replan."""
    usual = [row for row in rows if (row["steps"], row["warm"]) == (STEPS, False)]
    budgets = sorted({row["rollouts"] for row in usual})
    cells = {f"{b} rollouts": [row for row in usual if row["rollouts"] == b] for b in budgets}
    parts = [
        *("## Return", _returns(cells), "## Less best-of-N's", _gaps(cells, BASE), "## Less FK's", _gaps(cells, FK)),
        *("## Predicted return of the chosen plans", _predicted(cells), "## Episodes", _episodes(cells)),
    ]
    at = min((b for b in budgets if b > 1), default=1)
    ways = sorted({(row["warm"], row["steps"]) for row in rows if row["rollouts"] == at})
    if len(ways) > 1:
        cells = {
            f"every {steps}{', warm' if warm else ''}": [
                row for row in rows if (row["warm"], row["steps"], row["rollouts"]) == (warm, steps, at)
            ]
            for warm, steps in ways
        }
        parts += [f"## Return at {at} rollouts, by steps between decisions", _returns(cells)]
        parts += ["## Less FK's, the same steps and start", _gaps(cells, FK), "## Episodes", _episodes(cells)]
    return "\n\n".join(parts)


def _returns(cells: dict[str, list[Row]]) -> str:
    def mean(method: str, column: str) -> str | None:
        found = _by_seed(cells[column], method)
        return bootstrap(np.concatenate(list(found.values()))[None]).text(1.0) if found else None

    return table(_methods(cells), list(cells), mean)


def _gaps(cells: dict[str, list[Row]], reference: str) -> str:
    def gap(method: str, column: str) -> str | None:
        one, other = _by_seed(cells[column], method), _by_seed(cells[column], reference)
        shared = sorted(one.keys() & other.keys())
        return bootstrap(np.concatenate([one[s] - other[s] for s in shared])[None]).text(1.0) if shared else None

    return table([name for name in _methods(cells) if name not in (reference, "base")], list(cells), gap)


def _predicted(cells: dict[str, list[Row]]) -> str:
    def mean(method: str, column: str) -> str | None:
        found = [row["predicted"] for row in cells[column] if row["method"] == method and "predicted" in row]
        return f"{np.mean(found):.1f}" if found else None

    return table(_methods(cells), list(cells), mean)


def _episodes(cells: dict[str, list[Row]]) -> str:
    def count(method: str, column: str) -> str | None:
        found = _by_seed(cells[column], method)
        return f"{sum(map(len, found.values()))}, {len(found)} seeds" if found else None

    return table(_methods(cells), list(cells), count)


def _methods(cells: dict[str, list[Row]]) -> list[str]:
    return [name for name in METHODS if any(row["method"] == name for rows in cells.values() for row in rows)]


def _by_seed(rows: Sequence[Row], method: str) -> dict[int, Array]:
    return {row["seed"]: np.array(row["returns"]) for row in rows if row["method"] == method}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("locomotion_planning", {"run": Run, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
