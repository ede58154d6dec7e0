"""`rewards` and `backends` are generic names: a user's own `rewards.py` beside a script would hide ours."""

from __future__ import annotations

import importlib
import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def look_here_last() -> None:
    """`python -m treesearch` and `python -c` look into the working directory before all else, where a person's own
    json.py or rewards.py would hide Python's and ours; so it comes last, unless it is where this library lies."""
    first, here = sys.path[:1], os.getcwd()
    if sys.argv[:1] in (["-m"], ["-c"]) and first == (["" if sys.argv[0] == "-c" else here]) and here != _ROOT:
        sys.path.append(sys.path.pop(0))


def check(name: str) -> None:
    """Import a top-level package and see that it is the one that ships with this library.

    Raises:
        ImportError: another module of that name comes first on the path; the message names its file.
    """
    module = importlib.import_module(name)
    if getattr(module, "OWNER", None) != "treesearch":
        where = getattr(module, "__file__", None) or getattr(module, "__path__", "a namespace package")
        raise ImportError(
            f"treesearch needs its own package `{name}`, but {where} hides it: rename that file or folder, "
            "or run from another directory"
        )


look_here_last()
check("rewards")
check("backends")
