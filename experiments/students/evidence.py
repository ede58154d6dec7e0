"""What students are worth on the ring, each target beside its teacher: python -m experiments.students.evidence run

    rectified     DDPM's schedule: the teacher's deterministic steps, `Rectified`, the same pairs with the plain ε loss,
                  `Phased` in 4; and the variance of ε̂ along paths
    consistency   Stable Diffusion's schedule and DDPM's: `Consistency`, `SubPath` linear and official, `FlowMap`; and
                  the inconsistency before over after training
    revive        one step from degraded draws: `ScoreDifference` with a dynamic and a fixed scope, regression alone;
                  energy distance to the ring
    scales        one step from noise under a guided teacher: `ScoreDifference` with κ ~ U(.5, 4) and with fixed κ;
                  sliced W1 over the last half of training, mean and spread
    reflow        a search's samples train the next teacher, whose pairs train the next student

T = 50, pairs of 25 steps, 2,500 steps of 256 rows for each student, 5,000 for a teacher. Figures are sliced W1 to the
ring at 1, 2 and 4 evaluations where nothing else is said.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.distances import Reference
from experiments.shared.stats import mean_se
from experiments.shared.sweep import Sweep, command_line, reporting
from experiments.students import beds
from treesearch.backends.chains.diffusion import CONDITION, DiffusionKernel
from treesearch.backends.training.consistency import Consistency, self_consistency
from treesearch.backends.training.distil import Pairs, Student, Target, distil
from treesearch.backends.training.flow_map import FlowMap, composition_error, mapped
from treesearch.backends.training.rectified import Phased, Rectified
from treesearch.backends.training.score_difference import ScoreDifference
from treesearch.backends.training.sub_path import SubPath
from treesearch.report.tables import markdown_table

KEY = ("table", "arm", "seed")
T, FEW = 50, (1, 2, 4)
STEPS, ROWS = 2500, 256
HELD = torch.arange(4000)
LEVEL = 12  # of degraded draws, σ/α about .3 on Stable Diffusion's grid
GUIDED = 2.25  # the mean of U(.5, 4)
LAM = 3.0


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    table: str
    arm: str
    seed: int


Figures = dict[str, float | list[float]]


@cache
def bed(name: str, seed: int) -> DiffusionKernel:
    """The teacher on T levels."""
    return beds.kernel(beds.teacher(name, seed), beds.schedule(name, T))


@cache
def pairs(name: str, seed: int) -> Pairs:
    """The teacher's, in 25 steps."""
    few = beds.kernel(beds.teacher(name, seed), beds.schedule(name, 25))
    return Pairs.of(few, 20_000, seed=seed, batch_size=4000)


def taught(of: DiffusionKernel, target: Target, data: Pairs, seed: int, network: nn.Module | None = None) -> nn.Module:
    """A student, by default one that begins as its teacher."""
    begins = beds.copied(of.model) if network is None else network  # pyright: ignore[reportArgumentType]
    return distil(of, begins, target, data, beds.plan(STEPS), batch_size=ROWS, seed=seed)


def deterministic(of: DiffusionKernel, seed: int, steps: Sequence[int] = FEW) -> Figures:
    """Sliced W1 of so many deterministic steps."""
    return {f"w1 at {n}": beds.reference().w1(beds.deterministic(of, n, seed)) for n in steps}


def renoised(of: DiffusionKernel, seed: int) -> Figures:
    """Sliced W1 of a consistency student."""
    return {f"w1 at {n}": beds.reference().w1(beds.renoised(of, n, seed)) for n in FEW}


def on(of: DiffusionKernel, network: nn.Module) -> DiffusionKernel:
    """A student on the levels of its teacher."""
    return beds.kernel(network, of.chain.schedule)


# tables


