"""What else may bear our name, seen when the library is imported."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import metadata

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SAME_NAME = "treesearchlib"  # a distribution that installs a package and a script called treesearch


def look_here_last() -> None:
    """`python -m treesearch` and `python -c` look into the working directory before all else, where a person's own
    json.py or torch.py would hide the real ones; so it comes last, unless it is where this library lies."""
    first, here = sys.path[:1], os.getcwd()
    if sys.argv[:1] in (["-m"], ["-c"]) and first == (["" if sys.argv[0] == "-c" else here]) and here != _ROOT:
        sys.path.append(sys.path.pop(0))


def warn_of_namesake() -> None:
    """Warn of another distribution that installs a package of our name: the files of one overwrite the other's."""
    try:
        found = metadata.version(_SAME_NAME)
    except metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"{_SAME_NAME} {found} is installed too, whose package and script are also called treesearch: run "
        f"`pip uninstall {_SAME_NAME}`, then install treesearch again",
        ImportWarning if _is_checkout() else RuntimeWarning,
        stacklevel=2,
    )


def _is_checkout() -> bool:
    return os.path.isfile(os.path.join(_ROOT, "pyproject.toml"))


look_here_last()
warn_of_namesake()
