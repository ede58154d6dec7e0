"""Expressions of the command line and of saved runs, read and evaluated.

    mnist                      a registered name
    mnist(num_steps=50)        with settings
    ./mine.py:make(eta=0.5)    an attribute of a file or of a package, called if settings follow or if it is a factory
    2*digit(8) + compressibility().clip(-3, 0)      rewards have an algebra
    tds(./k.py:make(), "./my files/r.py":score)     plug-ins stand wherever a name may; quotes where a path needs them

Expressions hold names that whoever evaluates them gives, plug-ins, literals, + - *, and the methods of `Reward`;
nothing else is evaluated. A plug-in that needs no argument is a factory and is called, a function that needs samples
(and prompts) is a reward, and one that needs more is used as it is, as the value of `valued`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treesearch import rewards
from treesearch.errors import TreeSearchError, UsageError, unknown
from treesearch.registry import plugins
from treesearch.registry.blame import where
from treesearch.registry.references import OPERATIONS, is_mark, marked, placed, written
from treesearch.rewards.redact import redacted
from treesearch.text import brief

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}


class SpecError(UsageError):
    """A name or an expression that cannot be read."""

    def __init__(self, text: str) -> None:
        super().__init__(brief(text))


class PluginError(TreeSearchError):
    """A plug-in that was found and failed."""


class UnknownName(SpecError):
    """A name that is not registered."""

    def __init__(self, what: str, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(unknown(what, name, names))
        self.name = name


def plugins_in(spec: str) -> list[str]:
    """The plug-ins that an expression names, as path:attribute, in order."""
    return list(parse(spec, "expression")[1].values())


def names_in(spec: str) -> list[str]:
    """The names that an expression uses, in order; not those of plug-ins."""
    found = [node.id for node in ast.walk(parse(spec, "expression")[0]) if isinstance(node, ast.Name)]
    return [name for name in found if not is_mark(name)]


def absolute(spec: str) -> str:
    """The expression with absolute paths, so that it means the same from another folder."""
    return written(*marked(placed(spec)))


def public(spec: str) -> str:
    """The expression with secrets struck out, as files, cards and messages may have it."""
    text, found = marked(spec)
    return written(redacted(text), found)


def load(path: str) -> Any:
    """The attribute `package.module:attr` or `./file.py:attr`.

    Raises:
        SpecError: no such file, module or attribute.
        PluginError: it failed while it was loaded.
    """
    place, _, attributes = path.rpartition(":")
    found = _module(place, path)
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise SpecError(unknown(f"attribute of {place}", name, [n for n in dir(found) if n[0] != "_"]))
        found = getattr(found, name)
    return found


def _module(place: str, path: str) -> Any:
    file = Path(place).expanduser().resolve()
    if place.endswith(".py") and not file.is_file():
        raise SpecError(f"cannot load {path!r}: no such file")
    try:
        return plugins.load_file(file) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place + ".").startswith(error.name + "."):
            raise SpecError(f"cannot load {path!r}: {error}") from error
        raise PluginError(f"cannot load {path!r}: {_told(error)}") from error
    except Exception as error:
        raise PluginError(f"cannot load {path!r}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """An error of a plug-in, with the line of its file."""
    at = where(error)
    return f"{type(error).__name__}: {error}" + (f" ({at})" if at else "")


def parse(spec: str, what: str) -> tuple[ast.expr, dict[str, str]]:
    """The syntax tree of an expression, with a name in place of each plug-in, and the plug-ins by these names.

    Raises:
        SpecError: no expression.
    """
    text, found = marked(spec)
    try:
        return ast.parse(text, mode="eval").body, found
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        hint = (
            f': write diffusers("{redacted(spec)}", num_steps=50)'
            if what == "kernel" and "/" in spec and "(" not in spec
            else ""
        )
        shown = re.sub(r"[\"'].*", "…", spec, flags=re.DOTALL)  # a string may be secret, and where it ends is not known
        raise SpecError(f"cannot read the {what} {shown!r}: {getattr(error, 'msg', error)}{hint}") from error


def bound(factory: Callable[..., Any], call: ast.Call) -> dict[str, Any]:
    """Arguments of a call as they are written, by the names that its factory gives them."""
    settings = {k.arg: k.value for k in call.keywords if k.arg}
    try:
        return inspect.signature(factory).bind(*call.args, **settings).arguments
    except TypeError as error:
        why = accepted(factory, call.args, settings) or error
        raise SpecError(f"{redacted(ast.unparse(call))}: {why}") from error


def build(spec: str, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    """What an expression makes.

    Args:
        spec: the expression.
        what: it is to make, for messages.
        names: factories that it may name.

    Raises:
        SpecError: it cannot be read, or arguments that a factory refuses.
        PluginError: a plug-in failed.
    """
    tree, found = parse(spec, what)
    known = {**names, **{name: _Plugin(path, load(path)) for name, path in found.items()}}
    try:
        return _value(tree, what, known)
    except UnknownName:
        raise
    except SpecError as error:
        raise SpecError(written(str(error), found)) from error
    except RecursionError as error:
        raise SpecError(f"cannot read the {what}: it is nested too deeply") from error


@dataclass(frozen=True)
class Registered:
    """A factory of the tables, loaded when it is called."""

    path: str

    @property
    def found(self) -> Any:
        return load(self.path)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.found(*args, **settings)


@dataclass(frozen=True)
class _Plugin:
    """What a plug-in's path leads to, where an expression names it."""

    path: str
    found: Any

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Call the factory.

        Raises:
            SpecError: arguments that it does not take.
            PluginError: it failed.
        """
        try:
            inspect.signature(self.found).bind(*args, **settings)
        except (TypeError, ValueError) as error:
            raise SpecError(f"{self.path}: {accepted(self.found, args, settings) or error}") from error
        try:
            made = self.found(*args, **settings)
        except Exception as error:
            raise PluginError(f"{self.path} failed: {_told(error)}") from error
        return rewards.as_reward(made) if inspect.isroutine(made) else made

    def bare(self) -> Any:
        """What it is where nothing is called: a factory's product, a function as a reward, or the object itself."""
        if not isinstance(self.found, type) and not inspect.isroutine(self.found):
            return self.found
        needs = [] if isinstance(self.found, type) else _needed(self.found)
        if not needs:
            return self()
        return rewards.as_reward(self.found) if len(needs) - needs.count("prompts") <= 1 else self.found


