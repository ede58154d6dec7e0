"""What directions of the MNIST model's h-space do: python -m experiments.interventions.hspace run

effect      supervised directions of slant, thickness and size from 300 rollouts of each seed, mixed and apart (each
            without its share in the others), added at ±2 to 32 other rollouts: the slope of every attribute, in
            standard deviations of it among samples for one of h; and how often the digit changes
diversity   7 children of each of 12 states x_t, by isotropic noise, by actions (off, and the shipped directions at
            ±3) that share their noise, by both, and by actions on the chain without noise: the root mean square
            difference of pixels between siblings, at equal NFE
mask        3 directions at a state x_t by the Jacobian of ε̂ within a box, beside those of all of ε̂ and random ones,
            at ±20 lengths: the share of |Δx_0| in the box, in x̂_0 of that step and in the sample
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.interventions.attributes import ATTRIBUTES, measured
from experiments.interventions.directions import boxed, carried, noises, state_at
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import over_seeds
from experiments.shared.sweep import Sweep, command_line, reporting
from treesearch.backends.interventions.base import CHOSEN
from treesearch.backends.interventions.directions import Directions
from treesearch.backends.interventions.hspace import hspace
from treesearch.backends.interventions.jacobian import jacobian
from treesearch.backends.interventions.rollouts import Walks, extremes, rollouts, supervised
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.report.tables import markdown_table
from treesearch.rewards.images.classifier import digit

KEY = ("kind", "arm", "of", "t", "seed")
T, PARTS, LEVELS = 25, ("mid_block", "up_blocks.0"), (20, 12, 5)
SHIPPED = "hspace.safetensors"
FOUND, SHOWN, ALPHA = 300, 32, 2.0  # rollouts to find, to show on, and the strength
PARENTS, STRENGTH = 12, 3.0
BOX, LENGTHS = (0, 14, 14, 28), 20.0  # upper right quarter
AREA = (BOX[2] - BOX[0]) * (BOX[3] - BOX[1]) / 28**2
OTHERS = 500_000  # seeds of what directions are tried on begin here
WAYS = ("noise", "actions", "both", "actions, η = 0")
MASKS = ("masked", "all of it", "random")


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    kind: str
    arm: str
    of: str
    t: int
    seed: int


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Every cell."""
    found = []
    for seed in seeds:
        found += [Job("effect", arm, part, 0, seed) for part in PARTS for arm in ("mixed", "apart")]
        found += [Job("diversity", way, "", t, seed) for t in LEVELS for way in WAYS]
        found += [Job("mask", arm, "", t, seed) for t in LEVELS for arm in MASKS]
    return found


@cache
def model(eta: float = 1.0) -> Any:
    """The kernel, made once."""
    return mnist_kernel(num_steps=T, eta=eta)


def run_cell(job: Job) -> Row:
    """A cell's row."""
    began = time.process_time()
    row = {"effect": effect, "diversity": diversity, "mask": masked}[job.kind](job)
    return job.row | row | {"seconds": time.process_time() - began} | where_it_ran()


@lru_cache(1)
def walked(part: str, seed: int) -> tuple[Walks, Tensor]:
    """Rollouts to find directions on, and the attributes of their samples; the last ones only."""
    walks = rollouts(model(), FOUND, seed, part)
    return walks, measured(model().decode(walks.x0))


def effect(job: Job) -> Row:
    """Slopes (attributes of directions, attributes) and the share of changed digits by direction."""
    walks, scores = walked(job.of, job.seed)
    groups = {name: extremes(score) for name, score in zip(ATTRIBUTES, scores.T, strict=True)}
    found = supervised(walks, groups, apart=job.arm == "apart")
    kernel, noise = hspace(model(), found, (-ALPHA, ALPHA)), noises(model(), SHOWN, OTHERS + job.seed)
    images = [model().decode(carried(kernel, noise[T], T, noise, i)) for i in range(1 + 2 * len(ATTRIBUTES))]
    values, labels = [measured(each) for each in images], [digits(each) for each in images]
    slopes = [(values[2 * i + 2] - values[2 * i + 1]).mean(0) / (2 * ALPHA) for i in range(len(ATTRIBUTES))]
    changed = [sum(float((labels[2 * i + s] != labels[0]).double().mean()) for s in (1, 2)) / 2 for i in range(3)]
    return {"slopes": [(slope / scores.std(0)).tolist() for slope in slopes], "changed": changed}


