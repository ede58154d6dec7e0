"""Search over edits, beside each paper's single shot: what more evaluations buy where an edit has a score.

    python -m experiments.pie_mini.search run
    python -m experiments.pie_mini.search report

    r = score of the edit - 200 (mean squared change of the background)

the score that of `experiments.pie_mini.scorer`, a classifier; edits are judged by a program that no search sees. T = 25
at w = 7.5, with the noise of η = 1 below the root:

    pinned      from x_8 on the inverted path of the picture; what is outside the mask is held on the path, bitwise
                (`Clamp`): siblings differ inside the mask alone
    free        the same, and nothing is held: no mask but in the reward
    noised      from x_12, the picture under fresh noise: image-to-image, nothing is held; no inversion

Methods and single shots are those of this library and of the table (`experiments.pie_mini.table`); an evaluation is two
rows of the network, as everywhere under guidance, and those of the inversion are added to the budget of a search. Each
seed has pairs of its own, one of each kind, which are the tasks of one search.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.pie_mini import pictures, table
from experiments.pie_mini.bed import SCALE, Bed, rooted
from experiments.pie_mini.painter import WEIGHTS
from experiments.pie_mini.scorer import edit_score
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import bootstrap, mean_se
from experiments.shared.sweep import FAILURES, Sweep, command_line
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.report.tables import markdown_table
from treesearch.rewards import background
from treesearch.rewards.base import Reward
from treesearch.runs.files import write_text

T, WEIGHT = 25, 200.0
KEY = ("arm", "method", "budget", "seed")
METHODS = {
    "BestOfN": ts.BestOfN(),
    "TreeSearch": ts.TreeSearch(wave=2),
    "DTS*": ts.DiffusionTreeSearch(widening_c=1.0, widening_alpha=0.5, wave=2),
    "FK": ts.FeynmanKac(lam=20.0),
}
ARMS = {"pinned": 8, "free": 8, "noised": 12}  # the level of the root
INVERTED = {"pinned": T / 2, "free": T / 2, "noised": 0.0}  # guided evaluations that the path costs
BUDGETS = (40, 160)
DRAW = "one draw"
SHOTS = ("noise .5", "ddim", "npi", "null", "direct + p2p", "direct + kv", "ddim + mask")
SINGLE = "single shot"
TICKS = (10, 20, 50, 100, 200, 300)


def pairs_of(seed: int) -> list[pictures.Pair]:
    """One pair of each kind, whose targets differ; none of the table's."""
    found = pictures.pairs(len(pictures.KINDS), 200 + seed)
    if len({pair.prompts[1] for pair in found}) < len(found):
        raise ValueError(f"two pairs of seed {seed} have one target prompt: choose another seed")
    return found


def reward_of(pairs: Sequence[pictures.Pair]) -> Reward:
    """r of edits of these pairs, which are told apart by their target prompts."""
    score = edit_score()
    changed = {pair.prompts[1]: background(pair.picture, ~pair.mask) for pair in pairs}

    def fn(images: Any, prompts: Sequence[Any] | None) -> Tensor:
        told = list(prompts or ())
        kept = torch.cat([changed[prompt](images[i : i + 1]) for i, prompt in enumerate(told)])
        return score(images, told) + WEIGHT * kept

    return Reward(fn, "edit score and background")


@cache
def kernel_of(arm: str, seed: int, weights: Path) -> tuple[Bed, Any]:
    """The pairs of a seed and the chain of an arm."""
    bed = Bed(pairs=pairs_of(seed), num_steps=T, eta=1.0, weights=weights)
    inside: Any = bed.guided
    if arm == "pinned":
        inside = Clamp(inside, ~bed.masks[:, None].expand_as(bed.x0), bed.path)
    if arm == "noised":
        return bed, rooted(inside, bed.x0[None], ARMS[arm] / T, noised=True)
    return bed, rooted(inside, bed.path, ARMS[arm] / T)


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    arm: str
    method: str
    budget: int
    seed: int


def cell(job: Job, weights: Path = WEIGHTS) -> Row:
    """A search over the pairs of a seed, or single shots of them."""
    began = time.monotonic()
    try:
        bed, images, nfe = shots(job, weights) if job.arm == SINGLE else searched(job, weights)
    except FAILURES as error:
        return job.row | {"error": f"{type(error).__name__}: {error}"} | where_it_ran()
    seconds = time.monotonic() - began
    reward = reward_of(bed.pairs)(images, list(bed.targets)).tolist()
    truth = torch.stack([pair.truth for pair in bed.pairs])
    inside = (((images - truth) ** 2).mean(1) * bed.masks).sum((1, 2)) / bed.masks.sum((1, 2))
    found = {"kind": [pair.kind for pair in bed.pairs], "reward": reward, "inside": inside.sqrt().tolist()}
    return job.row | {"nfe": nfe, "seconds": seconds} | found | bed.figures(images) | where_it_ran()


