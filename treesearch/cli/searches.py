"""`run` with each method as a word of its own, whose settings are options."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Any

import tyro

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


def parse(words: list[str]) -> Any:
    """The command of words; those of a file stand below what is typed.

    Raises:
        UsageError: no such method; the message names the nearest.
    """
    words, begun = _spelt(words), None
    if file := config.file_of(words):
        begun = config.under(config.read(file, Run()), words)
        if not words or words[0] not in SUBCOMMANDS:  # its method is named, so that its settings can be typed
            words = [next(name for name, cls in SUBCOMMANDS.items() if isinstance(begun.method, cls)), *words]
    return tyro.cli(Run, args=words, prog="treesearch run", default=begun, config=front.STYLE)


def _spelt(words: list[str]) -> list[str]:
    """The words with the method as the parser spells it: dts_star and DiffusionTreeSearch are dts-star."""
    if not words or words[0].startswith("-"):
        return words
    classes = {method.__name__: name for name, method in METHODS.items()}
    method = classes.get(words[0], words[0].replace("_", "-"))
    if method not in SUBCOMMANDS:
        raise UsageError(unknown("method", words[0], SUBCOMMANDS))
    return [method, *words[1:]]
