"""`rewards` and `backends` are generic names: a user's own `rewards.py` beside a script would hide ours."""

from __future__ import annotations

import importlib


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


check("rewards")
check("backends")
