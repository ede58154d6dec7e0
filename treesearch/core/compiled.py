"""Compiled loops, kept from one process to the next where there is a folder for them.

numba looks into NUMBA_CACHE_DIR, beside the source and into the user's cache folder. Where none of them can be written
(an installation of another user, a read-only home), and where a kept file cannot be read or written later (a full
disk, a cut file), functions are compiled in every process that calls them: seconds at their first call, equal numbers.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

log = logging.getLogger("treesearch")
# What files raise that cannot be read, or that are no caches.
_DAMAGED = (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError)


class _Cache(FunctionCache):
    """numba's, of which a file that fails costs a compilation and not the search."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except _DAMAGED as error:
            log.debug("%s: kept code cannot be read (%s), it is compiled again", self.cache_path, error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except _DAMAGED as error:
            log.debug("%s: compiled code cannot be kept (%s)", self.cache_path, error)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A decorator: `numba.njit`, kept where that is possible.

    Args:
        function: what to compile; None with options, as `@compiled(inline="always")`.
        options: of `numba.njit`.
    """
    if function is None:
        return lambda of: compiled(of, **options)
    made: Any = njit(**options)(function)
    try:
        made._cache = _Cache(function)
    except RuntimeError as error:  # numba found no folder
        log.debug("%s", error)
    return made


def kept_in(function: Any) -> str | None:
    """The folder that keeps a compiled function, None where each process compiles it."""
    return function.stats.cache_path


def kept(function: Any) -> bool:
    """Whether an earlier process left the code of a compiled function; else its first call takes seconds.

    True where numba compiles nothing (NUMBA_DISABLE_JIT).
    """
    if not hasattr(function, "signatures"):
        return True
    try:
        return bool(function.signatures or function._cache._cache_file._load_index())
    except (AttributeError, *_DAMAGED):
        return False
