"""The lock of a run folder: one process at a time writes to it."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import ClassVar

from treesearch import host
from treesearch.errors import StoreError
from treesearch.runs import files


class Lock:
    """The lock of a run folder, held by this process whichever thread lets go of it.

    Raises:
        StoreError: it is held already, or cannot be had here.
    """

    _held: ClassVar[set[str]] = set()
    _mutex = threading.Lock()

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self._name = os.path.realpath(path)
        self._lock = FileLock(path / "lock", thread_local=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where the system has no locks, a marker file takes their place
                self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(f"{path} is in use by {self._holder(path / 'lock')}") from error
        except (OSError, NotImplementedError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise StoreError(
                f"cannot lock {path}: {why}; a run is written where locks work and files may change: use a folder on "
                "a local disk, or copy the run to one"
            ) from error
        with self._mutex:
            self._held.add(self._name)

    def close(self) -> None:
        """Let go."""
        with self._mutex:
            self._held.discard(self._name)
        self._lock.release()

    def _holder(self, file: Path) -> str:
        """Who has it, and how to get it back."""
        with self._mutex:
            if self._name in self._held:
                return (
                    "this process: a search or stream of it is still open; let the stream run to its end, or call its "
                    "close()"
                )
        try:
            with files.reading(file, 1024) as marker:
                pid, machine, *_ = marker.read().decode().split("\n")
        except (OSError, ValueError):
            return "another process: wait for it, or stop it"
        return f"process {pid} of {machine}: wait for it, or stop it; if it is gone, remove {file}"


def held(path: Path) -> bool | None:
    """Whether somebody has a folder's lock, asked without writing; None where that cannot be known."""
    try:
        with files.reading(path / "lock") as file:
            return host.locked(file)
    except FileNotFoundError:
        return False
    except OSError:
        return None
