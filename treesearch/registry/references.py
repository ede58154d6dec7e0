"""Plug-ins within expressions: `./file.py:attr`, `package.module:attr`, or `"./my files.py":attr` with quotes.

An expression is Python but for them, so each is replaced by a name before the expression is parsed:

    tds(./k.py:make(), ./r.py:score)   ->   tds(_plugin0_(), _plugin1_), with where each of them leads
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path

OPERATIONS = ("min", "clip", "gate")  # of rewards; behind a plug-in they are not part of its attribute
DATA = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".npy", ".npz", ".safetensors", ".pt", ".pth")
"""Endings of files that a string of an expression may name."""
_NAME = r"[A-Za-z_]\w*"
_STRING = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_PATH = r"(?:[A-Za-z]:[\\/])?[^\s()\"',+*=\[\]{}:-][^\s()\"',+*=\[\]{}:]*\.py"
_ATTRIBUTE = rf"{_NAME}(?:\.(?!(?:{'|'.join(OPERATIONS)})\s*\(){_NAME})*"
_PLUGIN = re.compile(
    rf"(?:(?P<quoted>{_STRING})|(?P<file>{_PATH})|(?P<module>{_NAME}(?:\.{_NAME})*)):(?P<attr>{_ATTRIBUTE})"
)
_TOKEN = re.compile(rf"{_PLUGIN.pattern}|{_STRING}")
_FIRST = re.compile(rf"(?P<file>[^()\s\"']+\.py):(?P<attr>{_ATTRIBUTE})")  # a file of any other name, at the beginning
_PLACE = re.compile(r"\b_plugin\d+_\b")


def marked(spec: str) -> tuple[str, dict[str, str]]:
    """The expression with a name in place of each plug-in, and path:attribute by that name; paths are absolute."""
    found: dict[str, str] = {}

    def mark(token: re.Match[str]) -> str:
        if token["attr"] is None:
            return token[0]
        place = token["module"] or token["file"] or ast.literal_eval(token["quoted"])
        return token[0] if token["quoted"] and not place.endswith(".py") else _new(found, place, token["attr"])

    spec = spec.strip()
    first = _FIRST.match(spec)
    if first and Path(first["file"]).expanduser().is_file():
        return _new(found, first["file"], first["attr"]) + _TOKEN.sub(mark, spec[first.end() :]), found
    return _TOKEN.sub(mark, spec), found


def _new(found: dict[str, str], place: str, attribute: str) -> str:
    name = f"_plugin{len(found)}_"
    where = str(Path(place).expanduser().resolve()) if place.endswith(".py") else place
    found[name] = f"{where}:{attribute}"
    return name


def placed(spec: str) -> str:
    """The expression with absolute paths for the data files that its strings name, where these exist."""
    return re.sub(_STRING, _placed, spec)


def _placed(token: re.Match[str]) -> str:
    try:
        file = Path(ast.literal_eval(token[0]))
    except (SyntaxError, ValueError):  # it is no string after all: whoever evaluates it says so
        return token[0]
    return repr(str(file.resolve())) if file.suffix.lower() in DATA and os.path.isfile(file) else token[0]


def is_mark(name: str) -> bool:
    """Whether a name stands for a plug-in."""
    return _PLACE.fullmatch(name) is not None


def written(text: str, found: Mapping[str, str]) -> str:
    """A marked text as an expression again."""
    return _PLACE.sub(lambda place: _quoted(found[place[0]]) if place[0] in found else place[0], text)


def _quoted(plugin: str) -> str:
    """A plug-in as an expression has it: quotes where its path needs them."""
    place, _, attribute = plugin.rpartition(":")
    return plugin if _PLUGIN.fullmatch(plugin) else f"{place!r}:{attribute}"