def rectified(arm: str, seed: int) -> Figures:
    of, data = bed("ddpm", seed), pairs("ddpm", seed)
    targets: dict[str, Target] = {"rectified": Rectified(), "plain ε": beds.Denoising(paired=True), "phased": Phased()}
    found = of if arm == "teacher" else on(of, taught(of, targets[arm], data, seed))
    return deterministic(found, seed, (*FEW, 25)) | {"variance of ε": beds.eps_variance(found, seed)}


def consistency(name: str) -> Callable[[str, int], Figures]:
    """The table of a schedule."""

    def row(arm: str, seed: int) -> Figures:
        of, data = bed(name, seed), pairs(name, seed)
        if arm == "teacher":
            return deterministic(of, seed)
        if arm == "flow map":
            return flow_map(of, data, seed)
        targets: dict[str, Target] = {
            "consistency": Consistency(),
            "sub-path, linear": SubPath(),
            "sub-path, official": SubPath(sigma_gamma="official"),
        }
        network = taught(of, targets[arm], data, seed)
        gaps = [self_consistency(of, Student(n, of.chain), data[HELD], chance(seed)) for n in (of.model, network)]  # pyright: ignore[reportArgumentType]
        return renoised(on(of, network), seed) | {"inconsistency, before over after": gaps[0] / gaps[1]}

    return row


def flow_map(of: DiffusionKernel, data: Pairs, seed: int) -> Figures:
    """Of two times; it begins as its teacher, deaf to the second."""
    begins = beds.two_times(of.model)  # pyright: ignore[reportArgumentType]
    before = composition_error(Student(begins, of.chain), data[HELD], chance(seed))
    student = Student(taught(of, FlowMap(), data, seed, begins), of.chain)
    after = composition_error(student, data[HELD], chance(seed))
    found: Figures = {f"w1 at {n}": beds.reference().w1(jumps(student, n, seed)) for n in FEW}
    return found | {"inconsistency, before over after": before / after}


@torch.no_grad()
def jumps(student: Student, steps: int, seed: int) -> Tensor:
    """Samples of a flow map in so many jumps."""
    x, levels = beds.noise(seed), [round(T * i / steps) for i in range(steps, -1, -1)]
    for t, s in itertools.pairwise(levels):
        x = mapped(student, x, torch.full((len(x),), t), torch.full((len(x),), s))
    return x


def revive(arm: str, seed: int) -> Figures:
    of = bed("sd", seed)
    truth, _ = beds.ring(20_000, 10 + seed)
    rng = chance(seed)
    degraded = 0.8 * truth + 0.35 * torch.randn(truth.shape, generator=rng)
    data, held = Pairs(degraded[:16_000], truth[:16_000]), degraded[16_000:]
    clean = beds.reference().draws[:4000].float()
    if arm == "degraded":
        return {"energy": beds.energy_distance(held, clean)}
    target = Regression() if arm == "regression" else score(of, arm, seed)
    seen: list[float] = []
    network = distil(of, beds.copied(of.model), target, data, beds.plan(1200, epochs=12), batch_size=ROWS, seed=seed,  # pyright: ignore[reportArgumentType]
                     after=lambda *_: seen.append(scope(target)))  # fmt: skip
    with torch.no_grad():
        made = Student(network, of.chain).endpoint(held, torch.full((len(held),), LEVEL))
    return {"energy": beds.energy_distance(made, clean), "scope, by hundred steps": seen}


def score(of: DiffusionKernel, scope_of: Any, seed: int) -> ScoreDifference:
    """The target of a restorer."""
    return ScoreDifference(beds.copied(of.model), level=LEVEL, scope=scope_of, noise=(0.05, 3.0), regression=0.25)  # pyright: ignore[reportArgumentType]


def scope(target: Target) -> float:
    """How far it reaches now."""
    return float(target.scope_of(torch.zeros(1))[1]) if isinstance(target, ScoreDifference) else math.nan


