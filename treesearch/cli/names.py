"""`list`: what there is by name, and what each of it takes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tyro.conf import Positional

from treesearch import backends, rewards
from treesearch.cli.base import Command, pick
from treesearch.cli.choices import CHOICES, lines_of, listed
from treesearch.methods import METHODS
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.report.terminal import say

NAMES: dict[str, Iterable[str]] = {
    "kernels": specs.KERNELS,
    "rewards": specs.REWARDS,
    "operators": specs.OPERATORS,
    "methods": specs.METHOD_NAMES,
    **{kind: found.names for kind, found in CHOICES.items()},
}
LONGEST = 50  # letters of a default
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
_AS_IN = re.compile(r"(?:as in|see) `(?:\w+\.)*(\w+)`")


@dataclass(frozen=True, kw_only=True)
class Names(Command):
    """Kernels, rewards, operators, methods, their choices; `list NAME` tells what one takes, with an example."""

    what: Positional[str | None] = None
    """kernels, rewards, operators, methods, potentials, resampling, selection, backups, or the name of a kernel, a
    guide, a reward, an operator, a method or a choice; by default all names"""

    def run(self) -> int:
        if self.what is None:
            say("\n".join(f"{what:<12}{', '.join(found)}" for what, found in NAMES.items()))
        elif self.what == "rewards":
            _print_rewards()
        elif self.what in CHOICES:
            say("\n".join(listed(self.what)))
        elif self.what in NAMES:
            say("\n".join(NAMES[self.what]))
        else:
            say("\n".join(lines_of(self.what) or _lines(named(self.what))))
        return 0


class Named(NamedTuple):
    """What a name stands for."""

    kind: str
    name: str
    factory: Any
    examples: dict[str, str]  # by where they are typed


def named(text: str) -> Named:
    """What a name stands for, spelt as on the command line or as in Python.

    Raises:
        UsageError: nothing; the message names the nearest.
    """
    tables = (specs.KERNELS, specs.REWARDS, specs.OPERATORS, specs.METHOD_NAMES)
    spelt = {path.rpartition(":")[2].rpartition(".")[2]: name for table in tables for name, path in table.items()}
    known = [name for table in tables for name in table]
    name = text if text in known else spelt.get(text, text.replace("-", "_"))
    pick("name", name, [*NAMES, *known, *(choice for found in CHOICES.values() for choice in found.names)])
    if name in specs.METHOD_NAMES:
        return _method(name)
    if name in specs.OPERATORS:
        return _operator(name)
    return _kernel(name) if name in specs.KERNELS else _reward(name)


def _method(name: str) -> Named:
    factory = METHODS[specs.METHOD_NAMES[name]]
    typed = f"treesearch run {name.replace('_', '-')} --nfe 10k"
    python = f"ts.search(kernel, reward, ts.{factory.__name__}(), budget=ts.Budget(nfe=10_000))"
    return Named("method", name, factory, {"example": typed, "in Python": python})


def _kernel(name: str) -> Named:
    factory, example = expressions.load(specs.KERNELS[name]), backends.KERNELS[name][1]
    taken = inspect.signature(factory).parameters
    kind = "guide" if "kernel" in taken else "kernel"
    if name == "lacon" or "reward" in taken:
        own = " --reward kernel"
    else:
        own = ' --reward "text_length(12)"' if specs.writes(example) else ""
    return Named(kind, name, factory, _typed("kernel", example, own) | _imported("backends", name))


def _reward(name: str) -> Named:
    factory, example = expressions.load(specs.REWARDS[name]), rewards.REWARDS[name][1]
    return Named("reward", name, factory, _typed("reward", example) | _imported("rewards", name))


def _operator(name: str) -> Named:
    factory, example = expressions.load(specs.OPERATORS[name]), rewards.OPERATORS[name][1]
    seen = f"measurement({example}, 'observed.npy', tolerance=0.2)"
    return Named("operator", name, factory, _typed("reward", seen) | _imported("rewards", name))


def _typed(option: str, example: str, more: str = "") -> dict[str, str]:
    return {"example": f'treesearch run --{option} "{example}"{more}'}


def _imported(package: str, name: str) -> dict[str, str]:
    return {"in Python": f"from treesearch.{package} import {name}"}


def _lines(found: Named) -> list[str]:
    """Signature, what it is, an argument a line, what is known of a reward, examples."""
    parameters = inspect.signature(found.factory).parameters
    told = described(found.factory)
    arguments = [f"  {_argument(p):<28} {told.get(p.name) or p.annotation}" for p in parameters.values()]
    facts = [f"  {line}" for line in _facts(found.factory)]
    examples = [f"{where:<10} {text}" for where, text in found.examples.items()]
    heading = f"{found.name}({', '.join(parameters)})"
    parts = ([f"{heading}   {found.kind}", _first_line(found.factory)], arguments, facts, examples)
    return "\n\n".join("\n".join(part) for part in parts if part).split("\n")


def _argument(parameter: inspect.Parameter) -> str:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return f"**{parameter.name}"
    if parameter.default is parameter.empty:
        return parameter.name
    shown = getattr(parameter.default, "__name__", None) or repr(parameter.default)
    return f"{parameter.name}={shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + '…'}"


def _first_line(factory: Any) -> str:
    return (factory.__doc__ or "").strip().split("\n")[0]


def described(factory: Any) -> dict[str, str]:
    """What a docstring says under `Args`, by argument; "as in `Other`" and "see `Other`" are looked up there."""
    lines = inspect.cleandoc(factory.__doc__ or "").split("\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else ():
        if not line.startswith("    "):
            break
        entry = _ENTRY.fullmatch(line[4:])
        names = entry[1].split(", ") if entry else names
        found |= {name: entry[2] if entry else f"{found[name]} {line.strip()}" for name in names}
    return {name: _elsewhere(factory, name, text) for name, text in found.items()}


def _elsewhere(factory: Any, name: str, text: str) -> str:
    place = _AS_IN.fullmatch(text.rstrip("."))
    other = place and getattr(sys.modules[factory.__module__], place[1], None)
    return described(other).get(name, text) if other else text


def _print_rewards() -> None:
    """Three lines a reward: its values, what it takes and leaves unread, what it needs and where it comes from."""
    for name, path in specs.REWARDS.items():
        factory = expressions.load(path)
        lines = _facts(factory) or [_first_line(factory)]
        say(f"{name:<22}" + f"\n{'':<22}".join(lines))


def _facts(factory: Any) -> list[str]:
    known = getattr(factory, "facts", None)
    if known is None:
        return []
    parts = [
        "differentiable" if known.differentiable else "no gradient",
        "needs prompts" if known.prompts else "",
        known.memory,
        f"{known.checkpoint} ({known.licence})" if known.checkpoint else "",
        known.source,
    ]
    return [line for line in (known.range, known.limits, "; ".join(part for part in parts if part)) if line]
