"""What a comparison leaves for people: a table, what is said beside it, a folder with pictures and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treesearch.report import outputs, tables
from treesearch.report.card import card
from treesearch.results.comparison import Comparison
from treesearch.results.summary import summary as summary_of
from treesearch.runs.files import write_json, write_text

SUMMARY = "summary.json"
Tasks = Mapping[str, Sequence[Mapping[str, Any]]]


def summary(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """By method one record a task, plain numbers."""
    return {
        name: [task | (entry.also[i] if entry.also else {}) for i, task in enumerate(summary_of(entry.found))]
        for name, entry in comparison.ran.items()
    }


def table(comparison: Comparison, found: Tasks) -> tuple[list[list[str]], Sequence[str]]:
    """Lines, a task of a method each, and columns; of `summary`."""
    also = comparison.also
    columns = tables.COLUMNS if also is None else (*tables.COLUMNS, f"{also}, best", "draws")
    lines = [row for name, entry in comparison.ran.items() for row in tables.rows(name, found[name], entry.cost)]
    if also is not None:
        told = [task for tasks in found.values() for task in tasks]
        lines = [
            [*row, *map(tables.figure, (task["also_best"], task["also_draws"]))]
            for row, task in zip(lines, told, strict=True)
        ]
    return lines + [[name, *[tables.DASH] * (len(columns) - 1)] for name in comparison.refused], columns


def notes(comparison: Comparison, found: Tasks) -> dict[str, list[str]]:
    """What to know before using the numbers, by method."""
    told = {name: tables.notes(tasks, comparison.ran[name].cost) for name, tasks in found.items()}
    return told | {name: [why] for name, why in comparison.refused.items()}


def write(comparison: Comparison, folder: str | Path, asked: Mapping[str, Any]) -> Path:
    """Write summary.json, comparison.jsonl, a contact sheet a method, the curves and the card README.md.

    Args:
        comparison: what came out.
        folder: that is there.
        asked: what a reader would say was asked; `kernel` and `reward` among it.

    Returns:
        The card.
    """
    folder, found = Path(folder), summary(comparison)
    write_json(folder / SUMMARY, found)
    costs = {name: entry.cost.as_dict() for name, entry in comparison.ran.items()}
    records = [{"method": name, **task, **costs[name]} for name, tasks in found.items() for task in tasks]
    write_text(folder / "comparison.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    pictures = outputs.if_plots(lambda: _curves(comparison, folder, asked), "best reward against NFE")
    for name, entry in comparison.ran.items():
        if (sheet := outputs.contact_sheet(entry.found.tasks[0], folder / f"{name}.png")) is not None:
            pictures.append((sheet.name, f"{name}: the best sixteen, then sixteen draws of its read-out"))
    settings = {f"settings of {name}": repr(entry.method) for name, entry in comparison.entries.items()}
    claimed = {k: v for name, tasks in found.items() for k, v in tables.certified(name, tasks).items()}
    lines, columns = table(comparison, found)
    told = {"what came out": [*comparison.headline(), *comparison.advice()]} | notes(comparison, found)
    card(folder, "Comparison at equal NFE", {**asked, **settings}, lines, told, pictures, claimed, columns)
    return folder / "README.md"


def _curves(comparison: Comparison, folder: Path, asked: Mapping[str, Any]) -> Path:
    results = {name: entry.found for name, entry in comparison.ran.items()}
    return outputs.draw_curves(results, asked, folder / "reward.png")
