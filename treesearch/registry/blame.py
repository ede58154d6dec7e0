"""Where in a person's own files an error was raised: not in this library, in Python's, nor in an installed package."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / name) for name in ("treesearch", "backends", "rewards"))
_PYTHON = sysconfig.get_path("stdlib")
_FRAME = re.compile(r'^\s*File "([^"\n]+)", line (\d+), in (\S+)', re.MULTILINE)


def where(error: BaseException) -> str | None:
    """`file, line n, in function` of the innermost frame in a file of the user's own, None where there is none.

    An error that another one caused is looked into first; a worker's frames stand in its notes.
    """
    for link in reversed(list(_chain(error))):
        found = [f"{file}, line {line}, in {name}" for file, line, name in _frames(link) if _own(file)]
        if found:
            return found[-1]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _frames(error: BaseException) -> Iterator[tuple[str, int, str]]:
    """(file, line, function) of an error, outermost first; of a syntax error its own place last."""
    for note in getattr(error, "__notes__", ()):
        yield from ((file, int(line), name) for file, line, name in _FRAME.findall(note))
    for frame in traceback.extract_tb(error.__traceback__):
        yield frame.filename, frame.lineno or 0, frame.name
    if isinstance(error, SyntaxError) and error.filename:
        yield error.filename, error.lineno or 0, "<module>"


def _own(file: str) -> bool:
    outside = "site-packages" in file or "dist-packages" in file or file.startswith(_PYTHON)
    return not outside and not file.startswith(("<", *_OURS))