class Regression:
    """The mean of what was there before, and nothing else."""

    def loss(self, teacher: Any, student: Student, average: Student, rows: Pairs, rng: torch.Generator) -> Tensor:
        made = student.endpoint(rows.noise, torch.full((len(rows.x0),), LEVEL))
        return (made - rows.x0).square().mean()


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def prompted(seed: int) -> DiffusionKernel:
    """A teacher that is told the mode; one prompt in ten told it nothing."""
    draws, mode = beds.ring(50_000, seed)
    told = nn.functional.one_hot(mode, beds.MODES).float() * (torch.rand(len(mode), 1, generator=chance(seed)) > 0.1)
    network, grid = beds.untrained(seed, extra=beds.MODES), beds.schedule("sd", 1000)
    data, how = Pairs(draws, draws, {CONDITION: told}), beds.plan(2 * STEPS, 2e-3, 0.999)
    trained = distil(beds.kernel(network, grid), network, beds.Denoising(), data, how, batch_size=ROWS, seed=seed)
    return prompted_on(trained, T)


def prompted_on(network: nn.Module, steps: int) -> DiffusionKernel:
    """The same on a grid."""
    grid = beds.schedule("sd", steps)
    return DiffusionKernel(network, state_shape=(2,), schedule=grid, condition=modes, name="prompted ring")


def modes(prompts: Sequence[Any]) -> Tensor:
    """What the network is told of modes."""
    return nn.functional.one_hot(torch.tensor([int(p) for p in prompts]), beds.MODES).float()


@cache
def prompted_pairs(seed: int) -> Pairs:
    few = prompted_on(prompted(seed).model, 25)  # pyright: ignore[reportArgumentType]
    return Pairs.of(few, 8000, seed=seed, prompts=range(beds.MODES), batch_size=4000)


