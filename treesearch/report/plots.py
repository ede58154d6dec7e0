"""Pictures: a data function and a draw function each.

curve / draw_curves      best reward against NFE
layout / draw_tree       the tree, t downwards, coloured by value
grid                     samples as one image
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.core.tree import Tree
from treesearch.errors import missing
from treesearch.runs.files import replacing
from treesearch.text import label

DRAWN_NODES = 3_000  # a picture with more says no more


class Curve(NamedTuple):
    """Best reward against NFE."""

    nfe: list[int]
    best: list[float]


class Layout(NamedTuple):
    """Node positions: x from the order of leaves, y = t."""

    node: NDArray[np.int64]
    x: NDArray[np.float64]
    t: NDArray[np.int64]
    parent: NDArray[np.int64]  # positions in `node`, -1 for the root
    value: NDArray[np.float64]
    hidden: int  # nodes left out


def curve(history: Sequence[Mapping[str, Any]]) -> Curve:
    """Waves that have a sample."""
    known = [h for h in history if h["best_reward"] is not None]
    return Curve([h["nfe"] for h in known], [h["best_reward"] for h in known])


def layout(tree: Tree, limit: int = DRAWN_NODES) -> Layout:
    """Positions of the first `limit` nodes of a tree (they are in order of creation, parents first)."""
    n = min(len(tree), limit)
    parent, t = tree.parent[:n].astype(np.int64), tree.t[:n].astype(np.int64)
    kids: list[list[int]] = [[] for _ in range(n)]
    for node in range(1, n):
        kids[parent[node]].append(node)
    x, stack, leaf = np.zeros(n), [0], 0
    order = []
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(kids[node]))
        if not kids[node]:
            x[node], leaf = leaf, leaf + 1
    for node in reversed(order):
        if kids[node]:
            x[node] = np.mean(x[kids[node]])
    value = np.where(np.isnan(tree.value[:n]), tree.reward[:n], tree.value[:n])
    return Layout(np.arange(n), x, t, parent, value, len(tree) - n)


def draw_curves(curves: Mapping[str, Curve], path: str | Path, ylabel: str = "best reward") -> Path:
    """Write a PNG of one line a name."""
    return draw_panels({"": curves}, path, ylabel)


def draw_panels(panels: Mapping[str, Mapping[str, Curve]], path: str | Path, ylabel: str = "best reward") -> Path:
    """Write a PNG of one panel a title, each with axes of its own and one line a name."""
    plt = _pyplot()
    height = 4.0 if len(panels) == 1 else 3.2 * len(panels)
    figure, rows = plt.subplots(len(panels), figsize=(6.4, height), layout="constrained", squeeze=False)
    for axes, (title, curves) in zip(rows[:, 0], panels.items(), strict=True):
        for name, line in curves.items():
            (drawn,) = axes.plot(line.nfe, line.best, label=label(name), linewidth=1.6, drawstyle="steps-post")
            axes.plot(line.nfe[-1:], line.best[-1:], "o", color=drawn.get_color(), markersize=5)
        axes.set_title(label(title), fontsize=9)
        axes.set_xlabel("network evaluations (NFE)")
        axes.set_ylabel(label(ylabel))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return _save(plt, figure, path)


def draw_tree(data: Layout, path: str | Path) -> Path:
    """Write a PNG of a tree: root on top, nodes coloured by value."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    from matplotlib.collections import LineCollection

    below = np.flatnonzero(data.parent >= 0)
    ends = np.stack([data.x[data.parent[below]], data.t[data.parent[below]], data.x[below], data.t[below]], 1)
    axes.add_collection(LineCollection(list(ends.reshape(-1, 2, 2)), colors="0.75", linewidths=0.5, zorder=1))
    finite = np.where(np.isfinite(data.value), data.value, np.nan)
    dots = axes.scatter(data.x, data.t, c=finite, s=10, cmap="viridis", zorder=2, plotnonfinite=False)
    figure.colorbar(dots, ax=axes, label="value (leaves: reward)")
    axes.set_ylabel("denoising steps left, t")
    axes.set_xticks([])
    if data.hidden:
        axes.set_title(f"first {len(data.node)} nodes; {data.hidden} more", fontsize=9)
    return _save(plt, figure, path)


def grid(samples: Any, path: str | Path, columns: int = 8, scale: int = 2) -> Path:
    """Write images (n, c, h, w) in [0, 1] as one PNG.

    Raises:
        ValueError: the samples are not images.
    """
    from PIL import Image

    images = np.asarray(samples.detach().cpu().float() if hasattr(samples, "detach") else samples)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"samples have shape {images.shape}, expected images (n, 1 or 3, height, width) in [0, 1]")
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.full((channels, rows * (height + 2) + 2, columns * (width + 2) + 2), 0.35)
    for i, image in enumerate(images):
        y, x = 2 + (i // columns) * (height + 2), 2 + (i % columns) * (width + 2)
        sheet[:, y : y + height, x : x + width] = image
    pixels = (sheet.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    with replacing(path) as scratch:
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(scratch)
    return Path(path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise missing("matplotlib", "plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: str | Path) -> Path:
    with warnings.catch_warnings(), replacing(path) as scratch:
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands for the letter
        figure.savefig(scratch, dpi=140, format=scratch.suffix[1:] or "png")
    plt.close(figure)
    return Path(path)
