"""Exceptions as they travel between processes, and as the driver tells of them."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any

from ray.exceptions import RayError, RayTaskError

from treesearch.errors import WorkerError, ended


@dataclass(frozen=True)
class Raised:
    """An exception as it travels: pickled, and in words for those that are no longer themselves on the other side."""

    text: str
    note: str
    pickled: bytes | None

    @staticmethod
    def of(error: BaseException) -> Raised:
        """With the traceback that only its own process knows."""
        error = ended(error)  # SystemExit and KeyboardInterrupt are meant for the process that they are raised in
        text = "".join(traceback.format_exception_only(error)).strip()
        note = "on a worker:\n" + "".join(traceback.format_exception(error)[:-1]).rstrip()
        return Raised(text, note, _pickled(error))

    def error(self) -> Exception:
        """What the driver raises: the exception itself where it survived, otherwise a `WorkerError` that names it."""
        error: Any = WorkerError(self.text)
        if self.pickled is not None:
            with suppress(Exception):  # of a module that is not here
                error = pickle.loads(self.pickled)
        error.add_note(self.note)
        return error


def _pickled(error: Exception) -> bytes | None:
    """Bytes that give the same exception again, None where there are none."""
    with suppress(Exception):
        data = pickle.dumps(error)
        again = pickle.loads(data)
        return data if type(again) is type(error) and str(again) == str(error) else None
    return None


def answering(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a process that answers with `Raised` in place of raising; what Ray raises is Ray's to carry."""

    @wraps(method)
    def answer(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except RayError:
            raise
        except BaseException as error:
            return Raised.of(error)

    return answer


def pickling(error: Exception) -> str:
    """What cannot be pickled, without Ray's inspection of it."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [
        line[line.lower().index("can") :] for line in lines if "can't pickle" in line.lower().replace("cannot", "can't")
    ]
    return (said or lines or [type(error).__name__])[0]


def brief(error: Exception | None) -> str:
    """The first line of an error: Ray's go on about the system."""
    return str(error).partition("\n")[0]


def cause_of(error: RayTaskError) -> Exception:
    """What was raised on the worker, with its remote traceback as a note."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
    if cause is not error:
        cause.add_note(f"on a worker:\n{error.traceback_str}" if hasattr(error, "traceback_str") else str(error))
    return cause