def _needed(function: Callable[..., Any]) -> list[str]:
    """Arguments that a function needs."""
    try:
        parameters: Sequence[inspect.Parameter] = list(inspect.signature(function).parameters.values())
    except ValueError:  # compiled, without a signature
        return ["samples"]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _evaluate(node: ast.expr, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sides = [_value(side, what, names) for side in (node.left, node.right)]
        if bad := [side for side in sides if isinstance(side, (str, bytes, list, tuple, dict, set))]:
            raise SpecError(
                f"{redacted(ast.unparse(node))}: + - * are for rewards and numbers, not for a {type(bad[0]).__name__}"
            )
        return _called(_OPERATORS[type(node.op)], node, *sides)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        return _called(lambda value: -value, node, _value(node.operand, what, names))
    if isinstance(node, ast.Call):
        return _call(node, what, names)
    if isinstance(node, ast.Name):
        if node.id in ("nan", "inf"):
            raise SpecError(f"{node.id} in a {what} is no number: write a finite one, or leave the setting out")
        if node.id not in names:
            raise UnknownName(what, node.id, {name: at for name, at in names.items() if not is_mark(name)})
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise SpecError(
            f"cannot read {redacted(ast.unparse(node))!r} in a {what}: names, numbers, + - * and calls only"
        ) from error


def _value(node: ast.expr, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    """A node's value; a factory that is named without being called is called."""
    value = _evaluate(node, what, names)
    if isinstance(value, _Plugin):
        return value.bare()
    return value() if any(value is factory for factory in names.values()) else value


def _call(node: ast.Call, what: str, names: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node.func, ast.Attribute):
        if node.func.attr not in OPERATIONS:
            raise SpecError(unknown(f"operation of a {what}", node.func.attr, OPERATIONS))
        owner = _value(node.func.value, what, names)
        if not isinstance(owner, rewards.Reward):
            raise SpecError(f"{redacted(ast.unparse(node))}: .{node.func.attr} is an operation of rewards")
        function = getattr(owner, node.func.attr)
    elif isinstance(node.func, ast.Name):
        function = _evaluate(node.func, what, names)
    else:
        raise SpecError(f"cannot call {redacted(ast.unparse(node.func))!r} in a {what}")
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        raise SpecError(
            f"cannot read {redacted(ast.unparse(node))!r} in a {what}: write the settings out, without * and **"
        )
    args = [_value(a, what, names) for a in node.args]
    settings = {k.arg: _value(k.value, what, names) for k in node.keywords if k.arg}
    return _called(function, node, *args, **settings)


def _called(function: Callable[..., Any], node: ast.expr, *args: Any, **settings: Any) -> Any:
    """The value of a call; what the function refuses names the part of the expression."""
    try:
        return function(*args, **settings)
    except SpecError:
        raise
    except (TypeError, ValueError) as error:
        why = accepted(getattr(function, "found", function), args, settings) or error
        raise SpecError(f"{redacted(ast.unparse(node))}: {why}") from error


def accepted(factory: Callable[..., Any], args: Sequence[Any], settings: Mapping[str, Any]) -> str | None:
    """What is wrong with the arguments of a call and which it takes; None where it takes them, or does not say."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # nothing that can be called, or compiled without a signature
        return None
    try:
        signature.bind(*args, **settings)
    except TypeError as error:
        named = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        wrong = [name for name in settings if name not in named]
        if wrong and named:
            return unknown("argument", wrong[0], named)
        return f"{error} (it takes {', '.join(named) or 'none'})"
    return None
