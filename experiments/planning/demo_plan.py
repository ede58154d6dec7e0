"""make demo-plan: plans in a maze with the shipped model, a table, a picture of the tree of plans and an animation.

    python -m experiments.planning.demo_plan

Every method plans from start to goal for the same held-out pairs at the same NFE; the planned actions are made in the
environment, open loop. Settings are those that `experiments.planning.evidence` chose on its tuning pairs; pairs are
few here, and figures with intervals are that experiment's.

    table.md     success and NFE of a decision
    plans.png    one search over the maze: predicted plans at each branching level, then the samples
    tree.png     its nodes
    plan.gif     receding horizon, each decision warm-started from the last
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import treesearch as ts
from experiments.planning.episodes import play
from experiments.planning.methods import METHODS, NARROW, Bed, Task, bed_of
from experiments.planning.pointmaze import Field, Pair, held_out_pairs
from treesearch.planning.planner import Planner
from treesearch.report import trees
from treesearch.report.tables import markdown_table
from treesearch.results.result import TaskResult
from treesearch.rewards.trajectories.maze import MAZES

SHOWN = {"base": "base sampler", "best_of_n": "best-of-N", "fk": "FK", "dts_star": "DTS*"}
SETTINGS: dict[str, dict[str, Any]] = {"fk": {"lam": 10.0}, "dts_star": NARROW | {"backup": "max"}}
FRAME = 0.12  # seconds
EVERY = 6  # environment steps a frame
STEPS = 10  # rows executed before the next decision of the animation


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the demo."""

    maze: str = "medium"
    """a maze with a shipped model"""
    horizon: int | None = 48
    """rows of a plan, a multiple of 8; the fewer, the harder; None for the model's own"""
    pairs: int = 16
    """start-goal pairs of the table"""
    min_cells: int = 6
    """shortest route of a pair"""
    rollouts: int = 32
    """budget of a decision: this many times T NFE"""
    num_steps: int = 10
    """T"""
    seed: int = 0
    """of pairs and plans"""
    weights: Path | None = None
    """a model that is not shipped"""
    threads: int = 1
    """of the model; its passes are small, and several threads that share a busy core wait for each other"""
    out: Path = Path("runs/demo-plan")
    """folder of the pictures"""


# table


def compare(bed: Bed, pairs: Sequence[Pair], rollouts: int, seed: int) -> str:
    """Success and NFE of a decision, by method; a line as soon as each is done."""
    body, heads = [], ("method", "success", "NFE a decision", "seconds a decision", "mean reward")
    for name, label in SHOWN.items():
        setup = METHODS[name].make(bed, **SETTINGS.get(name, {}))
        budget = 1 if name == "base" else rollouts
        done = play(bed, setup, pairs, rollouts=budget, seed=seed, batch_size=256)
        hits, made = done.field.reached, done.planner.decision
        row = [label, f"{hits.sum()} of {len(hits)}", f"{made.nfe_each:,.0f}"]
        body.append([*row, f"{made.seconds / len(pairs):.2f}", f"{np.mean(done.rewards):.2f}"])
        print(f"  {label:13} {row[1]:>9} arrive, {row[2]:>6} NFE a decision", flush=True)
    return markdown_table(body, heads)


# the tree of plans


class Level(NamedTuple):
    """Nodes of a tree at one level as plans over the maze.

    Args:
        t: the level.
        paths: (n, H, 2), predicted plans; samples at t = 0.
        value: (n,).
        visits: (n,).
    """

    t: int
    paths: NDArray[np.float32]
    value: NDArray[np.float64]
    visits: NDArray[np.int32]


def levels_of(bed: Bed, task: TaskResult) -> list[Level]:
    """What each level of a tree would become: the endpoint predicted from every node's state."""
    tree, found = task.tree, []
    for t in sorted({int(t) for t in tree.t[1:]}, reverse=True):
        nodes = np.flatnonzero(tree.t == t)
        plans = predicted(bed, task, nodes, t) if t else task.fetch(nodes)
        value = np.where(np.isnan(tree.value[nodes]), tree.reward[nodes], tree.value[nodes])
        found.append(Level(t, plans[..., :2].numpy(), value, tree.visits[nodes].copy()))
    return found


