"""What a JSON document from somebody else must look like before any of it is believed.

A check is a function of a value and of its place; checks are put together as the document is:

    RUN = record({"seed": whole(0, 2**64 - 1), "prompts": maybe(several(plain(), 1, 65_536)), ...})
    RUN(json.loads(text), "run.json")       # raises Invalid: "run.json: seed is 'a', expected a whole number of 0..."

Sizes, ranges and depth are bounded everywhere, so that what passes can be worked with.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]
LARGE = 2**62
DEPTH = 32  # levels of lists and objects


class Invalid(ValueError):
    """A value that is not what its place asks for."""


def whole(low: int = 0, high: int = LARGE) -> Check:
    """A whole number within bounds."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise refused(value, where, f"a whole number of {low}..{high}")

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A number within bounds; NaN never is, nor a whole one that 64 bits cannot hold."""

    def check(value: Any, where: str) -> None:
        fits = type(value) is float or (type(value) is int and abs(value) <= LARGE)
        if not fits or not low <= value <= high:
            raise refused(value, where, f"a number of {low:g}..{high:g}")

    return check


def text(longest: int = 2**20) -> Check:
    """A string that can be written down: no lone surrogates."""

    def check(value: Any, where: str) -> None:
        if type(value) is not str or len(value) > longest:
            raise refused(value, where, f"text of up to {longest} characters")

    return check


def flag(value: Any, where: str) -> None:
    """True or false."""
    if type(value) is not bool:
        raise refused(value, where, "true or false")


def one_of(*known: Any) -> Check:
    """One of the given strings."""

    def check(value: Any, where: str) -> None:
        if type(value) is not str or value not in known:
            raise refused(value, where, f"one of {', '.join(known)}")

    return check


def maybe(check: Check) -> Check:
    """Null, or what the check asks for."""
    return lambda value, where: None if value is None else check(value, where)


def several(each: Check, least: int = 0, most: int = 2**24) -> Check:
    """A list whose items pass a check."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list or not least <= len(value) <= most:
            raise refused(value, where, f"a list of {least}..{most} items")
        for i, item in enumerate(value):
            each(item, f"{where}[{i}]")

    return check


def record(needed: Mapping[str, Check], beside: Mapping[str, Check] | None = None, rest: Check | None = None) -> Check:
    """An object that has the needed keys; further ones are checked by name, or by `rest`, or refused."""
    known = dict(needed) | dict(beside or {})

    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            raise refused(value, where, "an object")
        if missing := [name for name in needed if name not in value]:
            raise Invalid(f"{where} lacks {', '.join(map(repr, missing))}")
        for name, item in value.items():
            if (found := known.get(name, rest)) is None:
                raise Invalid(f"{where} has {reprlib.repr(name)}, which is not known here")
            found(item, f"{where}.{reprlib.repr(name)[1:-1]}")

    return check


def plain(depth: int = DEPTH) -> Check:
    """Plain data, nested at most so deep."""

    def check(value: Any, where: str) -> None:
        level, left = [value], depth
        while level:
            if left < 0:
                raise Invalid(f"{where} is nested deeper than {depth} levels")
            nested = [item for item in level if type(item) in (list, dict)]
            level = [inner for item in nested for inner in (item.values() if type(item) is dict else item)]
            left -= 1

    return check


def parse(data: bytes, what: str) -> Any:
    """JSON text as data.

    Raises:
        Invalid: it is none, or nested too deep for anything to read.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise Invalid(f"{what} is nested too deep") from None
    except ValueError as error:
        raise Invalid(f"{what} is no JSON: {error}") from error


def refused(value: Any, where: str, expected: str) -> Invalid:
    """The message of a value that does not fit."""
    return Invalid(f"{where} is {reprlib.repr(value)}, expected {expected}")
