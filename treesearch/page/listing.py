"""The runs below a folder, for the list: from run.json and the last line of events.jsonl, which costs little."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from treesearch.errors import StoreError
from treesearch.runs import files, schema
from treesearch.runs.command import shown
from treesearch.runs.config import read_config
from treesearch.runs.reading import status
from treesearch.runs.schema import maybe, number, record, whole

_TAIL = 2**16  # bytes of events.jsonl in which its last line is looked for
_MOST = sys.float_info.max
_LAST = record({"nfe": whole(), "best_reward": maybe(number(-_MOST, _MOST))}, rest=schema.plain(8))


def folders(root: Path) -> dict[str, Path]:
    """Run folders by their name below `root`; `root` itself is `.`."""
    found = sorted(path.parent for path in root.rglob("run.json"))
    return {path.relative_to(root).as_posix(): path for path in found}


def listed(root: Path) -> list[dict[str, Any]]:
    """A line a run, the newest first; of one that cannot be read its error."""
    lines = [_line(name, path) for name, path in folders(root).items()]
    return sorted(lines, key=lambda line: line["changed"], reverse=True)


def _line(name: str, path: Path) -> dict[str, Any]:
    try:
        config = read_config(path)
    except StoreError as error:
        return {"run": name, "error": str(error), "changed": _changed(path / "run.json")}
    last = _last_event(path / "events.jsonl")
    return {
        "run": name,
        "method": config["method"]["name"],
        **shown(path, config),
        "status": status(path, config),
        "tasks": len(config["prompts"] or [None]),
        "created": config["created"],
        "nfe": last.get("nfe", 0),
        "limit": config["budget"]["nfe"],
        "best": last.get("best_reward"),
        "changed": _changed(path / "events.jsonl"),
    }


def _changed(file: Path) -> float:
    try:
        return os.stat(file).st_mtime
    except OSError:
        return 0.0


def _last_event(path: Path) -> dict[str, Any]:
    """The last wave's record; empty where there is none that can be read."""
    try:
        with files.reading(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read(_TAIL).splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
            _LAST(found, "an event")
        except (ValueError, RecursionError):
            continue
        return found
    return {}