def predicted(bed: Bed, task: TaskResult, nodes: NDArray[np.int64], t: int) -> Tensor:
    """Endpoints (n, H, C) in data units, of nodes at level t > 0."""
    states = bed.kernel.encode_samples(task.fetch(nodes))
    encoded = bed.kernel.encode([task.prompt])
    cond = {name: rows.expand(len(nodes), *rows.shape[1:]) for name, rows in encoded.items()}
    law = bed.kernel.transition(states, torch.full((len(nodes),), t), cond)
    return bed.kernel.decode(law.endpoint)


def draw_plans(bed: Bed, levels: Sequence[Level], pair: Pair, trail: NDArray[Any], path: Path) -> None:
    """One maze a level; plans coloured by value, the more often visited the wider."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = 3
    rows = -(-len(levels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    low, high = np.quantile(levels[-1].value, [0.1, 1.0])
    shades = ScalarMappable(Normalize(low, high), "viridis")
    for ax, level in zip(axes.flat, levels, strict=False):
        draw_maze(ax, bed.maze, pair)
        order = np.argsort(level.value, kind="stable")
        for i in order:
            width = 0.5 + 0.6 * np.log(level.visits[i])
            ax.plot(*level.paths[i].T, color=shades.to_rgba(level.value[i]), linewidth=width, alpha=0.75)
        name = f"t = {level.t}: {len(order)} predicted plans" if level.t else f"t = 0: {len(order)} samples"
        ax.set_title(name, fontsize=9)
    last = axes.flat[len(levels) - 1]
    last.plot(*levels[-1].paths[np.argmax(levels[-1].value)].T, color="crimson", linewidth=2.2, label="best plan")
    last.plot(*trail.T, color="black", linewidth=1.2, linestyle="--", label="executed")
    last.legend(loc="lower center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    for ax in axes.flat[len(levels) :]:
        ax.axis("off")
    figure.colorbar(shades, ax=axes, shrink=0.6, label="value (samples: reward)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_maze(ax: Any, maze: str, pair: Pair) -> None:
    """Walls, start and goal."""
    walls = np.array(MAZES[maze])
    rows, cols = walls.shape
    ax.imshow(walls, cmap="Greys", vmin=0, vmax=2.2, extent=(-cols / 2, cols / 2, -rows / 2, rows / 2), zorder=0)
    ax.plot(*pair.start, "o", color="black", markersize=7, zorder=5)
    ax.plot(*pair.goal, "*", color="crimson", markersize=13, markeredgecolor="white", zorder=5)
    ax.set_xlim(-cols / 2, cols / 2)
    ax.set_ylim(-rows / 2, rows / 2)
    ax.set_aspect("equal")
    ax.axis("off")


# the animation


class Moment(NamedTuple):
    """A decision: at which step, the plans it looked at, and the one it took."""

    step: int
    looked: NDArray[np.float32]  # (n, H, 2)
    plan: NDArray[np.float32]  # (H, 2)
    nfe: int
    start: str


def watched(bed: Bed, pair: Pair, rollouts: int, seed: int) -> tuple[list[Moment], NDArray[Any], bool]:
    """The decisions of one episode, the positions that were passed, and whether it arrived."""
    moments: list[Moment] = []

    def watch(field: Field, planner: Planner) -> None:
        made = planner.decision
        looked = planner.tasks[0].best(24)[0] if made.searched[0] else made.plans
        start = "kept" if made.kept[0] else "warm start" if made.warm[0] else "from the prior"
        plans = (looked[..., :2].numpy(), made.plans[0, :, :2].numpy())
        moments.append(Moment(int(field.steps[0]), *plans, made.nfe, start))

    setup = METHODS["dts_star"].make(bed, **SETTINGS["dts_star"])
    done = play(
        bed,
        setup,
        [pair],
        rollouts=rollouts,
        seed=seed,
        steps=STEPS,
        decisions=12,
        warm=True,
        batch_size=64,
        watch=watch,
    )
    return moments, np.array(done.field.paths[0])[:, :2], bool(done.field.reached[0])


def animate(bed: Bed, moments: Sequence[Moment], trail: NDArray[Any], arrived: bool, pair: Pair, path: Path) -> None:
    """Write the episode as a GIF."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames(bed, moments, trail, arrived, pair)]
    small = [picture.quantize(64) for picture in pictures]
    wait = [int(1000 * FRAME)] * (len(small) - 1) + [1500]
    small[0].save(path, save_all=True, append_images=small[1:], duration=wait, loop=0, optimize=True)


