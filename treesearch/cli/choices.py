"""Choices that an argument of a method names: what each is, by the table in the head of the module that has it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from treesearch.core import backup, resampling, selection
from treesearch.methods import METHODS
from treesearch.registry import registry as specs
from treesearch.rewards.potentials import POTENTIALS


class Choices(NamedTuple):
    """What an argument chooses from."""

    argument: str
    names: Iterable[str]
    module: str


CHOICES = {
    "potentials": Choices("potential", POTENTIALS, "treesearch.rewards.potentials"),
    "resampling": Choices("resampling", resampling.SCHEMES, resampling.__name__),
    "selection": Choices("selection", selection.RULES, selection.__name__),
    "backups": Choices("backup", backup.RULES, backup.__name__),
}


def listed(kind: str) -> list[str]:
    """A line a choice."""
    found = CHOICES[kind]
    return [f"{name:<14}{_told(found, name)}".rstrip() for name in found.names]


def lines_of(name: str) -> list[str]:
    """What every choice of this name is, and the methods that take it; none where there is no such choice."""
    return [line for found in CHOICES.values() if name in found.names for line in _lines(found, name)]


def _lines(found: Choices, name: str) -> list[str]:
    takers = [
        short
        for short, cls in specs.METHOD_NAMES.items()
        if found.argument in inspect.signature(METHODS[cls]).parameters
    ]
    typed = [f"  {short}({found.argument}={name!r})" for short in takers]
    return [f"{name}   {found.argument}", _told(found, name), *typed]


def _told(found: Choices, name: str) -> str:
    """Its line in the module's table."""
    line = re.search(rf"^ +{name} +(\S.*)$", sys.modules[found.module].__doc__ or "", re.MULTILINE)
    return "" if line is None else re.sub(" {2,}", "   ", line[1])
