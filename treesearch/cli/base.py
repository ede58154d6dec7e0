"""What all commands have; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from treesearch.errors import UsageError, unknown


@dataclass(frozen=True, kw_only=True)
class Command:
    """What all commands have."""

    debug: bool = False
    """show the traceback of an error"""


def pick(what: str, got: str, known: Iterable[str]) -> str:
    """Return `got` if it is known.

    Raises:
        UsageError: it is not; the message names the nearest.
    """
    if got not in (names := list(known)):
        raise UsageError(unknown(what, got, names))
    return got
