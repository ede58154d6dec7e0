"""The commands: what their words are read into."""

from __future__ import annotations

import importlib
import os
from dataclasses import field, make_dataclass
from typing import Any

import torch
import tyro

from treesearch import host
from treesearch.cli import config, front, run
from treesearch.errors import UsageError, unknown
from treesearch.methods import METHODS as CLASSES
from treesearch.registry.registry import METHOD_NAMES

METHODS = {name.replace("_", "-"): CLASSES[path] for name, path in METHOD_NAMES.items()}
SUBCOMMANDS = {"advised": run.Advised} | METHODS
Run = make_dataclass(
    "Run",
    [("method", front.union(SUBCOMMANDS), field(default=run.Advised(), kw_only=True))],
    bases=(run.Run,),
    frozen=True,
    kw_only=True,
    namespace={"__doc__": run.Run.__doc__},
)


def _loaded(at: str) -> Any:
    module, name = at.split(".")
    return getattr(importlib.import_module(f"treesearch.cli.{module}"), name)


COMMANDS = {name: _loaded(at) for name, at in front.COMMANDS.items()} | {"run": Run}


def parse(argv: list[str], about: str | None) -> Any:
    """The command, or the exit code of a parser that has said everything."""
    try:
        argv = _spelt(argv)
        if argv[:1] == ["run"] and (file := config.file_of(argv)):
            return _configured(argv[1:], config.read(file, Run()))
        if argv[:1] and argv[0] in COMMANDS:
            return tyro.cli(COMMANDS[argv[0]], args=argv[1:], prog=f"treesearch {argv[0]}", config=front.STYLE)
        return tyro.cli(front.union(COMMANDS), args=argv, prog="treesearch", description=about, config=front.STYLE)
    except SystemExit as stop:
        return 2 if isinstance(stop.code, str) else stop.code or 0


def _configured(words: list[str], begun: run.Run) -> Any:
    """The command of words over those of a file; the file's method is named, so that its settings can be typed."""
    if not words or words[0] not in SUBCOMMANDS:
        words = [next(name for name, cls in SUBCOMMANDS.items() if isinstance(begun.method, cls)), *words]
    return tyro.cli(Run, args=words, prog="treesearch run", default=begun, config=front.STYLE)


def leave_busy_cores_alone() -> None:
    """Use as many threads as cores are idle: two threads that wait for a busy core are slower than one alone."""
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        idle = (os.cpu_count() or 1) - round(os.getloadavg()[0])
        torch.set_num_threads(max(1, min(torch.get_num_threads(), idle, host.cores())))


def _spelt(argv: list[str]) -> list[str]:
    """The words with the method as the parser spells it: dts_star and DiffusionTreeSearch are dts-star.

    Raises:
        UsageError: no such command or method; the message names the nearest.
    """
    words = [a for a in argv if not a.startswith("-")]
    if words and words[0] not in COMMANDS and argv[0] == words[0]:
        raise UsageError(unknown("command", words[0], COMMANDS))
    if argv[:1] != ["run"] or len(argv) < 2 or argv[1].startswith("-"):
        return argv
    classes = {method.__name__: name for name, method in METHODS.items()}
    method = classes.get(argv[1], argv[1].replace("_", "-"))
    if method not in SUBCOMMANDS:
        raise UsageError(unknown("method", argv[1], SUBCOMMANDS))
    return ["run", method, *argv[2:]]
