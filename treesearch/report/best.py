"""The best samples of a search as files, and an index of them beside them.

best.jsonl has a line a sample: file (or text), task, rank, reward, log_weight, prompt, seed, key, node. Samples are
decoded and written one at a time, so that memory is that of one of them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from treesearch.errors import StoreError
from treesearch.pictures import media
from treesearch.pictures.sheets import thumbnail
from treesearch.results.result import SearchResult, TaskResult
from treesearch.results.seen import Samples
from treesearch.runs.files import reading, subfolder, write_text
from treesearch.text import brief, plain

BEST = 8
NAMED = 3  # of them, on a terminal
INDEX = "best.jsonl"
INDEX_BYTES, FILE_BYTES = 2**26, 2**28  # that are read back, at most
_OURS = re.compile(r"task\d+_\d+\.(png|mp4|wav|npz)", re.ASCII)


def write_best(result: SearchResult, samples: list[Samples], folder: Path, k: int, *, fps: int) -> None:
    """Write the k best samples of each task, `task0_01.png` first, and their index; files of before give way.

    Raises:
        OSError: the folder is a link, or cannot be written.
    """
    folder, width, lines = subfolder(folder), len(str(k)), []
    digits = len(str(len(result.tasks) - 1))
    for i, known in enumerate(samples):
        for rank, row in enumerate(known.ranked(k).tolist(), 1):
            about = _about(known.task, i, row)
            stem = folder / f"task{i:0{digits}}_{rank:0{max(width, 2)}}"
            lines.append({**_written(known, row, stem, about, fps), "rank": rank, **about})
    write_text(folder / INDEX, "".join(json.dumps(_plain(line), default=str) + "\n" for line in lines))
    kept = {line.get("file") for line in lines}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def _written(known: Samples, row: int, stem: Path, about: dict[str, Any], fps: int) -> dict[str, str]:
    """What the index says of where a sample is."""
    kind, sample = known.decode(row)
    if kind == "text":
        return {"text": str(sample)}
    return {"file": media.write(sample, stem, kind, about, fps=fps, rate=known.rate).name}


def _about(task: TaskResult, number: int, row: int) -> dict[str, Any]:
    """What made a sample: with the kernel, enough to make it again."""
    node = int(task.leaves[row])
    return {
        "task": number,
        "reward": float(task.rewards[row]),
        "log_weight": float(task.log_weights[row]),
        "prompt": task.prompt,
        "seed": task.context.config["seed"],
        "key": f"{int(task.tree.key[node]):#018x}",
        "node": node,
    }


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """A line that is JSON: what is not finite is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def folder_of(run: Path) -> Path:
    """Where a run left its best samples.

    Raises:
        StoreError: a link leads out of the run folder, to what is not the run's.
    """
    folder = run / "outputs" / "best"
    inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_symlink()] if folder.is_dir() else []
    for part in (folder, *inside):
        if not part.resolve().is_relative_to(run.resolve()):
            raise StoreError(f"{part} leads out of the run folder through a link: the samples there are not shown")
    return folder


def pictures(folder: Path, task: int) -> dict[int, Any]:
    """Thumbnails (h, w) or (h, w, 3) of the best samples of a task by node, from what `write_best` left in a folder.

    Whatever is not as it was written is left out: a picture of a tree must not fail for want of thumbnails.
    """
    found = {node: picture(folder, task, node) for node in known(folder, task)}
    return {node: small for node, small in found.items() if small is not None}


def known(folder: Path, task: int) -> dict[int, dict[str, Any]]:
    """Lines of the index of a task's best samples by node; empty where there is none that can be read."""
    found: dict[int, dict[str, Any]] = {}
    for line in _index(folder / INDEX):
        if line.get("task") == task and isinstance(line.get("node"), int):
            found.setdefault(line["node"], line)
    return found


def picture(folder: Path, task: int, node: int) -> Any:
    """The thumbnail (h, w) or (h, w, 3) of one of the best samples; None where there is none that can be seen."""
    from PIL import Image

    try:
        line = known(folder, task).get(node, {})
        with reading(folder / _name(line), FILE_BYTES) as file, Image.open(file, formats=("PNG",)) as image:
            return np.asarray(thumbnail(image.convert("L" if image.mode == "L" else "RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def listed(folder: Path, k: int) -> list[dict[str, Any]]:
    """The best k samples of each task, from what `write_best` left in a folder: task, rank, reward, the text or the
    file's name.

    What is not as it was written is left out.
    """
    found = []
    for line in _index(folder / INDEX):
        rank, reward = line.get("rank"), line.get("reward")
        shown = line.get("text") if isinstance(line.get("text"), str) else line.get("file")
        if isinstance(rank, int) and rank <= k and isinstance(shown, str) and isinstance(line.get("task"), int):
            given = float(reward) if isinstance(reward, (int, float)) else None
            about = {"task": line["task"], "rank": rank, "reward": given}
            found.append(about | {"sample": shown, "text": "file" not in line})
    return found


def lines(found: list[dict[str, Any]]) -> list[str]:
    """What `listed` found for people, a line each."""
    many = len({line["task"] for line in found}) > 1
    where = [f"task {line['task']}  " if many else "" for line in found]
    rewards = ["-inf" if line["reward"] is None else f"{line['reward']:.4g}" for line in found]
    return [f"{a}{r:>9}  {plain(brief(line['sample']))}" for a, r, line in zip(where, rewards, found, strict=True)]


def _index(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with reading(path, INDEX_BYTES) as file:
            text = file.read().decode()
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError, RecursionError):
        return
    yield from (line for line in lines if isinstance(line, dict))


def _name(line: dict[str, Any]) -> str:
    """The name of a picture in the index.

    Raises:
        ValueError: it is none of ours, and may lead elsewhere.
    """
    name = line.get("file")
    if not isinstance(name, str) or not _OURS.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a sample")
    return name
