"""Samples that are texts, where pictures would stand on a sheet: tables of the best, and of draws.

sheet         a page of one task: the best sixteen, then sixteen draws
table         the best of one task, for the card
write_lines   every sample, for programs
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from treesearch.errors import TreeSearchError
from treesearch.report.tables import markdown_table
from treesearch.results.result import TaskResult
from treesearch.results.seen import Samples
from treesearch.runs.files import write_text
from treesearch.text import brief, markdown

HALF = 16  # texts of each kind on a sheet
FEW = 3  # of a task on a card
COLUMNS = ("text", "reward")


def are_texts(samples: Samples) -> bool:
    """Whether a task has samples, and they are texts."""
    return len(samples.task.leaves) > 0 and samples.decode(0)[0] == "text"


def table(samples: Samples, rows: Iterable[int]) -> str:
    """Texts and their rewards as Markdown, long ones without their middle."""
    shown = [(brief(samples.decode(row)[1]), f"{float(samples.task.rewards[row]):.4g}") for row in rows]
    head, *body = ([markdown(cell) for cell in line] for line in [COLUMNS, *shown])
    return markdown_table(body, head)


def sheet(samples: Samples, path: Path) -> None:
    """Write a page of the best texts of a task above draws of its estimate."""
    task = samples.task
    ranked = samples.ranked(HALF).tolist()
    parts = [] if task.prompt is None else [f"# {markdown(brief(task.prompt))}"]
    parts += [f"## The best {len(ranked)} of {len(task.leaves):,} texts", table(samples, ranked)]
    if np.isfinite(task.readout.log_weights.max()):
        what = "of its texts, chosen at random" if task.log_z is None else "draws of the read-out"
        parts += [f"## {HALF} {what}", table(samples, task.draw_rows(HALF).tolist())]
    write_text(path, "\n\n".join(parts) + "\n")


def write_lines(task: TaskResult, path: Path) -> None:
    """Write a line of JSON for each sample of a task: text, reward, log_weight; what is not finite is null.

    Raises:
        TreeSearchError: samples that are no texts.
    """
    if not all(isinstance(sample, str) for sample in task.samples):
        raise TreeSearchError("the samples of this run are no texts: export npz")
    rows = zip(task.samples, task.rewards.tolist(), task.log_weights.tolist(), strict=True)
    lines = [{"text": text, "reward": _finite(r), "log_weight": _finite(w)} for text, r, w in rows]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else None
