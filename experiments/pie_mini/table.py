"""The table: every inversion, alone and with attention control, on the pairs of PIE-mini.

    python -m experiments.pie_mini.table run
    python -m experiments.pie_mini.table report

    ddim, npi, null    DDIM inversion at w = 1, then w = 7.5: as it is, with ∅ the source prompt, with ∅ learnt by level
    direct             the same with the path itself as the source branch
    bdia, bdia 1, .5   the solver whose steps can be undone, γ = 0.96: undone under the source prompt at w = 7.5, as the
                       edit runs, or at w = 1; the last at w = 1 with γ = 0.5 in float64, which damps more
    noise .25 .5 .75   image-to-image: the picture under fresh noise, the last quarter, half, three quarters of T
    + p2p              maps of attention of the source branch by Prompt-to-Prompt, "replace", or "refine" where an
                       object is added or deleted; in .4 of the steps, .6 for self-attention, as in the benchmark
    + kv               keys and values of self-attention of the source branch
    + mask             what is outside the mask is held on the path: told where the edit is, which no other row is

Without control an edit never looks at its source branch, and `direct` is `ddim` to the bit: it has rows with control
alone. The source branch of the others is their own walk back from x_T at w = 7.5. Its rows are counted once, as in the
papers: N + 2N(1 + 1) where a control looks at it to the end. A cell is a batch of pairs of one seed, of some kinds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.pie_mini import pictures
from experiments.pie_mini.bed import SCALE, Bed, rooted, told, walked
from experiments.pie_mini.painter import WEIGHTS
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import bootstrap
from experiments.shared.sweep import FAILURES, Sweep, command_line
from treesearch.backends.roots.bdia import Bdia, inverted
from treesearch.backends.roots.direct import direct
from treesearch.backends.roots.negative_prompt import negative_prompt
from treesearch.backends.roots.null_text import null_text
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.report.tables import markdown_table
from treesearch.runs.files import write_text

KEY = ("method", "how", "seed")
HOWS = {"replace": ("shape", "light", "move", "colour"), "refine": ("add", "delete")}
BDIA = {"bdia": (False, 0.96), "bdia 1": (True, 0.96), "bdia .5": (True, 0.5)}  # whether w = 1, γ
Branch = tuple[Any, Tensor, Tensor]
"""A kernel, the path that it begins on, and its source branch, both (T + 1, n, 3, 16, 16)."""


def ddim(bed: Bed) -> Branch:
    return _walking(bed, bed.guided)


def npi(bed: Bed) -> Branch:
    return _walking(bed, negative_prompt(bed.guided, told(bed.guided, bed.sources)))


def null(bed: Bed) -> Branch:
    found = null_text(bed.guided, bed.path, cond=told(bed.guided, bed.sources))
    return found.kernel, bed.path, found.path


def direct_(bed: Bed) -> Branch:
    return bed.guided, bed.path, bed.path


def _walking(bed: Bed, kernel: Any) -> Branch:
    path = bed.path
    with bed.uncounted():
        return kernel, path, walked(kernel, path[-1], told(bed.guided, bed.sources))


INVERSIONS: dict[str, Callable[[Bed], Branch]] = {"ddim": ddim, "npi": npi, "null": null, "direct": direct_}
CONTROLS = ("", "p2p", "kv", "mask")
CROSS, OWN = 0.4, 0.6
SHARES = {"noise .25": 0.25, "noise .5": 0.5, "noise .75": 0.75}
METHODS = (
    *SHARES,
    *BDIA,
    *(f"{name}{c and ' + '}{c}" for c in CONTROLS for name in INVERSIONS if c in ("p2p", "kv") or name != "direct"),
)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    method: str
    how: str
    seed: int


@dataclass(frozen=True)
class Found:
    """An inversion, and what it cost."""

    branch: Branch
    counts: dict[str, float]
    seconds: float


@cache
def bed_of(n: int, how: str, seed: int, num_steps: int, weights: Path) -> tuple[Bed, dict[str, Found]]:
    """The pairs of a cell, and their inversions so far."""
    pairs = [pair for pair in pictures.pairs(n, seed) if pair.kind in HOWS[how]]
    return Bed(pairs=pairs, num_steps=num_steps, weights=weights), {}


def inversion(bed: Bed, known: dict[str, Found], name: str) -> Found:
    """An inversion, found once; its cost is that of every edit that begins there."""
    if name not in known:
        bed.counts.update(rows=0.0, backward=0.0)
        began = time.monotonic()
        vars(bed).pop("path", None)
        branch = INVERSIONS[name](bed)
        known[name] = Found(branch, dict(bed.counts), time.monotonic() - began)
    return known[name]


def edited(bed: Bed, known: dict[str, Found], job: Job) -> tuple[Tensor, Tensor, dict[str, float], float]:
    """Edited pictures (n, 3, 16, 16), what the source branch misses (n,), rows of the network, seconds."""
    if job.method in SHARES or job.method in BDIA:
        bed.counts.update(rows=0.0, backward=0.0)
        began = time.monotonic()
        images, missed = noised(bed, job) if job.method in SHARES else by_bdia(bed, *BDIA[job.method])
        return images, missed, dict(bed.counts), time.monotonic() - began
    name, _, control = job.method.partition(" + ")
    found = inversion(bed, known, name)
    kernel, path, branch = found.branch
    bed.counts.update(found.counts)
    began = time.monotonic()
    images = bed.shot(rooted(controlled(bed, kernel, path, branch, control, job.how), path))
    return images, rms(branch[0] - bed.x0), dict(bed.counts), found.seconds + time.monotonic() - began


def controlled(bed: Bed, kernel: Any, path: Tensor, branch: Tensor, control: str, how: str) -> Any:
    """A kernel whose rows are told of their pictures."""
    if control == "p2p":
        return direct(kernel, branch, bed.sources, control=how, cross=CROSS, own=OWN)  # type: ignore[arg-type]
    if control == "kv":
        return direct(kernel, branch, bed.sources, control="kv")
    if control == "mask":
        return Clamp(kernel, ~bed.masks[:, None].expand_as(bed.x0), path)
    return kernel


def noised(bed: Bed, job: Job) -> tuple[Tensor, Tensor]:
    root = rooted(bed.guided, bed.x0[None], SHARES[job.method], noised=True)
    return bed.shot(root, job.seed), torch.full((len(bed.pairs),), torch.nan)


def by_bdia(bed: Bed, plain: bool, gamma: float) -> tuple[Tensor, Tensor]:
    kernel, cond = Bdia(bed.guided, gamma=gamma, double=gamma < 0.9), told(bed.guided, bed.sources)
    within = Bdia(bed.plain, gamma=gamma, double=gamma < 0.9) if plain else kernel
    path = inverted(within, bed.x0, cond=told(bed.plain, bed.sources) if plain else cond)
    with bed.uncounted():
        back = path[-1]
        for t in range(bed.num_steps, 0, -1):
            back = kernel.transition(back, torch.full((len(back),), t), cond).mean
    return bed.shot(rooted(kernel, path)), rms(back[:, 0] - bed.x0)


def rms(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1).sqrt()


def cell(job: Job, n: int, num_steps: int, weights: Path) -> Row:
    """A batch of pairs."""
    bed, known = bed_of(n, job.how, job.seed, num_steps, weights)
    try:
        images, missed, counts, seconds = edited(bed, known, job)
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    cost = {name: count / len(bed.pairs) for name, count in counts.items()} | {"seconds": seconds / len(bed.pairs)}
    found = {"kind": [pair.kind for pair in bed.pairs], "missed": missed.tolist()} | bed.figures(images)
    return job.row | {"num_steps": num_steps, "scale": SCALE} | cost | found | where_it_ran()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    n: int = 18
    """pairs a seed"""
    seeds: int = 3
    """how many"""
    num_steps: int = 25
    """T"""
    methods: tuple[str, ...] = METHODS
    """which rows of the table"""
    weights: Path = WEIGHTS
    """of the painter"""
    out: Path = Path("runs/results/pie_mini/table.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        work = partial(cell, n=self.n, num_steps=self.num_steps, weights=self.weights)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY, {"n": self.n, "num_steps": self.num_steps}), work, words)
        every.fill(Job(m, how, seed) for seed in range(self.seeds) for how in HOWS for m in self.methods)
        return 0


def words(row: Row) -> str:
    """What is printed of a cell."""
    return f"target rate {np.mean(row['right']):.2f}, background {decibels(row['mse']):.1f} dB"


def decibels(mse: Any) -> float:
    """Of a mean squared error over pictures."""
    mean = float(np.mean(mse))
    return -10 * float(np.log10(mean)) if mean > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page of the rows."""

    rows: Path = Path("runs/results/pie_mini/table.jsonl")
    """what `run` wrote"""
    out: Path = Path("runs/results/pie_mini/table.md")
    """the page"""

    def run(self) -> int:
        write_text(self.out, report(Cells(self.rows, KEY).rows))
        print(self.out)
        return 0


