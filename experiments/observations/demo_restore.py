"""make demo-restore: test digits out of observations, by published rules and by search, with the evidence of each.

    python -m experiments.observations.demo_restore

Four inverse problems of `experiments.observations.tasks` on the shipped MNIST model, without data or training. Each is
solved by Steered, FlowChef and DPS as published, and by FK and TreeSampling on `Steered` with its weights.

    restore.png     truth, observation, draws, posterior mean and spread
    table.md        PSNR of the mean, misfit, ESS, surviving draws of x_T, log p(y) and its interval where ten
                    draws of x_T or more carry it
    summary.json    the same, and the settings
    draws.npz       what the picture shows
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import treesearch as ts
from experiments.observations.picture import draw
from experiments.observations.samplers import SAMPLERS, Bed, bed
from experiments.observations.tasks import TASKS, Task, digits, misfit, observe, psnr, seen_picture, weighted
from treesearch.report.tables import DASH, markdown_table
from treesearch.rewards import Reward

SHOWN = ("steered", "flowchef", "dps", "fk correlated", "trees correlated")
DIGITS = {"inpainting": 3, "super-resolution": 5, "de-blurring": 8, "projection": 2}
LEGEND = (
    "PSNR: of the mean of the draws, which it prefers to any draw. Misfit: root mean square of (y - A x)/tolerance, 1 "
    "for the truth. Roots: draws of x_T that carry weight; log p(y) has an interval from ten on. Published rules draw "
    "from a law of their own, searches from p(x | y) as far as their ESS goes."
)
COLUMNS = ("task", "sampler", "draws", "NFE", "PSNR of the mean", "misfit", "ESS", "roots", "log p(y)", "seconds")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the demo."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """which problems"""
    digit: int | None = None
    """class of the test digit of every problem; None for one each"""
    tolerance: float = 0.3
    """standard deviation of the noise; pixels are in -1..1"""
    num_steps: int = 10
    """T"""
    particles: int = 384
    """samples of a search"""
    published: int = 48
    """samples of a published sampler"""
    seed: int = 0
    """of noise and search"""
    threads: int | None = None
    """of the model; None for torch's own"""
    out: Path = Path("runs/demo-restore")
    """folder of the results"""


@dataclass(frozen=True)
class Shown:
    """What a sampler made of a problem.

    Args:
        row: figures.
        draws: images (n, 28, 28) in [0, 1].
        mean, spread: of the posterior by pixel, (28, 28).
    """

    row: dict[str, Any]
    draws: Tensor
    mean: Tensor
    spread: Tensor


def solve(of: Bed, task: Task, name: str, y: Reward, truth: Tensor, args: Args) -> Shown:
    """Search, and look at what came out."""
    sampler, began = SAMPLERS[name], time.perf_counter()
    n = args.particles if sampler.exact else args.published
    budget = ts.Budget(nfe=n * of.num_steps)
    result = ts.search(sampler.kernel(of, task, y), y, sampler.method(of, n), budget=budget, seed=args.seed)
    found, rows = result.tasks[0], result.tasks[0].draw_rows(8, args.seed) if sampler.exact else np.arange(min(n, 8))
    images, weights = weighted(found, exact=sampler.exact)
    mean = (weights[:, None, None, None] * images).sum(0)
    spread = (weights[:, None, None, None] * (images - mean) ** 2).sum(0).sqrt()
    row = {
        "sampler": sampler.title,
        "samples": len(images),
        "nfe": result.cost.nfe,
        "backward_nfe": result.cost.backward_nfe,
        "psnr": psnr(mean, (truth + 1) / 2),
        "misfit": misfit(images, weights, y),
        "seconds": time.perf_counter() - began,
    }
    return Shown(row | (evidence(found) if sampler.exact else {}), images[rows][:, 0], mean[0], spread[0])


def evidence(found: Any) -> dict[str, Any]:
    """What only weights can say."""
    told = found.certificate()
    z = told.log_z
    interval = {"low": z.low, "high": z.high, "standing": str(z.standing), "reason": z.reason}
    return {"ess": told.ess, "roots": told.lineages, "log_evidence": z.value, "interval": interval}


def line(task: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    shown = [
        task,
        row["sampler"],
        f"{row['samples']}",
        f"{row['nfe']:,}",
        f"{row['psnr']:.1f} dB",
        f"{row['misfit']:.2f}",
    ]
    if "ess" not in row:
        return [*shown, DASH, DASH, "no weights", f"{row['seconds']:.0f}"]
    return [*shown, f"{row['ess']:.1f}", str(row["roots"]), said(row), f"{row['seconds']:.0f}"]


def said(row: dict[str, Any]) -> str:
    """log p(y), and its interval where there is one."""
    of = row["interval"]
    stated = "no interval" if of["low"] is None else f"{of['low']:.1f} to {of['high']:.1f}, {of['standing']}"
    return f"{row['log_evidence']:.1f} ({stated})"


def main(args: Args) -> None:
    """Observe, search, print, draw."""
    began = time.perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    of, body, rows, pictures, kept = bed(args.num_steps), [], [], [], {}
    for i, name in enumerate(args.tasks):
        task = TASKS[name]
        truth = digits()[DIGITS[name] if args.digit is None else args.digit]
        y = observe(truth, task.make(), args.tolerance, args.seed)
        found = {}
        for each in SHOWN:
            found[each] = solve(of, task, each, y, truth, args)
            row = {"task": name} | found[each].row
            rows.append(row)
            body.append(line(name, row))
            told = "" if "ess" not in row else f", ESS {row['ess']:.1f}, log p(y) {said(row)}"
            print(
                f"{i + 1}/{len(args.tasks)} {name:17}{row['sampler']:37} PSNR {row['psnr']:5.1f} dB{told}", flush=True
            )
        pictures.append((task.title, truth[0], seen_picture(y)[0], found))
        for each, shown in found.items():
            kept |= {f"{name}/{each}/{what}": getattr(shown, what).numpy() for what in ("draws", "mean", "spread")}
        kept |= {f"{name}/truth": truth[0].numpy(), f"{name}/observed": seen_picture(y)[0].numpy()}
    write(args, body, rows, kept)
    draw(pictures, {each: SAMPLERS[each] for each in SHOWN}, args.out / "restore.png")
    print(f"\n{markdown_table(body, COLUMNS)}\n\n{LEGEND}\n")
    print(f"wrote {args.out / 'restore.png'}; {time.perf_counter() - began:.0f} s")


def write(args: Args, body: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]], kept: dict[str, Any]) -> None:
    """The files beside the picture."""
    (args.out / "table.md").write_text(markdown_table([list(each) for each in body], COLUMNS) + "\n", "utf-8")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    text = json.dumps({"settings": settings, "rows": rows}, indent=1)
    (args.out / "summary.json").write_text(text + "\n", "utf-8")
    np.savez_compressed(args.out / "draws.npz", **kept)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ts.TreeSearchError, ValueError, OSError, ImportError) as error:
        print(f"demo_restore: {error}", file=sys.stderr)
        sys.exit(1)
