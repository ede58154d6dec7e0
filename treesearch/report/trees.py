"""Trees of any size as pictures: the root on top, coloured by value, the path of the best sample marked.

    layout       where each node stands; beyond a few thousand, neighbours of one level share a mark
    draw_tree    the marks, with thumbnails of the best samples where there are some

A node spans the places of the leaves below it, its children side by side in the order of the best below them, so that
good regions of a tree stand together whatever its shape: a search tree, a population's genealogy, or best-of-N's fan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core.tree import ROOT, Tree
from treesearch.report.plots import pyplot, save
from treesearch.text import label

DRAWN_NODES = 3_000  # a picture with more marks says no more
COLUMNS, ROWS = 160, 48  # of marks that several nodes share, at most
BEST = "#d62728"

F64 = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """Marks of a tree: a node each, or several nodes of one level that stand side by side.

    Args:
        x: (m,) position in 0..1; of several nodes, their mean.
        row: (m,) 0 for the root, one more for each level below.
        value: (m,) value in units of r, of leaves their reward; the best of several nodes; NaN where none is known.
        count: (m,) nodes.
        edges: (e, 2) marks of parents and children.
        levels: (rows,) t of each row; of several levels the highest.
        path: (p, 2) x and row of the nodes from the root to the best sample; empty where there is none.
        best: nodes of the samples, best first, with their place and reward: {node: (x, reward)}.
        nodes: of the tree.
    """

    x: F64
    row: Ids
    value: F64
    count: Ids
    edges: NDArray[np.int64]
    levels: Ids
    path: F64
    best: dict[int, tuple[float, float]]
    nodes: int


def layout(tree: Tree, limit: int = DRAWN_NODES, best: int = 8) -> Layout:
    """At most about `limit` marks for a tree, and the places of its `best` samples."""
    parent, n = tree.parent.astype(np.int64), len(tree)
    value = np.where(np.isnan(tree.value), tree.reward, tree.value)
    top = np.where(np.isnan(value), -np.inf, value)
    levels, row = _rows(tree.t, ROWS if n > limit else n)
    x = _places(parent, top)
    mark = np.arange(n) if n <= limit else _shared(row, x, max(min(limit // len(levels), COLUMNS), 1))
    _, first, count = np.unique(mark, return_index=True, return_counts=True)
    highest = np.full(len(count), -np.inf)
    np.maximum.at(highest, mark, top)
    edges = np.unique(np.stack([mark[parent[1:]], mark[1:]], 1), axis=0)
    samples = _highest(tree, best)
    path = _path(parent, int(samples[0])) if len(samples) else np.empty(0, np.int64)
    return Layout(
        np.bincount(mark, x) / count,
        row[first],
        np.where(np.isfinite(highest), highest, np.nan),
        count,
        edges[edges[:, 0] != edges[:, 1]],
        levels,
        np.stack([x[path], row[path].astype(np.float64)], 1),
        {int(node): (float(x[node]), float(tree.reward[node])) for node in samples},
        n,
    )


def _rows(t: NDArray[np.int16], most: int) -> tuple[Ids, Ids]:
    """(the highest t of each row, the row of each node): a row a level, or for several where there are too many."""
    levels, row = np.unique(-t.astype(np.int64), return_inverse=True)
    share = np.arange(len(levels)) * min(most, len(levels)) // len(levels)
    return -levels[np.unique(share, return_index=True)[1]], share[row]


def _highest(tree: Tree, most: int) -> Ids:
    """Nodes of the samples of highest reward, best first."""
    scored = np.flatnonzero((tree.t == 0) & ~np.isnan(tree.reward))
    return scored[np.argsort(-tree.reward[scored], kind="stable")[:most]]


def _places(parent: Ids, value: F64) -> F64:
    """The middle of each node's span in 0..1; parents have smaller numbers than their children."""
    n, above, top = len(parent), parent.tolist(), value.tolist()
    wide = [0] * n
    for node in range(n - 1, ROOT, -1):
        wide[node] = wide[node] or 1
        wide[above[node]] += wide[node]
        top[above[node]] = max(top[above[node]], top[node])
    start, free = [0] * n, [0] * n
    for node in _outwards(parent, np.asarray(top)).tolist():
        start[node] = free[node] = free[above[node]]
        free[above[node]] += wide[node]
    return (np.asarray(start) + np.maximum(wide, 1) / 2) / max(wide[ROOT], 1)


