"""What a terminal shows.

Everything that reaches one goes through `say` or `print_table`: prompts and names are text of others.
"""

from __future__ import annotations

import sys
from typing import Any

from treesearch.text import printable


def say(text: Any = "", *, error: bool = False) -> None:
    """Print lines of text, with nothing in them that a terminal obeys; errors go to stderr."""
    stream = sys.stderr if error else sys.stdout
    print(encodable(printable(text), stream), file=stream, flush=True)


def encodable(text: str, stream: Any) -> str:
    """Text that a stream of a small alphabet (LANG=C) can hold: what it cannot is escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