COLUMNS = (
    *("method", "target, %", "background PSNR, dB", "SSIM", "structure distance, 10⁻³", "missed, rms"),
    *("network rows", "with backward", "seconds"),
)


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    of = {m: [row for row in done if row["method"] == m] for m in METHODS}
    lines = [line(m, found) for m, found in of.items() if found]
    pairs = max(len(values(found, "right")) for found in of.values())
    kinds = [
        [m, *(rate(found, kind) for kind in pictures.KINDS)] for m, found in of.items() if found
    ]  # fmt: skip
    seeds = len({row["seed"] for row in done})
    return (
        f"# PIE-mini\n\n{pairs} pairs of {seeds} seeds, T = {done[0]['num_steps']}, w = {done[0]['scale']}; what the "
        "rows are is in the head of `experiments/pie_mini/table.py`. Means with 95 % intervals over pairs (percentile "
        "bootstrap). The judge is a program; the structure distance is that of gradient orientations. Missed: between "
        "the source branch and the source, in units of states (-1 to 1). Network rows are those a picture, the "
        "inversion's too; seconds are of one core that others used as well.\n\n"
        f"{markdown_table(lines, COLUMNS)}\n\n## Target rate by kind, %, and background PSNR, dB\n\n"
        f"{markdown_table(kinds, ('method', *pictures.KINDS))}\n\n## Checks\n\n{checks(of)}\n"
    )