def _outwards(parent: Ids, top: F64) -> Ids:
    """Nodes below the root by parent; siblings with the best in the middle, the next ones left and right of it."""
    order = np.lexsort((-top, parent))[1:]
    first = np.flatnonzero(np.diff(parent[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return order[np.lexsort((np.where(rank % 2, rank, -rank), parent[order]))]


def _shared(row: Ids, x: F64, columns: int) -> Ids:
    """The mark of each node: those of a row that fall into one of `columns` equal parts of its width share one."""
    cell = row * columns + np.minimum((x * columns).astype(np.int64), columns - 1)
    return np.unique(cell, return_inverse=True)[1]


def _path(parent: Ids, node: int) -> Ids:
    """Nodes from the root to `node`."""
    path = [node]
    while path[-1] != ROOT:
        path.append(int(parent[path[-1]]))
    return np.array(path[::-1])


def draw_tree(
    data: Layout,
    path: str | Path,
    *,
    title: str = "",
    pictures: Mapping[int, Any] | None = None,
    kinds: NDArray[np.int64] | None = None,
    names: Sequence[str] = (),
) -> Path:
    """Write a PNG of a tree.

    Args:
        data: its marks.
        path: of the file.
        title: above the picture.
        pictures: of the best samples by node, uint8 (h, w) or (h, w, 3); they stand below their leaves.
        kinds: (nodes,) numbers of what led to each node, such as actions, to colour by in place of the value.
        names: of the kinds.

    Raises:
        ValueError: kinds of a tree whose nodes share marks.
    """
    plt = pyplot()
    shown = {node: picture for node, picture in (pictures or {}).items() if node in data.best}
    figure, axes = plt.subplots(figsize=(9, 6.4 if shown else 4.8), layout="constrained")
    colours = _by_value(plt, figure, axes, data) if kinds is None else _by_kind(plt, figure, data, kinds, names)
    _edges(axes, data, colours)
    _marks(axes, data, colours)
    _best(axes, data)
    _frame(axes, data, title)
    if shown:
        _thumbnails(axes, data, shown)
    return save(plt, figure, path)


def _by_value(plt: Any, figure: Any, axes: Any, data: Layout) -> F64:
    """Colours (m, 4) of the marks, with their scale."""
    known = data.value[np.isfinite(data.value)]
    low, high = np.percentile(known, [5, 100]) if len(known) else (0.0, 1.0)
    scale = plt.cm.ScalarMappable(plt.Normalize(low, high), _colours(plt))
    figure.colorbar(scale, ax=axes, label="value; of leaves: reward", extend="min", pad=0.01, shrink=0.6)
    return scale.to_rgba(data.value)


def _by_kind(plt: Any, figure: Any, data: Layout, kinds: NDArray[np.int64], names: Sequence[str]) -> F64:
    """Colours (m, 4) of the marks by what led to their nodes, with a legend; the root is grey."""
    if len(kinds) != len(data.x):
        raise ValueError(f"{len(kinds)} kinds for {len(data.x)} marks: draw a tree of at most {DRAWN_NODES} nodes")
    table = plt.get_cmap("tab20" if len(names) > 10 else "tab10")(np.arange(len(names)) % 20)
    dots = [plt.Line2D([], [], marker="o", ls="", color=c, label=label(n)) for n, c in zip(names, table, strict=True)]
    figure.legend(handles=dots, loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8)
    colours = table[kinds]
    colours[ROOT] = plt.matplotlib.colors.to_rgba("0.6")
    return colours


def _colours(plt: Any) -> Any:
    """Viridis without its palest end, which is hardly seen in thin lines; grey for no value."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.92, 256))).with_extremes(bad="0.6")


def _edges(axes: Any, data: Layout, colours: F64) -> None:
    from matplotlib.collections import LineCollection

    above, below = data.edges.T
    at = np.stack([data.x, data.row.astype(np.float64)], 1)
    lines = _curves(at[above], at[below])
    order = np.argsort(_finite(data.value[below]), kind="stable")
    width = (0.9 if len(data.x) < 400 else 0.5) + 0.3 * np.log10(data.count[below])
    style = {"colors": colours[below][order], "linewidths": width[order], "alpha": 0.55}
    axes.add_collection(LineCollection(list(lines[order]), **style, zorder=1))


def _curves(start: F64, end: F64, points: int = 21) -> F64:
    """Lines (e, points, 2) that leave and arrive downwards."""
    along = np.linspace(0, 1, points)
    part = np.stack([along * along * (3 - 2 * along), along], 1)
    return start[:, None] + (end - start)[:, None] * part


def _finite(value: F64) -> F64:
    return np.where(np.isnan(value), -np.inf, value)


def _marks(axes: Any, data: Layout, colours: F64) -> None:
    order = np.argsort(_finite(data.value), kind="stable")  # the best on top
    size = (16 if len(data.x) < 400 else 4) * (1 + np.log10(data.count[order]))
    axes.scatter(data.x[order], data.row[order], c=colours[order], s=size, linewidths=0, zorder=2)


def _best(axes: Any, data: Layout) -> None:
    if not len(data.path):
        return
    line = _curves(data.path[:-1], data.path[1:]).reshape(-1, 2)
    _, reward = next(iter(data.best.values()))
    axes.plot(*line.T, color=BEST, linewidth=1.6, zorder=3, label=f"to the best sample, {reward:.4g}")
    axes.plot(*data.path[-1], "*", color=BEST, markersize=11, markeredgecolor="white", markeredgewidth=0.6, zorder=4)
    axes.legend(loc="upper right", frameon=False, fontsize=8, borderaxespad=0)


def _frame(axes: Any, data: Layout, title: str) -> None:
    rows = len(data.levels)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(rows - 0.7, -0.3)
    step = -(-rows // 14)
    axes.set_yticks(range(0, rows, step), ["root", *map(str, data.levels[step::step])])
    axes.set_ylabel("denoising steps left, t")
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("\n".join(filter(None, [label(title), _told(data)])), loc="left", fontsize=9)


def _told(data: Layout) -> str:
    """What the marks are."""
    nodes, marks = data.nodes, len(data.x)
    if nodes == marks:
        return f"{nodes:,} nodes"
    return f"{nodes:,} nodes in {marks:,} marks: neighbours of one level share a mark, coloured by the best of them"


def _thumbnails(axes: Any, data: Layout, pictures: Mapping[int, Any]) -> None:
    """Pictures side by side below the leaves they belong to, with their rewards."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    last, strip = len(data.levels) - 1, 0.42 * len(data.levels)
    axes.set_ylim(last + 0.3 + strip, -0.3)
    across = sorted(pictures, key=lambda node: data.best[node][0])
    for i, node in enumerate(across):
        (x, reward), picture = data.best[node], np.atleast_3d(np.asarray(pictures[node]))
        colour = BEST if node == next(iter(data.best)) else "0.5"
        image = OffsetImage(picture.repeat(3 // picture.shape[2], 2), zoom=62 / max(picture.shape[:2]))
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0.5, 1.0)}
        place = ((i + 0.5) / len(across), last + 0.2 + 0.6 * strip)
        box = {"edgecolor": colour, "linewidth": 1.2}
        axes.add_artist(AnnotationBbox(image, (x, last), place, arrowprops=arrow, bboxprops=box, pad=0.15))
        under = {"xytext": (0, -37), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
        axes.annotate(f"{reward:.4g}", place, color=colour, **under)
