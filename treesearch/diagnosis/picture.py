"""The picture of a diagnosis: what is decided and what endpoints know by level, and the kernel's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from treesearch.diagnosis.diagnosis import Diagnosis
from treesearch.diagnosis.suggest import shown
from treesearch.report.plots import pyplot, save
from treesearch.text import label

PANELS = (
    ("the reward by level", (("decided", "decided"), ("upper", "decided, upper half"), ("rank", "endpoints, rank"))),
    ("the kernel by level", (("one_step", "missed by one step"), ("asymmetry", "asymmetry of the Jacobian"))),
)


def draw(found: Diagnosis, path: Path) -> Path:
    """Write a PNG; bars are two standard errors.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for ax, (title, lines) in zip(axes, PANELS, strict=True):
        _panel(ax, found, title, lines)
    best = shown(found.suggestion("best").method)
    figure.suptitle(label(f"{found.reward} on {found.kernel}; for the best sample {best}", 150), fontsize=9)
    return save(plt, figure, path)


def _panel(ax: Any, found: Diagnosis, title: str, lines: tuple[tuple[str, str], ...]) -> None:
    t = np.array([level.t for level in found.levels])
    for name, words in lines:
        values = np.array([getattr(level, name) for level in found.levels])
        known = ~np.isnan(values[:, 0])
        if known.any():
            errors = 2 * np.nan_to_num(values[known, 1])
            ax.errorbar(t[known], values[known, 0], errors, label=words, marker="o", markersize=4, capsize=2)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel("steps left, t")
    ax.set_ylim(-0.3, 1.3)
    ax.invert_xaxis()
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.has_data():
        ax.legend(frameon=False, fontsize=8, loc="best")