def digits(images: Tensor) -> Tensor:
    """What the classifier takes each for (n,)."""
    return torch.stack([digit(c)(images) for c in range(10)], 1).argmax(1)


def diversity(job: Job) -> Row:
    """Pixel distance between siblings."""
    parents = state_at(model(), job.t, PARENTS, OTHERS + job.seed)
    kernel = hspace(model(0.0 if job.arm == WAYS[3] else 1.0), SHIPPED, (-STRENGTH, STRENGTH))
    count = len(kernel.intervention.settings) + 1
    noise = noises(model(), PARENTS * count, job.seed).unflatten(1, (PARENTS, count))
    if job.arm not in ("noise", "both"):
        noise = noise[:, :, :1].expand_as(noise)
    settings = torch.arange(count).repeat(PARENTS) if job.arm != "noise" else 0
    ends = carried(kernel, parents.repeat_interleave(count, 0), job.t, noise.flatten(1, 2), settings)
    images = model().decode(ends).unflatten(0, (PARENTS, count)).flatten(2)
    pairs = torch.triu_indices(count, count, 1)
    gaps = (images[:, pairs[0]] - images[:, pairs[1]]).square().mean(2).sqrt()
    return {"distance": float(gaps.mean()), "nfe": PARENTS * count * job.t, "children": count}


def masked(job: Job) -> Row:
    """Shares of |Δx_0| in the box."""
    x, mask = state_at(model(), job.t, 1, OTHERS + job.seed), boxed((1, 28, 28), BOX)
    found = jacobian(model(), x, job.t, 3, mask if job.arm == "masked" else None)
    if job.arm == "random":
        noise = torch.randn(found.vectors.shape, generator=torch.Generator().manual_seed(job.seed))
        found = Directions(found.card, noise / noise.flatten(2).norm(dim=2)[..., None, None, None])
    kernel, noise = hspace(model(), found, (-LENGTHS, LENGTHS)), noises(model(), 1, job.seed).expand(-1, 7, -1, -1, -1)
    rows, settings = x.expand(7, *x.shape[1:]), torch.arange(7)
    level = torch.full((7,), job.t)
    seen = kernel.transition(rows, level, {CHOSEN: settings[:, None]}).endpoint
    ends = model().decode(carried(kernel, rows, job.t, noise, settings))
    return {
        "share": share(seen, mask),
        "share of samples": share(ends, mask),
        "moved": float((seen[1:] - seen[:1]).flatten(1).norm(dim=1).mean()),
    }