def searched(job: Job, weights: Path) -> tuple[Bed, Tensor, float]:
    """The pairs, their best edits (n, 3, 16, 16), and evaluations a pair without those of the inversion."""
    bed, kernel = kernel_of(job.arm, job.seed, weights)
    found = ts.search(
        kernel,
        reward_of(bed.pairs),
        METHODS.get(job.method, ts.BestOfN()),
        prompts=list(bed.targets),
        budget=ts.Budget(nfe=job.budget * len(bed.pairs)),
        seed=job.seed,
        batch_size=32,
        progress=False,
    )
    best = [task.samples[int(task.rewards.argmax())] for task in found.tasks]
    return bed, torch.stack(best).float(), found.cost.nfe / len(bed.pairs)


def shots(job: Job, weights: Path) -> tuple[Bed, Tensor, float]:
    """The same of a single shot of the table, those of its inversion included."""
    bed = Bed(pairs=pairs_of(job.seed), num_steps=T, weights=weights)
    images = torch.empty_like(bed.x0)
    rows = 0.0
    for how, kinds in table.HOWS.items():
        at = [i for i, pair in enumerate(bed.pairs) if pair.kind in kinds]
        part = Bed(pairs=[bed.pairs[i] for i in at], num_steps=T, weights=weights)
        images[at], _, counts, _ = table.edited(part, {}, table.Job(job.method, how, job.seed))
        rows += counts["rows"]
    return bed, images, rows / 2 / len(bed.pairs)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    seeds: int = 5
    """how many"""
    budgets: tuple[int, ...] = BUDGETS
    """evaluations a picture, without the inversion"""
    shots: tuple[str, ...] = SHOTS
    """single shots"""
    out: Path = Path("runs/results/pie_mini/search.jsonl")
    """one row a cell"""

    def run(self) -> int:
        torch.set_num_threads(1)
        every: Sweep[Job] = Sweep(Cells(self.out, KEY), cell, words)
        for seed in range(self.seeds):
            every.fill(Job(SINGLE, shot, 0, seed) for shot in self.shots)
            every.fill(Job(arm, DRAW, level, seed) for arm, level in ARMS.items())
            every.fill(Job(arm, m, b, seed) for b in self.budgets for arm in ARMS for m in METHODS)
        return 0


def words(row: Row) -> str:
    """What is printed of a cell."""
    return f"reward {np.mean(row['reward']):.3f}, target rate {np.mean(row['right']):.2f}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page of the rows, and its figure."""

    rows: Path = Path("runs/results/pie_mini/search.jsonl")
    """what `run` wrote"""
    out: Path = Path("runs/results/pie_mini/search.md")
    """the page"""
    figure: Path | None = Path("runs/results/pie_mini/search.png")
    """reward against evaluations"""

    def run(self) -> int:
        rows = Cells(self.rows, KEY).rows
        write_text(self.out, report(rows))
        if self.figure is not None:
            draw(rows, self.figure)
        print(self.out)
        return 0


COLUMNS = ("arm", "method", "evaluations", "reward", "target, %", "background PSNR, dB", "inside, rms", "seeds")


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ValueError("there are no rows: run the experiment first")
    groups = grouped(done)
    lines = [line(name, found) for name, found in groups.items()]
    return (
        f"# Search over edits\n\nT = {T}, w = {SCALE}, reward = edit score - {WEIGHT:g} × (change of "
        "the background); what the rows are is in the head of `experiments/pie_mini/search.py`. Six pairs a seed, one "
        "of each kind, means over pairs and seeds with 95 % intervals over pairs (percentile bootstrap). Evaluations "
        f"are those of guided steps a picture; a search from a path has {T / 2:g} more for the inversion, which single "
        "shots have in theirs. Inside: between the edit and the picture that it asks for, within the mask.\n\n"
        f"{markdown_table(lines, COLUMNS)}\n\n![reward against evaluations](search.png)\n\n## Searches beside single "
        f"shots\n\n{duels(groups)}\n"
    )


Group = tuple[str, str, int]


