"""Errors that say what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TreeSearchError(Exception):
    """Base of the errors this library raises on purpose."""


class UsageError(TreeSearchError, ValueError):
    """Something typed that cannot be read: a number, an option, a name, an expression."""


class BudgetError(TreeSearchError, ValueError):
    """A budget too small for one unit of the method, or none at all."""


class KernelError(TreeSearchError, ValueError):
    """A kernel broke its contract."""


class StoreError(TreeSearchError):
    """A run folder that cannot be used as asked."""


class WorkerError(TreeSearchError):
    """Workers could not do the work: what failed, how often, and with which inputs."""


def ended(error: BaseException) -> Exception:
    """The error itself; as a KernelError if it would end the process that it is raised in."""
    if isinstance(error, Exception):
        return error
    made = KernelError(f"a kernel or a reward raised {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


GO_ON = "the waves recorded so far are safe, {mend} and resume the run"
SHOWN = 24  # names that a message lists


def unknown(what: str, got: Any, known: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest known one, and all of them where they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(str(got), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = known if len(known) <= SHOWN else sorted(difflib.get_close_matches(str(got), known, n=SHOWN, cutoff=0))
    more = f" and {len(known) - len(shown)} more" if len(shown) < len(known) else ""
    return f"unknown {what} {got!r}{hint} (known: {', '.join(shown)}{more})"


def choose(what: str, got: Any, known: Iterable[str]) -> str:
    """Return `got` if it is known.

    Raises:
        ValueError: it is not; the message names the nearest.
    """
    if got not in (names := list(known)):
        raise ValueError(unknown(what, got, names))
    return got


def missing(package: str, extra: str) -> ImportError:
    """Error for an optional library, with the line that installs it."""
    return ImportError(f"this needs {package}: pip install 'treesearch[{extra}]'")


@contextmanager
def writing(path: Path, then: str) -> Iterator[None]:
    """Turns an OSError into a StoreError; `then` says what to do, `{mend}` how it can be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
        what = path if error.filename is None else os.fsdecode(error.filename)
        mend = "make room" if full else "mend that"
        raise StoreError(f"cannot write to {what}: {error.strerror}; {then.format(mend=mend)}") from error
