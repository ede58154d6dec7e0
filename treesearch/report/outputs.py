"""What a search leaves in a folder for people, one call for the command line and for Python alike.

summary.json          figures of each task
outputs/best/         the best samples as files, and best.jsonl
outputs/task0.png     contact sheet of each task: the best, and draws of the estimate of π; of texts task0.md
outputs/best.png      of several tasks: the best of each
outputs/reward.png    best reward against NFE
README.md             the card
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treesearch.errors import writing
from treesearch.pictures import media
from treesearch.pictures.sheets import Block, draw_sheet
from treesearch.report import plots, tables, texts
from treesearch.report.best import BEST, write_best
from treesearch.report.card import card
from treesearch.results.result import SearchResult, TaskResult
from treesearch.results.seen import Samples
from treesearch.results.summary import summary
from treesearch.runs.files import subfolder, write_json

PICTURED = 32  # samples on a contact sheet
SHOWN = 8  # contact sheets on a card
CAPTION, CURVE = "the best sixteen, then sixteen draws (of a greedy search: of its samples)", "best reward against NFE"


def write_outputs(
    result: SearchResult,
    folder: str | Path,
    *,
    name: str | None = None,
    asked: Mapping[str, Any] | None = None,
    best: int = BEST,
    fps: int = media.FPS,
    rate: int | None = None,
) -> Path:
    """Write summary.json, outputs/ and the card README.md of a search into a folder.

    Samples are decoded one at a time: memory is that of one of them, whatever their size and number.

    Args:
        result: of a search, or what there is of it so far.
        folder: of its run, or any other; made if it is not there.
        name: of the method, by default its class.
        asked: kernel and reward as a reader would name them; by default what the objects are called.
        best: samples of each task that become files.
        fps: frames a second of videos.
        rate: samples a second, where arrays (samples,) or (channels, samples) are audio.

    Returns:
        The card.

    Raises:
        StoreError: the folder cannot be written, a folder in it is a link, or this result cannot decode its samples.
    """
    folder = Path(folder)
    with writing(folder, "{mend} and write the outputs again"):
        samples = [Samples(task, rate) for task in result.tasks]
        _write(result, samples, folder, name or type(result.tasks[0].context.method).__name__, asked, best, fps)
    return folder / "README.md"


def _write(
    result: SearchResult,
    samples: list[Samples],
    folder: Path,
    name: str,
    asked: Mapping[str, Any] | None,
    best: int,
    fps: int,
) -> None:
    context = result.tasks[0].context
    outputs = subfolder(folder / "outputs")
    told = dict(asked or {key: context.config[key] for key in ("kernel", "reward")})
    found = summary(result)
    write_json(folder / "summary.json", {"tasks": found, "cost": result.cost.as_dict()})
    write_best(result, samples, outputs / "best", best, fps=fps)
    pictures = _sheets(samples, outputs)
    pictures += if_plots(lambda: draw_curves({name: result}, told, outputs / "reward.png"), CURVE, "outputs/")
    told |= {"method": repr(context.method), "seed": context.config["seed"]}
    notes = {name: tables.notes(found, result.cost)}
    lines, claimed = tables.rows(name, found, result.cost), tables.certified(name, found)
    card(folder, f"{name} run", told, lines, notes, pictures, claimed, texts=_texts(samples, outputs))


def _texts(samples: list[Samples], outputs: Path) -> list[tuple[str, str]]:
    """Pages of tasks whose samples are texts; for the card the best of each: (heading, table)."""
    found = []
    for i, known in enumerate(samples):
        if texts.are_texts(known):
            texts.sheet(known, outputs / f"task{i}.md")
            prompt = "" if known.task.prompt is None else f": {known.task.prompt}"
            found.append((f"Task {i}{prompt}", texts.table(known, known.ranked(texts.FEW).tolist())))
    return found[:SHOWN]


def draw_curves(results: Mapping[str, SearchResult], told: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG of the best reward of each search against NFE; `told` names their kernel and reward."""
    curves = {name: [plots.curve(result.history)] for name, result in results.items()}
    return plots.draw_curves(curves, path, title=f"{told['kernel']}", ylabel=f"best reward: {told['reward']}")


def _sheets(samples: list[Samples], outputs: Path) -> list[tuple[str, str]]:
    """Contact sheets of all tasks, and of several tasks one of the best of each; (file, caption) for the card."""
    pictures = []
    if len(samples) > 1 and (
        cells := [cell for known in samples[:PICTURED] for cell in known.cells(known.ranked(1), prompted=True)]
    ):
        draw_sheet([Block("the best of each task", cells)], outputs / "best.png")
        pictures.append(("outputs/best.png", "the best of each task"))
    for i, known in enumerate(samples):
        if _sheet(known, outputs / f"task{i}.png") is not None:
            pictures.append((f"outputs/task{i}.png", CAPTION))
    return pictures[:SHOWN]


def contact_sheet(task: TaskResult, path: Path) -> Path | None:
    """The best sixteen samples above sixteen draws, with their rewards; None where they cannot be seen."""
    return _sheet(Samples(task), path)


def _sheet(samples: Samples, path: Path) -> Path | None:
    task, half = samples.task, PICTURED // 2
    if not (cells := samples.cells(samples.ranked(half))):
        return None
    blocks = [Block(f"the best {len(cells)} of {len(task.leaves):,} samples, with their rewards", cells)]
    if np.isfinite(task.readout.log_weights.max()):
        drawn = samples.cells(task.draw_rows(half))
        what = "of its samples, chosen at random" if task.log_z is None else "draws of the read-out"
        blocks.append(Block(f"{half} {what}", drawn))
    return draw_sheet(blocks, path, "" if task.prompt is None else f"{task.prompt}")


def if_plots(draw: Callable[[], Path], caption: str, prefix: str = "") -> list[tuple[str, str]]:
    """Draw if matplotlib is there; a search must not fail for want of a picture."""
    try:
        return [(prefix + draw().name, caption)]
    except ImportError:
        return []
