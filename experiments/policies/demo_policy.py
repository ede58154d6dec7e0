"""make demo-policy: a frozen policy in a maze whose usual way is closed: base, best-of-N, DSRL, search with its critic.

    python -m experiments.policies.demo_policy

The policy learnt from demonstrations that went round on the left three times in four; today a door closes that way.
DSRL learns which noise to give it, from episodes of the maze; the policy itself stays as it is.

    table.md      success, discounted return and NFE of a decision
    routes.png    where each method went, and what DSRL earned while it learnt
    learner/      the learner, which a second run goes on with
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import treesearch as ts
from experiments.policies.compare import METHODS, T
from experiments.policies.episodes import Episodes, play
from experiments.policies.learning import learner
from experiments.policies.two_routes import CLOSED, GOAL, START
from treesearch.policies.dsrl import DSRL
from treesearch.report.tables import markdown_table
from treesearch.rewards.trajectories.trajectory import RADIUS

SHOWN = {
    "base": ("base policy", 1),
    "best_of_n": ("best of N by Q", 8),
    "dsrl": ("DSRL", 1),
    "screened": ("best of N noises by DSRL's Q", 8),
    "fk_law": ("FK for DSRL's Q, from its noise", 8),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the demo."""

    steps: int = 800
    """chunks that DSRL learns from, a multiple of 100"""
    episodes: int = 48
    """of each method"""
    seed: int = 0
    out: Path = Path("runs/demo-policy")
    """folder of what comes out"""


def learnt(args: Args) -> DSRL:
    """The learner, with a line for every segment."""
    made = learner("na", args.seed)
    if args.steps % made.settings.every or args.steps < 1:
        raise ValueError(f"steps is {args.steps}, expected a multiple of every = {made.settings.every}")
    print(f"learning noise for a frozen policy: {args.steps} chunks, the first {made.settings.warmup} to look round")
    before = made.frozen.weights
    made.learn(made.settings.every, store=args.out / "learner")  # an earlier run may have come further
    for at in range(max(made.steps, made.settings.every), args.steps + 1, made.settings.every):
        made.learn(at, store=args.out / "learner")
        last = [value for _, value in made.episodes[-10:]] or [0.0]
        print(f"  {at:5} chunks, {len(made.episodes):3} episodes: the last ten earn {np.mean(last):.2f}", flush=True)
    print(f"weights of the policy {'unchanged' if made.frozen.weights == before else 'CHANGED'}")
    return made


def compare(dsrl: DSRL, args: Args) -> dict[str, Episodes]:
    """Episodes of every method, the same starts for all."""
    found = {}
    for name, (label, rollouts) in SHOWN.items():
        found[name] = play(METHODS[name](dsrl, rollouts, args.seed), args.episodes, 9_000 + args.seed)
        print(
            f"  {label:32} {100 * found[name].success.mean():4.0f} % arrive, {T * rollouts} NFE a decision", flush=True
        )
    return found


def table(found: dict[str, Episodes]) -> str:
    """Success and return."""
    body = [
        [label, str(T * n), f"{100 * found[name].success.mean():.0f} %", f"{found[name].returns.mean():.2f}"]
        for name, (label, n) in SHOWN.items()
    ]
    return markdown_table(body, ("method", "NFE a decision", "success", "discounted return"))


def draw(dsrl: DSRL, found: dict[str, Episodes], path: Path) -> None:
    """Paths over the maze, a panel a method, and the returns of learning."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.2), layout="constrained")
    for ax, (name, (label, n)) in zip(axes.flat, SHOWN.items(), strict=False):
        draw_maze(ax)
        for way, hit in zip(found[name].paths, found[name].success, strict=True):
            ax.plot(*way.T.numpy(), color="tab:green" if hit else "tab:red", linewidth=0.8, alpha=0.5)
        ax.set_title(f"{label}: {100 * found[name].success.mean():.0f} %, {T * n} NFE", fontsize=10)
    last = axes.flat[len(SHOWN)]
    steps, values = np.array(dsrl.episodes or [(0, 0.0)]).T
    width = min(10, len(values))
    mean = np.convolve(values, np.ones(width) / width, "valid")
    last.plot(steps[width - 1 :], mean, color="tab:blue")
    last.axvline(dsrl.settings.warmup, color="0.6", linestyle="--", linewidth=1)
    last.set_xlabel("chunks made (dashed: learning begins)")
    last.set_title("DSRL: return of ten episodes", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_maze(ax: Any) -> None:
    """Walls, the closed door, start, goal and how near it a walk ends."""
    from matplotlib.patches import Circle

    walls = np.array(CLOSED.walls)
    rows, cols = walls.shape
    extent = (-cols / 2, cols / 2, -rows / 2, rows / 2)
    ax.imshow(walls, cmap="Greys", vmin=0, vmax=2.2, extent=extent, zorder=0)
    ax.text(-1.0, 0.0, "closed", ha="center", va="center", fontsize=8, color="tab:red")
    ax.plot(*START, "o", color="black", markersize=6, zorder=5)
    ax.plot(*GOAL, "*", color="crimson", markersize=13, markeredgecolor="white", zorder=5)
    ax.add_patch(Circle(GOAL, RADIUS, fill=False, linestyle="--", linewidth=0.8, edgecolor="crimson"))
    ax.axis("off")


def main(argv: Sequence[str] | None = None) -> int:
    """Learn, compare, print, draw; the exit code."""
    import tyro

    args = tyro.cli(Args, args=argv, description=__doc__)
    began = time.perf_counter()
    try:
        torch.set_num_threads(1)
        args.out.mkdir(parents=True, exist_ok=True)
        dsrl = learnt(args)
        found = compare(dsrl, args)
        text = table(found)
        (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
        draw(dsrl, found, args.out / "routes.png")
    except (ts.TreeSearchError, ValueError, OSError, ImportError) as error:
        print(f"demo_policy: {error}", file=sys.stderr)
        return 1
    print(f"\n{text}\n\nwrote {args.out / 'routes.png'}\n{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