def share(x: Tensor, mask: Tensor) -> float:
    """Of |x - x[0]| within the mask, over all of x[1:]."""
    gap = (x[1:] - x[:1]).abs()
    return float((gap * mask).sum() / gap.sum())


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    seeds: tuple[int, ...] = tuple(range(5))
    """of rollouts, states and noise"""
    out: Path = Path("runs/results/interventions/hspace.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), run_cell, lambda row: "done")
        every.fill(jobs(self.seeds))
        return 0


BOXED = ("t", "directions", "share of Δx̂_0", "share of Δx_0", "length of Δx̂_0", "seeds")


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    return (
        f"# Directions of h-space\n\nThe MNIST model, `mnist(num_steps={T})`; what is measured is in the head of "
        "`experiments/interventions/hspace.py`. Means over seeds with Student's 95 % intervals; each seed has "
        "rollouts, directions and states of its own.\n\n"
        "## What a direction changes\n\n"
        f"Slopes: standard deviations of an attribute for one of h along the direction, between ±{ALPHA:g}. Leak: "
        "|slope| of the other two attributes, added, over that of its own: the change of the others at equal change of "
        "its own. "
        f"`mid_block` is the bottleneck; `up_blocks.0`, the part after it, is what `{SHIPPED}` is of.\n\n"
        f"{markdown_table(effects(rows), ('part', 'direction', *ATTRIBUTES, 'digit changes', 'leak', 'seeds'))}\n\n"
        f"{drops(rows)}\n\n"
        "## Diversity at equal NFE\n\n"
        "Root mean square difference of pixels between siblings, and its share of that of isotropic noise, paired by "
        f"seed.\n\n{markdown_table(distances(rows), ('t', 'children by', 'distance', 'of noise', 'NFE', 'seeds'))}\n\n"
        "## Within a box\n\n"
        f"The share of |Δ| that lies in the box, which has {AREA:.2f} of the area. x̂_0 is that of the step that the "
        "directions were found at, samples are "
        f"those at its end.\n\n{markdown_table(shares(rows), BOXED)}\n"
    )


def effects(rows: Sequence[Row]) -> list[list[str]]:
    """A line a direction."""
    lines = []
    for part in PARTS:
        for arm in ("mixed", "apart"):
            of = select(rows, kind="effect", of=part, arm=arm)
            for i, name in enumerate(ATTRIBUTES):
                slopes = [interval([row["slopes"][i][j] for row in of]) for j in range(len(ATTRIBUTES))]
                changed = interval([row["changed"][i] for row in of])
                leak = interval([leaked(row, i) for row in of])
                lines.append([f"`{part}`", f"{name}, {arm}", *slopes, changed, leak, str(len(of))])
    return lines


def leaked(row: Row, i: int) -> float:
    """Change of the other attributes at equal change of the direction's own."""
    slopes = row["slopes"][i]
    return sum(abs(s) for j, s in enumerate(slopes) if j != i) / abs(slopes[i])


def drops(rows: Sequence[Row]) -> str:
    """By what factor disentangling makes the leak smaller."""
    said = []
    for part in PARTS:
        mixed, apart = (select(rows, kind="effect", of=part, arm=arm) for arm in ("mixed", "apart"))
        both = list(zip(mixed, apart, strict=True))
        each = [f"{n} {interval([leaked(b, i) / leaked(a, i) for a, b in both])}" for i, n in enumerate(ATTRIBUTES)]
        each.append(f"of all three together {interval([leaked_in_all(b) / leaked_in_all(a) for a, b in both])}")
        said.append(f"Leak apart over leak mixed, `{part}`: {', '.join(each)}.")
    return "\n\n".join(said)


def leaked_in_all(row: Row) -> float:
    """Change of other attributes over that of directions' own, each added over directions."""
    slopes = torch.tensor(row["slopes"], dtype=torch.float64).abs()
    return float((slopes.sum() - slopes.trace()) / slopes.trace())


def distances(rows: Sequence[Row]) -> list[list[str]]:
    """A line a way to branch."""
    lines = []
    for t in LEVELS:
        base = {row["seed"]: row["distance"] for row in select(rows, kind="diversity", t=t, arm="noise")}
        for arm in WAYS:
            of = select(rows, kind="diversity", t=t, arm=arm)
            over = interval([row["distance"] / base[row["seed"]] for row in of])
            lines.append(
                [str(t), arm, interval([row["distance"] for row in of]), over, str(of[0]["nfe"]), str(len(of))]
            )
    return lines


def shares(rows: Sequence[Row]) -> list[list[str]]:
    """A line a way to find directions."""
    lines = []
    for t in LEVELS:
        for arm in MASKS:
            of = select(rows, kind="mask", t=t, arm=arm)
            texts = [interval([row[name] for row in of]) for name in ("share", "share of samples", "moved")]
            lines.append([str(t), arm, *texts, str(len(of))])
    return lines


def select(rows: Sequence[Row], **known: Any) -> list[Row]:
    """Rows with these fields, by seed."""
    return sorted((row for row in rows if all(row[k] == v for k, v in known.items())), key=lambda row: row["seed"])


def interval(values: Sequence[float]) -> str:
    """Mean and Student's 95 % bounds."""
    return "{:.3g} ({:.3g} to {:.3g})".format(*over_seeds(values))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("hspace", {"run": Run, "report": reporting("interventions/hspace", KEY, report)}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