def values(rows: Sequence[Row], name: str, kind: str | None = None) -> list[Any]:
    """A figure of every pair."""
    pairs = [(k, v) for row in rows for k, v in zip(row["kind"], row[name], strict=True)]
    return [v for k, v in pairs if kind in (None, k)]


def line(method: str, rows: Sequence[Row]) -> list[str]:
    def told_of(name: str, scale: float, digits: int) -> str:
        found = [v for v in values(rows, name) if v is not None]
        if not found:
            return "∞" if name == "psnr" else "-"
        mean, low, high = bootstrap(np.array([found], float))
        return f"{mean * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"

    weights = [len(row["right"]) for row in rows]
    rows_of, backward, seconds = (
        float(np.average([row[name] for row in rows], weights=weights)) for name in ("rows", "backward", "seconds")
    )
    return [
        *(method, told_of("right", 100, 0), told_of("psnr", 1, 1), told_of("ssim", 1, 3)),
        *(
            told_of("structure", 1000, 1),
            told_of("missed", 1, 4),
            f"{rows_of:,.0f}",
            f"{backward:,.0f}",
            f"{seconds:.2f}",
        ),
    ]


def rate(rows: Sequence[Row], kind: str) -> str:
    right, psnr = values(rows, "right", kind), [v for v in values(rows, "psnr", kind) if v is not None]
    return f"{100 * np.mean(right):.0f}, {f'{np.mean(psnr):.1f}' if psnr else '∞'}" if right else "-"


def checks(of: dict[str, list[Row]]) -> str:
    """What was asked of the table, and what came out."""
    found = []
    missed = {m: float(np.mean(values(rows, "missed"))) for m, rows in of.items() if rows and m in INVERSIONS}
    if of.get("direct + p2p"):
        missed["direct"] = float(np.mean(values(of["direct + p2p"], "missed")))
    order = [missed[m] for m in ("ddim", "npi", "null", "direct") if m in missed]
    if len(order) == 4:
        holds = order[0] > 3 * order[1] and order[1] >= order[2] >= order[3] == 0
        text = " > ".join(f"{m} {missed[m]:.4f}" for m in ("ddim", "npi", "null", "direct"))
        found.append(
            f"- Misses of the source branch, asked: DDIM ≫ NPI ≥ null-text ≥ Direct = 0. {text}: {said(holds)}"
        )
    for control in ("p2p", "kv"):
        one, other = of.get(f"direct + {control}", []), of.get(f"ddim + {control}", [])
        if one and other:
            found.append(f"- {versus(one, other, control)}")
    return "\n".join(found)


def versus(one: Sequence[Row], other: Sequence[Row], control: str) -> str:
    """Direct beside DDIM under one control, paired."""
    gain = np.array(values(one, "psnr"), float) - np.array(values(other, "psnr"), float)
    rates = np.array(values(one, "right"), float) - np.array(values(other, "right"), float)
    (mean, low, high), (r, r_low, r_high) = (bootstrap(each[None]) for each in (gain, rates))
    equal = r_low <= 0 <= r_high or r > 0
    return (
        f"Background of direct + {control} less that of ddim + {control}, asked: 3 dB or more at equal target rate. "
        f"{mean:+.1f} dB ({low:+.1f} to {high:+.1f}), target rate {100 * r:+.0f} % ({100 * r_low:+.0f} to "
        f"{100 * r_high:+.0f}): {said(mean >= 3 and equal)}"
    )


def said(holds: bool) -> str:
    return "holds." if holds else "**does not hold.**"


if __name__ == "__main__":
    sys.exit(command_line("table", {"run": Run, "report": Report}, None, __doc__))
