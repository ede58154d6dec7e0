"""A result as files for programs, written as its samples are decoded.

    samples.csv       a row a sample: the columns of `to_table`, and where the sample is: a file and its row, or a text
    task0.npy         samples (n, ...) of a task in order of creation, where its kernel makes arrays
    task0/000000.png  else a file each, of its kind
    result.json       what was asked, figures and certificate of each task, cost, one record a wave

Samples are decoded some at a time and let go of: memory is that of BYTES of them, whatever their size and number.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from treesearch.errors import StoreError, writing
from treesearch.pictures import media
from treesearch.results.columns import columns
from treesearch.results.summary import summary
from treesearch.runs import schema
from treesearch.runs.files import reading, replacing, subfolder, write_json
from treesearch.runs.log import COST, TASKS
from treesearch.runs.schema import maybe, number, plain, record, several, text, whole

if TYPE_CHECKING:
    from treesearch.results.result import SearchResult, TaskResult

BYTES, ROWS = 2**25, 1024  # of samples that are decoded together, at most
ASKED = ("method", "kernel", "reward", "seed", "budget", "num_steps", "versions")
RESULT_BYTES = 2**28
_TASK = {"samples": whole(), "roots": whole(), "warnings": several(text()), "certificate": record({}, rest=plain(8))}
_FIGURES = ("best", "mean", "log_z", "log_z_se", "ess")
SAVED = record(
    {
        "asked": record({name: plain(8) for name in ASKED} | {"method": record({"name": text(200)}, rest=plain(4))}),
        "tasks": several(record(_TASK | {name: maybe(number()) for name in _FIGURES}, rest=plain(16)), 1, TASKS),
        "cost": COST,
        "history": plain(8),
    }
)
Place = tuple[str, int | None, str]  # file, row in it, text


def save(result: SearchResult, folder: str | os.PathLike[str]) -> Path:
    """Write a result into a folder; files of the same names give way.

    Raises:
        StoreError: the folder cannot be written, or this result cannot decode its samples.
        ValueError: no folder is named.
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ValueError(f"save({folder!r}): name a folder to write into, such as 'found'")
    path = Path(folder)
    with writing(path, "{mend} and save the result again"):
        subfolder(path)
        with replacing(path / "samples.csv") as scratch, open(scratch, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            for i, task in enumerate(result.tasks):
                known = columns([task]) | {"task": np.full(len(task.leaves), i)}
                if i == 0:
                    table.writerow([*known, "file", "row", "text"])
                places = _write_samples(task, path / f"task{i}")
                for *cells, place in zip(*map(_cells, known.values()), places, strict=True):
                    table.writerow([*cells, *place])
        config = result.tasks[0].context.config
        found = {"asked": {name: config[name] for name in ASKED}, "tasks": summary(result)}
        write_json(path / "result.json", found | {"cost": result.cost.as_dict(), "history": result.history})
    return path


def read_saved(folder: Path) -> dict[str, Any]:
    """result.json of a folder that `save` wrote.

    Raises:
        StoreError: there is none, or it is no such thing.
    """
    file = folder / "result.json"
    try:
        with reading(file, RESULT_BYTES) as opened:
            found = schema.parse(opened.read(), "it")
        SAVED(found, "it")
    except OSError as error:
        raise StoreError(f"{folder} holds no saved result ({error.strerror}): name a folder of result.save") from error
    except schema.Invalid as error:
        raise StoreError(f"{file} was not written by result.save: {error}") from error
    return found


def _cells(column: Any) -> list[Any]:
    """A column as CSV has it: numbers read back exactly; prompts that are no text as JSON."""
    if isinstance(column, np.ndarray):
        return column.tolist()
    return [cell if isinstance(cell, str) else json.dumps(cell, default=str) for cell in column]


def _write_samples(task: TaskResult, stem: Path) -> Iterator[Place]:
    """Write a task's samples, and where each is once it is written."""
    with ExitStack() as closing:
        file = None
        for first, samples in _decoded(task):
            if not isinstance(samples, Tensor):
                yield from (_write_one(sample, stem, first + i) for i, sample in enumerate(samples))
                continue
            array = np.ascontiguousarray(media.as_array(samples))
            if file is None:
                target = stem.with_name(stem.name + ".npy")
                file = closing.enter_context(open(closing.enter_context(replacing(target)), "wb"))
                head = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False}
                np.lib.format.write_array_header_2_0(file, head | {"shape": (len(task.leaves), *array.shape[1:])})
            file.write(array.data)
            yield from ((f"{stem.name}.npy", first + i, "") for i in range(len(array)))


def _write_one(sample: Any, folder: Path, row: int) -> Place:
    kind = media.kind_of(sample)
    if kind == "text":
        return "", None, str(sample)
    path = media.write(sample, subfolder(folder) / f"{row:06}", kind, {}, rate=None)
    return f"{folder.name}/{path.name}", None, ""


def _decoded(task: TaskResult) -> Iterator[tuple[int, Any]]:
    """Samples in order, some at a time, each with the number of the first: one, then as many as BYTES holds."""
    at, size = 0, 1
    while at < len(task.leaves):
        samples = task.pick(np.arange(at, min(at + size, len(task.leaves))))
        yield at, samples
        at += len(samples)
        size = max(1, min(ROWS, BYTES // max(1, _size(samples))))


def _size(samples: Sequence[Any]) -> int:
    """Bytes of a sample."""
    sample = samples[0]
    if hasattr(sample, "getbands"):
        return sample.width * sample.height * len(sample.getbands())
    return sample.nbytes if isinstance(sample, (Tensor, np.ndarray)) else 1
