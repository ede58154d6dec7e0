"""The options of `run` as a TOML file: `--config` reads it, `--print-config` writes it.

    method = "fk(num_particles=8)"
    reward = "digit(8)"
    prompts = ["an eight"]
    nfe = "10k"

A key is the name of an option. What is typed stands over what the file says.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from treesearch.cli.arguments import Limits, What, Where
from treesearch.errors import UsageError, unknown
from treesearch.methods import METHODS
from treesearch.registry import registry as specs

GROUPS = {"what": What, "limits": Limits, "where": Where}
_APART = {*GROUPS, "method", "config", "print_config"}
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {  # what TOML may hold for an option of a type
    str: ((str, int, float), "text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}
R = TypeVar("R")


def file_of(argv: list[str]) -> str | None:
    """The file that the words name."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--config":
            return value or after
    return None


def read(file: str, begun: R) -> R:
    """The command that a file describes.

    Args:
        begun: the command without the file.

    Raises:
        UsageError: it cannot be read, or holds what is no option or no value of one.
    """
    options, asked = _options(type(begun)), {k.replace("-", "_"): value for k, value in _table(file).items()}
    for key in sorted(asked.keys() - options - {"method"}):
        raise UsageError(f"--config {file}: {unknown('option', key, {*options, 'method'})}")
    changes = {group: {} for group in (None, *GROUPS)}
    for key, value in asked.items():
        if key == "method":
            changes[None][key] = specs.method(_fitting(file, key, value, str))
        else:
            group, kind = options[key]
            changes[group][key] = _fitting(file, key, value, kind)
    own: Any = changes.pop(None) | {group: cls(**changes[group]) for group, cls in GROUPS.items()}
    return replace(begun, **own)  # pyright: ignore[reportArgumentType]


def under(begun: R, words: Sequence[str]) -> R:
    """The command of a file below words that name prompts: theirs stand alone, wherever the file has its own."""
    typed = {word.partition("=")[0] for word in words} & {"--prompts", "--prompts-file"}
    what = replace(begun.what, prompts=(), prompts_file=None) if typed else begun.what  # pyright: ignore[reportAttributeAccessIssue]
    return replace(begun, what=what)  # pyright: ignore[reportArgumentType]


def written(run: Any) -> str:
    """The file that describes a command."""
    lines = [f"method = {_toml(_expression(run.method))}"] if type(run.method) in METHODS.values() else []
    for key, (group, _) in _options(type(run)).items():
        value = getattr(run if group is None else getattr(run, group), key)
        if value is not None:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines)


def _options(cls: type) -> Mapping[str, tuple[str | None, Any]]:
    """Where each option of a command stands, and its type."""
    own = {key: (None, kind) for key, kind in get_type_hints(cls).items() if key not in _APART}
    return own | {key: (group, kind) for group, of in GROUPS.items() for key, kind in get_type_hints(of).items()}


def _table(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}, expected a TOML file") from error
    except ValueError as error:
        raise UsageError(f"--config {file} is no TOML: {error}") from error


def _fitting(file: str, key: str, value: Any, kind: Any) -> Any:
    """A value of the file as the option has it."""
    if kind == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise UsageError(f"--config {file}: {key} = {value!r}: expected a list of texts")
    kind = next((k for k in get_args(kind) if k is not NoneType), kind)
    taken, called = _KINDS[kind]
    if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"--config {file}: {key} = {value!r}: expected {called}")
    return kind(value)


def _expression(method: Any) -> str:
    """A method and what it was told otherwise than by default, as `specs.method` reads it."""
    name = {path: short for short, path in specs.METHOD_NAMES.items()}[type(method).__name__]
    return f"{name}({', '.join(_settings(method))})"


def _settings(method: Any) -> Iterator[str]:
    for f in fields(method):
        if f.init and (value := getattr(method, f.name)) != f.default:
            yield f"{f.name}={value!r}"


def _toml(value: Any) -> str:
    """A text, number, flag or list of texts: JSON, but for the one character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
