"""The picture of the front page, from the run folders of `make demo`.

    make demo
    python -m experiments.shared.front_page

Left: the best reward of each method against NFE, with best-of-N's final best as a line and where each method reached
it. Right: the eight best samples of TreeSearch and of best-of-N.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from treesearch.cli.show import read_result_of
from treesearch.report import plots
from treesearch.results.result import SearchResult

SHOWN = {"tree_search": "TreeSearch", "best_of_n": "best-of-N"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where from, where to."""

    demo: Path = Path("runs/demo")
    """what `make demo` wrote"""
    out: Path = Path("runs/demo/demo.png")
    """the picture; docs/demo/demo.png is the committed one"""
    title: str = "heavy eights: log p(8 | x) − 200 |brightness − 0.2|"
    """of the curves"""


def main(args: Args) -> Path:
    """Draw; returns the picture."""
    runs = {path.parent.name: read_result_of(path.parent)[1] for path in sorted(args.demo.glob("*/run.json"))}
    plt = plots.pyplot()
    figure = plt.figure(figsize=(12.5, 4.2), layout="constrained")
    left, *right = figure.subfigures(1, 1 + len(SHOWN), width_ratios=[2.0, *[1.0] * len(SHOWN)])
    _curves(left.subplots(), runs, args.title)
    for part, (name, label) in zip(right, SHOWN.items(), strict=True):
        _samples(part, args.demo / name / "outputs" / "best", f"{label}: the best eight", runs[name])
    return plots.save(plt, figure, args.out)


def _curves(axes: Any, runs: dict[str, SearchResult], title: str) -> None:
    """A step curve a method, the line that best-of-N ends at, and a dot where a method first reaches it."""
    base = max(plots.curve(runs["best_of_n"].history).best)
    axes.axhline(base, color="0.6", linewidth=0.9, linestyle="--")
    for name, result in runs.items():
        line = plots.curve(result.history)
        reached = next((nfe for nfe, best in zip(line.nfe, line.best, strict=True) if best >= base), None)
        times = (
            "" if reached is None or name == "best_of_n" else f", {runs['best_of_n'].cost.nfe / reached:.1f} x fewer"
        )
        (drawn,) = axes.plot(line.nfe, line.best, label=name + times, linewidth=1.7, drawstyle="steps-post")
        if reached is not None:
            axes.plot(reached, line.best[line.nfe.index(reached)], "o", color=drawn.get_color(), markersize=6)
    early = runs["best_of_n"].cost.nfe / 20  # what comes before would leave no room for the rest
    shown = [best for r in runs.values() for nfe, best in zip(*plots.curve(r.history), strict=True) if nfe >= early]
    room = 0.05 * (max(shown) - min(shown))
    axes.set(title=title, xlabel="network evaluations (NFE)", ylabel="best reward")
    axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="NFE to reach best-of-N's final best")


def _samples(part: Any, folder: Path, title: str, result: SearchResult) -> None:
    """Two columns of samples with their rewards, best first."""
    files = sorted(folder.glob("task0_*.png"))[:8]
    part.suptitle(title, fontsize=11)
    rewards = sorted(result.rewards.tolist(), reverse=True)
    for axes, file, reward in zip(part.subplots(4, 2).flat, files, rewards, strict=False):
        with Image.open(file) as image:
            axes.imshow(image.convert("L"), cmap="gray")
        axes.set_title(f"{reward:.2f}", fontsize=8)
        axes.set_axis_off()


def run(argv: Sequence[str] | None = None) -> int:
    """Draw and say where."""
    print(main(tyro.cli(Args, args=argv, description=__doc__)))
    return 0


if __name__ == "__main__":
    sys.exit(run())