def scales(arm: str, seed: int) -> Figures:
    of, data, network = prompted(seed), prompted_pairs(seed), beds.copied(prompted(seed).model)  # pyright: ignore[reportArgumentType]
    kappa = (0.5, 4.0) if arm == "random" else (float(arm.split()[1]),) * 2
    nothing = torch.zeros(1, beds.MODES)
    target = ScoreDifference(beds.copied(of.model), scope="fixed", noise=(0.05, 10.0), scales=kappa, absent=nothing)  # pyright: ignore[reportArgumentType]
    seen: list[float] = []

    def after(epoch: int, average: nn.Module, loss: float, seconds: float) -> None:
        with torch.no_grad():
            x, told = beds.noise(seed), modes([i % beds.MODES for i in range(beds.DRAWS)])
            made = Student(average, of.chain).endpoint(x, torch.full((len(x),), T), {CONDITION: told})
        seen.append(beds.reference().w1(made))

    distil(of, network, target, data, beds.plan(1600, epochs=16), batch_size=ROWS, seed=seed, after=after)
    late = seen[len(seen) // 2 :]
    return {"w1": mean(late), "spread": stdev(late), "w1 by hundred steps": seen}


def rightward(samples: Tensor, prompts: Any = None) -> Tensor:
    """How far right."""
    return samples.double()[:, 0]


@cache
def searched(seed: int) -> tuple[Tensor, int]:
    """Draws of a search on the teacher, and what they cost."""
    of = beds.kernel(beds.teacher("sd", seed), beds.schedule("sd", 25))
    method, budget = ts.FeynmanKac(num_particles=512, lam=LAM), ts.Budget(nfe=100_000)
    found = ts.search(of, rightward, method, budget=budget, seed=seed, progress=False)
    task = found.tasks[0]
    return task.fetch(task.leaves[task.draw_rows(beds.DRAWS, seed)]).float(), found.cost.nfe


@cache
def following(seed: int) -> nn.Module:
    """The next teacher: ordinary training on what the search found."""
    grid = beds.kernel(beds.teacher("sd", seed), beds.schedule("sd", 1000))
    return taught(grid, beds.Denoising(), Pairs(searched(seed)[0], searched(seed)[0]), seed)


@cache
def pupil(seed: int) -> DiffusionKernel:
    """The next student, of the next teacher's pairs."""
    few = beds.kernel(following(seed), beds.schedule("sd", 25))
    data = Pairs.of(few, 8000, seed=seed, batch_size=4000)
    return on(bed("sd", seed), taught(bed("sd", seed), Rectified(), data, seed, beds.copied(following(seed))))


def reflow(arm: str, seed: int) -> Figures:
    draws = beds.reference().draws
    heavy = torch.multinomial((LAM * rightward(draws)).exp(), beds.DRAWS, replacement=True, generator=chance(0))
    goal = Reference(draws[heavy])
    if arm == "search":
        found, nfe = searched(seed)
        return worth(found, goal) | {"evaluations": float(nfe)}
    if arm.startswith("student"):
        return worth(beds.deterministic(pupil(seed), int(arm.split()[-1]), seed), goal)
    network = beds.teacher("sd", seed) if arm == "teacher" else following(seed)
    return worth(beds.deterministic(beds.kernel(network, beds.schedule("sd", 25)), 25, seed), goal)


def worth(samples: Tensor, goal: Reference) -> Figures:
    return {"reward": float(rightward(samples).mean()), "w1 to the target": goal.w1(samples)}


TABLES: dict[str, tuple[Callable[[str, int], Figures], tuple[str, ...]]] = {
    "rectified": (rectified, ("teacher", "rectified", "plain ε", "phased")),
    "consistency, sd": (
        consistency("sd"),
        ("teacher", "consistency", "sub-path, linear", "sub-path, official", "flow map"),
    ),
    "consistency, ddpm": (consistency("ddpm"), ("consistency", "sub-path, linear", "sub-path, official")),
    "revive": (revive, ("degraded", "regression", "dynamic", "fixed")),
    "scales": (scales, ("random", "fixed 1", "fixed 2.25", "fixed 4")),
    "reflow": (reflow, ("teacher", "search", "next teacher", "student in 1", "student in 2")),
}


def run_cell(job: Job) -> Row:
    """A cell's row."""
    began = time.process_time()
    found = TABLES[job.table][0](job.arm, job.seed)
    return job.row | found | {"seconds": time.process_time() - began} | where_it_ran()


def page(rows: Sequence[Row]) -> str:
    """The tables."""
    parts = ["# Students on the ring", "", (__doc__ or "").partition("\n\n")[2].rstrip(), ""]
    for table, (_, arms) in TABLES.items():
        here = [row for row in rows if row["table"] == table]
        names = list(
            dict.fromkeys(n for row in here for n, v in row.items() if isinstance(v, float) and n != "seconds")
        )
        ran = [arm for arm in arms if any(row["arm"] == arm for row in here)]
        lines = [(arm, *(_cell(here, arm, name) for name in names)) for arm in ran]
        seeds = len({row["seed"] for row in here})
        if here:
            parts += [
                f"## {table}",
                "",
                "One seed." if seeds == 1 else f"{seeds} seeds, mean ± standard error.",
                "",
                markdown_table(lines, (table, *names)),
                "",
            ]
    return "\n".join(parts)


def _cell(rows: Sequence[Row], arm: str, name: str) -> str:
    values = [row[name] for row in rows if row["arm"] == arm and row.get(name) is not None]
    return mean_se(values).text() if values else "-"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run the cells that are not there."""

    seeds: tuple[int, ...] = (0, 1, 2)
    tables: tuple[str, ...] = tuple(TABLES)
    out: Path = Path("runs/results/students/ring.jsonl")
    threads: int = 1

    def run(self) -> int:
        torch.set_num_threads(self.threads)
        sweep_of = Sweep(
            Cells(self.out, KEY), run_cell, lambda row: str({k: v for k, v in row.items() if isinstance(v, float)})
        )
        sweep_of.fill(Job(table, arm, seed) for seed in self.seeds for table in self.tables for arm in TABLES[table][1])
        return 0


COMMANDS = {"run": Run, "report": reporting("students/ring", KEY, page)}

if __name__ == "__main__":
    sys.exit(command_line("students", COMMANDS, None, __doc__))
