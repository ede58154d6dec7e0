"""Curves: best reward against NFE, with a band over the runs of one method that differ in their seeds.

curve        of one run
band         of several
panels       curves of runs that may share their axes
draw_curves  one panel
draw_panels  several, below each other
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.errors import missing
from treesearch.runs.files import replacing
from treesearch.runs.identity import SEARCHED
from treesearch.text import label

QUANTILES = (0.1, 0.5, 0.9)
WIDE = 30  # largest over smallest NFE from which an axis is logarithmic


class Curve(NamedTuple):
    """Best reward against NFE, a step at each wave that has a sample."""

    nfe: list[int]
    best: list[float]


class Band(NamedTuple):
    """Quantiles of several curves, as far as the shortest of them goes."""

    nfe: NDArray[np.float64]
    low: NDArray[np.float64]
    middle: NDArray[np.float64]
    high: NDArray[np.float64]


class Panel(NamedTuple):
    """Curves that share their axes: by name, several where runs differ in their seeds alone."""

    title: str
    ylabel: str
    curves: Mapping[str, Sequence[Curve]]


def curve(history: Sequence[Mapping[str, Any]]) -> Curve:
    """Waves that have a sample."""
    known = [h for h in history if h["best_reward"] is not None]
    return Curve([h["nfe"] for h in known], [h["best_reward"] for h in known])


def band(curves: Sequence[Curve]) -> Band:
    """Quantiles over the curves at every NFE at which one of them has a step.

    Raises:
        ValueError: a curve is empty.
    """
    if not all(line.nfe for line in curves):
        raise ValueError("a run without a sample has no curve: leave it out")
    first, last = max(line.nfe[0] for line in curves), min(line.nfe[-1] for line in curves)
    nfe = np.unique(np.concatenate([[first, max(first, last)], *(line.nfe for line in curves)]))
    nfe = nfe[(nfe >= first) & (nfe <= max(first, last))]
    values = [np.asarray(line.best)[np.searchsorted(line.nfe, nfe, side="right") - 1] for line in curves]
    return Band(nfe, *np.quantile(np.stack(values), QUANTILES, axis=0))


def panels(runs: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> list[Panel]:
    """Curves of run folders: only searches for one reward, on one kernel under the same prompts, share their axes, and
    only runs of one method with the same settings, which differ in their seeds, become a band.

    Args:
        runs: configuration (as in run.json) and history by path.
    """
    names = {path: Path(path).resolve().name for path in runs}
    if len(set(names.values())) < len(names):
        names = {path: path for path in runs}
    groups: dict[str, dict[str, list[str]]] = {}
    for path, (config, _) in runs.items():
        searched = json.dumps([config[key] for key in SEARCHED])
        groups.setdefault(searched, {}).setdefault(json.dumps(config["method"]), []).append(path)
    return [_gathered(methods, runs, names) for methods in groups.values()]


def _gathered(methods: Mapping[str, list[str]], runs: Mapping[str, Any], names: Mapping[str, str]) -> Panel:
    """The panel of paths by method; alone it is called by its folder, several by what their method has of its own."""
    settings = [json.loads(method) for method in methods]
    curves: dict[str, list[Curve]] = {}
    for method, paths in zip(settings, methods.values(), strict=True):
        name = names[paths[0]] if len(paths) == 1 else _apart(method, settings)
        curves[name if name not in curves else f"{name}, {paths[0]}"] = [curve(runs[path][1]) for path in paths]
    config = runs[next(iter(methods.values()))[0]][0]
    prompts = f", {len(config['prompts'])} prompts" if config["prompts"] else ""
    return Panel(f"{config['kernel']}{prompts}", f"best reward: {config['reward']}", curves)


def _apart(method: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """A method's name, with the settings in which others of the name differ from it."""
    same = [other for other in others if other["name"] == method["name"]]
    own = [f"{k}={v}" for k, v in method.items() if any(other.get(k) != v for other in same)]
    return f"{method['name']}({', '.join(own)})" if own else method["name"]


def draw_curves(
    curves: Mapping[str, Sequence[Curve]], path: str | Path, *, title: str = "", ylabel: str = "best reward"
) -> Path:
    """Write a PNG of one line a name, with a band where it has several curves."""
    return draw_panels([Panel(title, ylabel, curves)], path)


def draw_panels(panels: Sequence[Panel], path: str | Path) -> Path:
    """Write a PNG of panels, each with axes of its own."""
    plt = pyplot()
    height = 4.2 if len(panels) == 1 else 3.4 * len(panels)
    figure, rows = plt.subplots(len(panels), figsize=(6.8, height), layout="constrained", squeeze=False)
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        _panel(plt, axes, panel)
    return save(plt, figure, path)


def _panel(plt: Any, axes: Any, panel: Panel) -> None:
    styles = itertools.cycle([{"color": c, "linestyle": s} for s in ("-", "--") for c in plt.cm.tab10.colors])
    for i, ((name, curves), style) in enumerate(zip(panel.curves.items(), styles, strict=False)):
        width = max(2.8 - 0.4 * i, 1.2)  # of lines that coincide each can be seen
        _line(axes, name, [line for line in curves if line.nfe], {**style, "linewidth": width})
    axes.set_title(label(panel.title), fontsize=10, loc="left")
    axes.set_xlabel("network evaluations (NFE)")
    axes.set_ylabel(label(panel.ylabel, 60))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        low, high = axes.dataLim.intervalx
        if 0 < low * WIDE < high:
            _logarithmic(plt, axes)
        axes.legend(frameon=False, fontsize=8, loc="best")


def _logarithmic(plt: Any, axes: Any) -> None:
    """An axis of NFE in powers, marked at 1, 2 and 5 of each as people say them: 200, 2k, 1M."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())


def _line(axes: Any, name: str, curves: Sequence[Curve], style: Mapping[str, Any]) -> None:
    """One name: a curve, or the median of several in their band."""
    if not curves:
        return
    found = band(curves)
    known = f", median and 10-90 % of {len(curves)} runs" if len(curves) > 1 else ""
    words = f"{label(name, 60)}: {found.middle[-1]:.4g}{known}"
    axes.plot(found.nfe, found.middle, label=words, drawstyle="steps-post", **style)
    axes.plot(found.nfe[-1:], found.middle[-1:], "o", color=style["color"], markersize=4)
    if known:
        axes.fill_between(found.nfe, found.low, found.high, step="post", color=style["color"], alpha=0.18, linewidth=0)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        ImportError: it is not installed; the message has the line that installs it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing("matplotlib", "plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(plt: Any, figure: Any, path: str | Path) -> Path:
    """Write a figure as the kind of file that its name asks for, and close it."""
    with warnings.catch_warnings(), replacing(path) as scratch:
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands for the letter
        figure.savefig(scratch, dpi=160, format=scratch.suffix[1:] or "png")
    plt.close(figure)
    return Path(path)
