"""make demo-actions: a search over what to do inside a network, on the shipped MNIST model, in a minute or two.

    python -m experiments.interventions.demo_actions

Directions of h-space at some strengths (`hspace`) are the actions of the tree in which DTS* looks for a heavy eight:
siblings differ in their action and, where the chain has noise, in their noise. With --eta 0 actions are all that a tree
can branch by below x_T. What that is worth is measured in `experiments.interventions.compare`.

    tree.png        the tree, a node in the colour of the action that led to it, with the best samples
    alone.png       what each action does by itself to some draws of x_T
    table.md        which actions the best leaves took, by level, and how they fare beside best-of-N
    summary.json    the same, and the settings
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import treesearch as ts
from experiments.mnist.targets import conjunction
from treesearch.backends import mnist
from treesearch.backends.interventions import Actions
from treesearch.backends.interventions.base import CHOSEN
from treesearch.backends.interventions.hspace import hspace
from treesearch.core.tree import ROOT
from treesearch.pictures.sheets import Block, Cell, draw_sheet, thumbnail
from treesearch.report import trees
from treesearch.report.tables import markdown_table
from treesearch.runs.files import write_text

SHARE = 0.1  # of the leaves, the best of which are told of
COLUMNS = 8  # draws of x_T that each action is shown on


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Search over actions."""

    num_steps: int = 25
    """T"""
    eta: float = 1.0
    """0 for a chain without noise"""
    levels: tuple[int, ...] = (20, 15, 10, 5)
    """t at which an action is drawn; x_T comes with one"""
    alphas: tuple[float, ...] = (-4.0, 4.0)
    """strengths of the directions"""
    nfe: int = 4_000
    """budget"""
    seed: int = 0
    """of the search"""
    out: Path = Path("runs/demo-actions")
    """folder of the results"""

    def run(self) -> int:
        torch.set_num_threads(1)
        plain = mnist(num_steps=self.num_steps, eta=self.eta)
        changed = hspace(plain, "hspace.safetensors", alphas=self.alphas)
        kernel: Any = Actions(changed, self.levels)
        reward, budget = conjunction(), ts.Budget(nfe=self.nfe)
        method = ts.DiffusionTreeSearch(branch_at=(self.num_steps, *self.levels), widening_c=1.0, widening_alpha=0.5)
        found = ts.search(kernel, reward, method, budget=budget, seed=self.seed, batch_size=8)
        alone = ts.search(plain, reward, ts.BestOfN(), budget=budget, seed=self.seed)
        task = found.tasks[0]
        took = ruling(kernel, task.tree, task.fetch)
        self.out.mkdir(parents=True, exist_ok=True)
        self._draw(kernel, task, took)
        self._alone(kernel, changed, reward)
        self._tell(kernel, task, took, {"actions": found, "best of N": alone})
        return 0

    def _draw(self, kernel: Any, task: Any, took: NDArray[np.int64]) -> None:
        data = trees.layout(task.tree)
        nodes = np.fromiter(data.best, np.int64)
        pictures = {int(n): grey(x) for n, x in zip(nodes, task.fetch(nodes), strict=True)}
        title = f"DTS* over actions of h-space, a heavy eight, η = {self.eta:g}"
        trees.draw_tree(data, self.out / "tree.png", title=title, pictures=pictures, kinds=took, names=kernel.names)

    def _alone(self, kernel: Any, changed: Any, reward: Any) -> None:
        """A line of samples for each action, all of the same draws of x_T."""
        noise = torch.randn(COLUMNS, *changed.state_shape, generator=torch.Generator().manual_seed(self.seed))
        blocks = []
        for name, row in zip(kernel.names, kernel.rows, strict=True):
            samples = changed.decode(rolled(changed, noise, torch.tensor(row)))
            values = reward(samples).tolist()
            cells = [Cell(thumbnail(picture(x)), (f"{r:.3g}",)) for x, r in zip(samples, values, strict=True)]
            blocks.append(Block(name, cells))
        draw_sheet(blocks, self.out / "alone.png", "each action alone at all levels, on the same draws of x_T")

    def _tell(self, kernel: Any, task: Any, took: NDArray[np.int64], results: dict[str, Any]) -> None:
        table = winners(task, took, kernel.names, (self.num_steps, *self.levels))
        heads = ("action", *(f"t = {t}" for t in (self.num_steps, *self.levels)))
        figures = {name: float(result.best(1)[1][0]) for name, result in results.items()}
        best = "\n".join(f"- {name}: {value:.4g}" for name, value in figures.items())
        text = (
            f"# Actions of a search\n\nBest reward by {self.nfe:,} evaluations:\n\n{best}\n\nShare of the best "
            f"{SHARE:.0%} of leaves that took an action at a level, less its share among all leaves:\n\n"
            f"{markdown_table(table, heads)}\n"
        )
        write_text(self.out / "table.md", text)
        told = {"best": figures, "winners": [dict(zip(heads, row, strict=True)) for row in table]}
        settings = {key: str(value) for key, value in asdict(self).items()}
        write_text(self.out / "summary.json", json.dumps(told | {"settings": settings}, indent=2))
        print(text)
        print(*(self.out / name for name in ("tree.png", "alone.png", "table.md")), sep="\n")


def ruling(kernel: Actions, tree: Any, fetch: Any) -> NDArray[np.int64]:
    """The action in the state of each node, (nodes,): it was drawn where its parent branched, and led to it."""
    own = np.zeros(len(tree), np.int64)
    own[1:] = kernel.labels(fetch.raw(np.arange(1, len(tree)))).long().numpy()
    return own


def winners(task: Any, took: NDArray[np.int64], names: Sequence[str], levels: Sequence[int]) -> list[list[str]]:
    """For each action and level, how much more often the best leaves took it than all did."""
    reward = task.tree.reward[task.leaves]
    top = task.leaves[np.argsort(-reward, kind="stable")[: max(1, round(SHARE * len(reward)))]]
    every, best = (shares(task.tree, took, leaves, len(names), levels) for leaves in (task.leaves, top))
    return [[name, *(f"{x:+.0%}" for x in row)] for name, row in zip(names, best - every, strict=True)]


def shares(tree: Any, took: NDArray[np.int64], leaves: NDArray[np.int64], n: int, levels: Sequence[int]) -> Any:
    """Shares (n, levels) of leaves below segments that an action led."""
    counts = np.zeros((n, len(levels)))
    for leaf in leaves.tolist():
        node = leaf
        while node != ROOT:
            above = int(tree.parent[node])
            at = int(tree.t[above]) if above != ROOT else levels[0]
            if at in levels and tree.t[node] < at:
                counts[took[node], list(levels).index(at)] += 1
            node = above
    return counts / len(leaves)


def rolled(changed: Any, noise: Tensor, row: Tensor) -> Tensor:
    """x_0 of draws of x_T under one setting of all interventions."""
    x = changed.prior(noise)
    for t in range(changed.num_steps, 0, -1):
        cond = {CHOSEN: row.expand(len(x), -1)}
        x = changed.transition(x, torch.full((len(x),), t), cond).mean
    return x


def grey(x: Tensor) -> NDArray[np.uint8]:
    """A picture (h, w) of an image (1, h, w) in [0, 1]."""
    return (255 * x[0].clamp(0, 1)).to(torch.uint8).numpy()


def picture(x: Tensor) -> Any:
    """The same for Pillow."""
    from PIL import Image

    return Image.fromarray(grey(x))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit code."""
    import tyro

    return tyro.cli(Demo, args=argv, description=__doc__).run()


if __name__ == "__main__":
    sys.exit(main())
