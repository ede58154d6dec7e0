"""`ls`: the runs of a folder. It needs no torch, and runs no code that they name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from treesearch.cli.base import Command
from treesearch.errors import TreeSearchError
from treesearch.report import tables as report
from treesearch.report.terminal import say
from treesearch.runs import reading
from treesearch.runs.config import read_config


@dataclass(frozen=True, kw_only=True)
class Ls(Command):
    """List runs."""

    folder: Positional[str] = "runs"
    json: bool = False
    """print JSON"""

    def run(self) -> int:
        found = sorted(p.parent for p in Path(self.folder).rglob("run.json"))
        listed = [self._line(path) for path in found]
        if self.json:
            say(json.dumps(listed, indent=2))
        elif listed:
            rows = [[report.DASH if v is None else str(v) for v in run.values()] for run in listed]
            report.print_table(rows, ("run", "method", "status", "NFE", "best"))
        else:
            say(f"no runs under {self.folder}")
        return 0

    @staticmethod
    def _line(path: Path) -> dict[str, Any]:
        """A run's line; of one that cannot be read its error, so that it hides none of the others."""
        try:
            config = read_config(path)
            blocks, _ = reading.read_log(path, config)
            last = blocks[-1].meta["history"] if blocks else None
            best = last["best_reward"] if last else None
            return {
                "run": str(path),
                "method": config["method"]["name"],
                "status": reading.status(path, config),
                "nfe": last["nfe"] if last else 0,
                "best": None if best is None else round(best, 3),
            }
        except Exception as error:
            return {"run": str(path), "method": None, "status": _brief(error), "nfe": None, "best": None}


def _brief(error: Exception) -> str:
    """An error in a table's cell."""
    return str(error) if isinstance(error, TreeSearchError) else f"{type(error).__name__}: {error}"
