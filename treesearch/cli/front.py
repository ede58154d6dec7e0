"""Which commands there are, and what is said of them without loading them: torch alone takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import make_dataclass
from importlib.abc import InspectLoader
from typing import Annotated, Any, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from treesearch.report.terminal import say
from treesearch.version import __version__

COMMANDS = {
    "run": "run.Run",
    "resume": "run.Resume",
    "edit": "edit.Edit",
    "ls": "ls.Ls",
    "show": "show.Show",
    "plot": "show.Plot",
    "serve": "serve.Serve",
    "export": "export.Export",
    "compare": "compare.Compare",
    "plan": "plan.Plan",
    "steer": "steer.Steer",
    "diagnose": "diagnose.Diagnose",
    "bench": "bench.Bench",
    "list": "names.Names",
    "env": "about.Env",
    "cite": "about.Cite",
}
STYLE = (CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes)


def answered(argv: Sequence[str], about: str | None) -> bool:
    """Whether that was `--version` or `--help`: the commands, each in the words of its class."""
    if list(argv) == ["--version"]:
        say(f"treesearch {__version__}")
        return True
    if list(argv) not in (["--help"], ["-h"]):
        return False
    shells = {name: make_dataclass(name, [], namespace={"__doc__": _words(at)}) for name, at in COMMANDS.items()}
    with suppress(SystemExit):
        tyro.cli(union(shells), args=argv, prog="treesearch", description=about, config=STYLE)
    return True


def union(classes: Mapping[str, type]) -> Any:
    """One of the classes, each by its name."""
    return Union[tuple(Annotated[c, subcommand(name)] for name, c in classes.items())]  # noqa: UP007 - from a table


def _words(at: str) -> str:
    """The docstring of a class, read from its source."""
    module, name = at.split(".")
    found = importlib.util.find_spec(f"treesearch.cli.{module}")
    assert found is not None
    assert isinstance(found.loader, InspectLoader)
    for node in ast.parse(found.loader.get_source(found.name) or "").body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
    raise LookupError(at)
