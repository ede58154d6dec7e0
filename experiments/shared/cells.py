"""Cells that run once: rows of a JSONL file.

A cell is one row: what was asked (bed, method, settings, budget, seed), what came out, what it cost, and where it ran.
A cell that is there is never run again, so an experiment that was stopped goes on where it was. What all cells of a
file have in common and no key tells, sizes and weights, is `asked` of each row: other settings want another file.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from treesearch.errors import StoreError

Row = dict[str, Any]
PACKAGES = ("treesearch", "torch", "numpy")


class Cells:
    """Rows of a JSONL file.

    Args:
        file: made where it is absent; part of a line at its end, which a kill leaves, is dropped.
        key: fields that identify a row.
        asked: settings that every row shares, written into it; None to read only.

    Raises:
        StoreError: the file is damaged before its end, is no such file, or has rows of other settings.
    """

    def __init__(self, file: Path, key: Sequence[str], asked: Row | None = None) -> None:
        self.file, self.key, self.asked = file, tuple(key), rounded(asked or {})
        self.rows = read(file) if file.exists() else []
        self._known = {self._of(row) for row in self.rows}
        if asked is not None:
            self._check()

    def _check(self) -> None:
        for row in self.rows:
            told = row.get("asked", {})
            for name in [name for name, value in self.asked.items() if told.get(name, value) != value][:1]:
                raise StoreError(
                    f"{self.file} has rows of {name} {told[name]}, not {self.asked[name]}: name another file with --out"
                )

    def _of(self, row: Mapping[str, Any]) -> str:
        return json.dumps([row.get(name) for name in self.key], sort_keys=True)

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self._of(row) in self._known

    def add(self, row: Row) -> None:
        """Write a row at once."""
        row = {name: rounded(value) for name, value in ({"asked": self.asked} | row if self.asked else row).items()}
        append(self.file, [row])
        self.rows.append(row)
        self._known.add(self._of(row))

    def where(self, **known: Any) -> list[Row]:
        """Rows with the given fields."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in known.items())]


def append(file: Path, rows: Sequence[Row]) -> None:
    """Add rows at once; part of a line at the end, which a kill leaves, is dropped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as opened:
        opened.truncate(_whole(file.read_bytes()))
        opened.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        opened.flush()
        os.fsync(opened.fileno())


def _whole(data: bytes) -> int:
    """Bytes of whole lines."""
    return data.rfind(b"\n") + 1


def read(file: Path) -> list[Row]:
    """Rows of a file.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        data = file.read_bytes()
        return [json.loads(line) for line in data[: _whole(data)].splitlines()]
    except OSError as error:
        raise StoreError(f"cannot read {file}: run the experiment first") from error
    except ValueError as error:
        raise StoreError(f"{file} is damaged: {error}") from error


def rounded(value: Any) -> Any:
    """Floats with six digits, None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one process.

    Raises:
        StoreError: another one has it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(f"{folder} is in use by another process: wait for it, or name another folder") from error
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from error
    with lock:
        yield


def where_it_ran() -> Row:
    """Machine class and versions, for every row."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"machine": machine, "versions": versions | {"python": platform.python_version()}}
