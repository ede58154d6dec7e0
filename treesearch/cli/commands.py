"""The commands: what their words are read into. One is loaded when it is typed, and torch with it if it computes."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import tyro

from treesearch import host
from treesearch.cli import front
from treesearch.errors import UsageError, unknown


def loaded(name: str) -> Any:
    """The class of a command."""
    module, attribute = front.COMMANDS[name].split(".")
    return getattr(importlib.import_module(f"treesearch.cli.{module}"), attribute)


def parse(argv: list[str], about: str | None) -> Any:
    """The command, or the exit code of a parser that has said everything.

    Raises:
        UsageError: no such command or method; the message names the nearest.
    """
    name = argv[0] if argv else ""
    try:
        if name == "run":
            from treesearch.cli import searches

            return searches.parse(argv[1:])
        if name in front.COMMANDS:
            return tyro.cli(loaded(name), args=argv[1:], prog=f"treesearch {name}", config=front.STYLE)
        if name and not name.startswith("-"):
            raise UsageError(unknown("command", name, front.COMMANDS))
        return tyro.cli(_all(), args=argv, prog="treesearch", description=about, config=front.STYLE)
    except SystemExit as stop:
        return 2 if isinstance(stop.code, str) else stop.code or 0


def leave_busy_cores_alone() -> None:
    """Use as many threads as cores are idle: two threads that wait for a busy core are slower than one alone."""
    torch = sys.modules.get("torch")  # of a command that computes nothing there is none
    if torch is not None and "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        idle = (os.cpu_count() or 1) - round(os.getloadavg()[0])
        torch.set_num_threads(max(1, min(torch.get_num_threads(), idle, host.cores())))


def _all() -> Any:
    from treesearch.cli import searches

    return front.union({name: loaded(name) for name in front.COMMANDS} | {"run": searches.Run})