def grouped(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Rows by arm, method and budget, single shots first."""
    names = [(SINGLE, shot, 0) for shot in table.METHODS]
    names += [(arm, m, b) for arm in ARMS for b in sorted({r["budget"] for r in rows} - {0}) for m in (DRAW, *METHODS)]
    found = {name: [r for r in rows if (r["arm"], r["method"], r["budget"]) == name] for name in names}
    return {name: sorted(each, key=lambda r: r["seed"]) for name, each in found.items() if each}


def line(name: Group, rows: Sequence[Row]) -> list[str]:
    def told(field: str, scale: float, digits: int) -> str:
        values = [v for row in rows for v in row[field] if v is not None]
        if not values:
            return "∞"
        mean, low, high = bootstrap(np.array([values], float))
        return f"{mean * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"

    nfe = float(np.mean([row["nfe"] for row in rows]))
    figures = (told("reward", 1, 2), told("right", 100, 0), told("psnr", 1, 1), told("inside", 1, 3))
    return [name[0], name[1], f"{nfe:,.0f}", *figures, str(len(rows))]


def duels(groups: dict[Group, list[Row]]) -> str:
    """Each single shot beside the best search that costs no more, or the cheapest there is."""
    lines = []
    for name, rows in groups.items():
        if name[0] != SINGLE:
            continue
        nfe = float(np.mean([row["nfe"] for row in rows]))
        for arm in ARMS:
            costs = {
                g: float(np.mean([r["nfe"] for r in each])) + INVERTED[arm] for g, each in groups.items() if g[0] == arm
            }
            within = [g for g, cost in costs.items() if cost <= 1.1 * nfe] or [
                g for g, cost in costs.items() if cost == min(costs.values())
            ]
            if not within:
                continue
            best = max(within, key=lambda g: float(np.mean([r["reward"] for r in groups[g]])))
            seeds = {r["seed"] for r in rows} & {r["seed"] for r in groups[best]}
            gain, rate = (
                np.concatenate([np.array(by(groups[best], s, f)) - np.array(by(rows, s, f)) for s in sorted(seeds)])
                for f in ("reward", "right")
            )
            decibels = background_gain(groups[best], rows, sorted(seeds))
            (r, low, high), (p, p_low, p_high) = (bootstrap(each[None].astype(float)) for each in (gain, rate))
            lines.append([
                f"{name[1]}, {nfe:,.0f}",
                f"{arm}, {best[1]}, {costs[best]:,.0f}",
                f"{r:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{100 * p:+.0f} ({100 * p_low:+.0f} to {100 * p_high:+.0f})",
                decibels,
            ])  # fmt: skip
    said = (
        "The search of each arm with the best mean reward among those that cost no more than the shot (a tenth is "
        "allowed, the inversion counted), or the cheapest; differences are paired by picture."
    )
    columns = ("single shot, evaluations", "search, evaluations", "difference of the reward", "of the target rate, %",
               "of the background PSNR, dB")  # fmt: skip
    return f"{said}\n\n{markdown_table(lines, columns)}"


def background_gain(one: Sequence[Row], other: Sequence[Row], seeds: Sequence[int]) -> str:
    """Decibels of one less those of the other, by picture; infinite where a background is held."""
    pairs = [(a, b) for s in seeds for a, b in zip(by(one, s, "psnr"), by(other, s, "psnr"), strict=True)]
    if any(a is None or b is None for a, b in pairs):
        return "∞" if all(b is not None for _, b in pairs) else "-∞" if all(a is not None for a, _ in pairs) else "-"
    mean, low, high = bootstrap(np.array([[a - b for a, b in pairs]], float))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def by(rows: Sequence[Row], seed: int, field: str) -> list[float]:
    """A figure of the pairs of a seed."""
    return next(row[field] for row in rows if row["seed"] == seed)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Reward against evaluations: a line a method, a panel an arm, a mark a single shot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped([row for row in rows if "error" not in row])
    figure, panels = plt.subplots(1, len(ARMS), figsize=(12, 3.6), sharey=True)
    for panel, arm in zip(panels, ARMS, strict=True):
        for method in METHODS:
            points = [point(each) for (a, m, _), each in groups.items() if a == arm and m in (DRAW, method)]
            if points:
                x, y, error = zip(*points, strict=True)
                panel.errorbar(
                    [v + INVERTED[arm] for v in x], y, error, marker="o", ms=3, lw=1.2, capsize=2, label=method
                )
        for i, (name, each) in enumerate((n, e) for n, e in groups.items() if n[0] == SINGLE):
            x, y, _ = point(each)
            panel.plot([x], [y], marker="xv^s*PD"[i % 7], ls="", color="grey", ms=6, label=name[1])
        panel.set(title=arm, xlabel="guided evaluations a picture, inversion included", xscale="log")
        panel.set_xticks(TICKS, [str(tick) for tick in TICKS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("reward, mean ± s.e. over seeds")
    panels[-1].legend(fontsize=6, ncols=2, loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def point(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Evaluations, mean reward and its standard error over seeds."""
    mean, error = mean_se([float(np.mean(row["reward"])) for row in rows])
    return float(np.mean([row["nfe"] for row in rows])), mean, 0.0 if np.isnan(error) else error


if __name__ == "__main__":
    sys.exit(command_line("search", {"run": Run, "report": Report}, None, __doc__))
