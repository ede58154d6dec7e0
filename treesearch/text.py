"""Text of others, such as prompts, names and messages, made safe for where it is shown.

    plain      a terminal's line: printable characters; others are escaped, so that nothing moves the cursor or hides
    printable  the same for a text of several lines
    markdown   a card's line: nothing in it is markup, a link, an image or HTML
    code       the same, set as code where it can be
    label      a picture's text: nothing in it is a formula
    brief      an error's part: not longer than a person reads
    file_name  a name for a file in this folder

Files for programs (JSON) keep texts as they are.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # invisible, but letters of Persian and Indian scripts and emoji are spelt with them
_ACTIVE = re.compile(r"[\\`*\[\]|~$#!{}]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[-+](?=\s)|(?<=^\d)[.)](?=\s)")
_ENTITY = re.compile(r"[&<>@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(text: Any) -> str:
    r"""One line of printable text: control characters, line breaks, direction marks and lone surrogates as \x1b, \n."""
    return "".join(c if _shown(c) else c.encode("unicode_escape").decode() for c in str(text))


def _shown(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def printable(text: Any) -> str:
    """Text of several lines, each of them plain."""
    return "\n".join(map(plain, str(text).split("\n")))


def markdown(text: Any) -> str:
    """One line of a Markdown page (also in a table) that reads as the text itself."""
    escaped = _ACTIVE.sub(r"\\\g<0>", plain(text))
    return _ENTITY.sub(lambda found: _NAMED.get(found[0], f"&#{ord(found[0])};"), escaped)


def code(text: Any) -> str:
    """One line of a Markdown page set as code; text that could leave a code span or a table's cell is escaped."""
    shown = plain(text)
    return markdown(shown) if not shown or set(shown) & set("`<>&|[") else f"`{shown}`"


def label(text: Any, limit: int = 80) -> str:
    """A text of a picture: no formula, not hidden for its first letter, at most `limit` characters."""
    shown = plain(text)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def brief(text: Any, head: int = 400, tail: int = 200) -> str:
    """A text in an error: of a long one its beginning and its end."""
    shown = str(text)
    left = len(shown) - head - tail
    return shown if left < 40 else f"{shown[:head]} ... {left} characters ... {shown[-tail:]}"


def file_name(text: Any) -> str:
    """A file's name made of letters, digits and . _ - that begins with none of the last."""
    return re.sub(r"[^\w.-]", "_", plain(text)).lstrip(".-")[:100] or "_"