def frames(
    bed: Bed, moments: Sequence[Moment], trail: NDArray[Any], arrived: bool, pair: Pair
) -> Iterator[NDArray[np.uint8]]:
    """Pictures (h, w, 3), one every few steps and one more where a decision was made."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.4, 4.7), dpi=90, layout="constrained")
    stops = sorted({*range(0, len(trail), EVERY), *(moment.step for moment in moments), len(trail) - 1})
    for step in stops:
        at = max(i for i, moment in enumerate(moments) if moment.step <= step)
        ax.clear()
        draw_moment(ax, bed.maze, moments[at], trail[: step + 1], pair)
        done = "arrived" if arrived and step == len(trail) - 1 else f"{moments[at].start}, {moments[at].nfe} NFE"
        ax.set_title(f"step {step}, decision {at + 1}: {done}", fontsize=10)
        figure.canvas.draw()
        yield np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # pyright: ignore[reportAttributeAccessIssue]
    plt.close(figure)


def draw_moment(ax: Any, maze: str, moment: Moment, trail: NDArray[Any], pair: Pair) -> None:
    """The plans of a decision, where the point has been, and where it is."""
    draw_maze(ax, maze, pair)
    for path in moment.looked:
        ax.plot(*path.T, color="tab:blue", linewidth=0.7, alpha=0.35)
    ax.plot(*moment.plan.T, color="crimson", linewidth=2)
    ax.plot(*trail.T, color="black", linewidth=1.6)
    ax.plot(*trail[-1], "o", color="black", markersize=9, markeredgecolor="white", zorder=6)


# the command


def main(args: Args) -> None:
    """Plan, print, draw."""
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    bed = bed_of(Task(args.maze, args.horizon, "execution"), args.num_steps, args.weights)
    pairs = held_out_pairs(args.maze, args.pairs, args.seed, min_cells=args.min_cells)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{args.maze}, {len(pairs)} held-out pairs, {args.rollouts} rollouts of {args.num_steps} steps")
    table = compare(bed, pairs, args.rollouts, args.seed)
    (args.out / "table.md").write_text(table + "\n")
    print(f"\n{table}\n")

    pair = max(pairs, key=lambda p: p.cells)
    setup = METHODS["dts_star"].make(bed, **SETTINGS["dts_star"])
    done = play(bed, setup, [pair], rollouts=2 * args.rollouts, seed=args.seed)
    task = done.planner.tasks[0]
    trees.draw_tree(trees.layout(task.tree), args.out / "tree.png")  # selects a backend without a display
    trail = np.array(done.field.paths[0])[:, :2]
    draw_plans(bed, levels_of(bed, task), pair, trail, args.out / "plans.png")
    animate(bed, *watched(bed, pair, args.rollouts, args.seed), pair, args.out / "plan.gif")
    for name in ("plans.png", "tree.png", "plan.gif"):
        print(f"wrote {args.out / name}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ts.TreeSearchError, ValueError, OSError, ImportError) as error:
        print(f"demo_plan: {error}", file=sys.stderr)
        sys.exit(1)
