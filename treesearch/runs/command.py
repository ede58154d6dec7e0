"""What was typed to make a run's kernel and reward, where the command line made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treesearch.runs import files

COMMAND = "command.json"
COMMAND_BYTES = 2**20
LONGEST = 400  # characters of an expression that are shown


def shown(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Kernel and reward of a run for people: as they were typed; of runs from Python the names in run.json.

    Whatever is not as the command line writes it is left out: a list of runs must not fail for want of a name.
    """
    found: Any = None
    try:
        with files.reading(path / COMMAND, COMMAND_BYTES) as opened:
            found = json.loads(opened.read())
    except (OSError, ValueError, RecursionError):
        pass
    typed = found if isinstance(found, dict) else {}
    return {
        what: text[:LONGEST] if isinstance(text := typed.get(what), str) else config[what]
        for what in ("kernel", "reward")
    }
