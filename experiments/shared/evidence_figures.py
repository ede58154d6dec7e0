"""Figures of sampling experiments: panels with one legend, distances against NFE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from experiments.shared.cells import Row
from experiments.shared.evidence_duels import trees
from experiments.shared.evidence_report import Found
from experiments.shared.tables import NOT_RUN
from treesearch.errors import missing


def plotting() -> Any:
    """pyplot, without a screen."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing("matplotlib", "plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def styles(methods: Sequence[str], marked: Sequence[str]) -> dict[str, Row]:
    """Colour and marker of each method; those to be seen at once are dark."""
    colours, markers = cycle(plotting().get_cmap("tab20").colors), cycle("os^Dv*Px<>")
    dark = cycle(("black", "crimson", "navy"))
    return {m: {"color": next(dark if m in marked else colours), "marker": next(markers)} for m in methods}


def panels(titles: Sequence[str], file: Path, panel: Callable[[Any, str], None], height: float = 3.1) -> str:
    """One panel a title, four in a row at most, one legend below all; returns the file's name."""
    plt, wide = plotting(), min(4, len(titles))
    rows = -(-len(titles) // wide)
    figure, axes = plt.subplots(rows, wide, figsize=(3.8 * wide, height * rows + 1), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, title in zip(axes.flat, titles, strict=False):
        panel(axis, title)
        axis.set(title=title)
        axis.grid(alpha=0.25)
        if not axis.lines:
            axis.text(0.5, 0.5, NOT_RUN, ha="center", transform=axis.transAxes)
        found, labels = axis.get_legend_handles_labels()
        handles = dict(zip(labels, found, strict=True)) | handles
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    if handles:
        each = min(6, max(2, 2 * wide))
        figure.legend(handles.values(), handles, loc="lower center", ncols=each, frameon=False, fontsize=8)
    share = 0.2 * (1 + -(-len(handles) // 6)) / (height * rows + 1)
    figure.tight_layout(rect=(0, share, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file.name


def distance_figure(found: Found, metric: str, floors: Mapping[str, float], file: Path) -> str:
    """Square root of a squared distance against NFE, one panel a place; dashed: published settings."""
    look = styles(found.all_methods, trees(found))

    def panel(axis: Any, place: str) -> None:
        floor = max(floors.get(place, 0.0), 1e-12)
        for line in found.lines(place):
            means = {n: found.mean(place, line, n, metric) for n in found.budgets}
            curve = {n: max(m.mean, floor) ** 0.5 for n, m in means.items() if m is not None}
            if not curve:
                continue
            dashed = line.label.endswith(", published")
            kind: Row = {"linestyle": "--", "alpha": 0.6} if dashed else {"label": line.method}
            axis.plot(list(curve), list(curve.values()), markersize=4, **look[line.method], **kind)
        if axis.lines:
            axis.axhline(floor**0.5, color="grey", linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="NFE", ylabel="MMD")

    return panels(found.places, file, panel)
