"""treesearch: the command line, over the same dataclasses as the library.

    treesearch run dts --reward "digit(8)" --nfe 10k --store runs/eight
    treesearch resume runs/eight --nfe 20k

Exit codes: 0 done, 1 an error (its message says what to do), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Union

import torch
import tyro
from tyro.conf import CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from rewards.base import RewardError
from treesearch import commands
from treesearch.errors import TreeSearchError, unknown
from treesearch.methods import METHODS as CLASSES
from treesearch.specs import METHOD_NAMES

METHODS = {name.replace("_", "-"): CLASSES[path] for name, path in METHOD_NAMES.items()}
_Method: Any = Union[tuple(Annotated[m, subcommand(name)] for name, m in METHODS.items())]  # noqa: UP007 - from the table
Run = make_dataclass(
    "Run",
    [("method", _Method, field(kw_only=True))],
    bases=(commands.Run,),
    frozen=True,
    kw_only=True,
    namespace={"__doc__": commands.Run.__doc__},
)
COMMANDS = {
    "run": Run,
    "resume": commands.Resume,
    "ls": commands.Ls,
    "show": commands.Show,
    "plot": commands.Plot,
    "export": commands.Export,
    "compare": commands.Compare,
    "bench": commands.Bench,
    "list": commands.Names,
    "env": commands.Env,
    "cite": commands.Cite,
}
_Command: Any = Union[tuple(Annotated[c, subcommand(name)] for name, c in COMMANDS.items())]  # noqa: UP007 - from the table
_STYLE = (CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _leave_busy_cores_alone()
    try:
        _check_names(argv)
        if argv[:1] and argv[0] in COMMANDS:
            command = tyro.cli(COMMANDS[argv[0]], args=argv[1:], prog=f"treesearch {argv[0]}", config=_STYLE)
        else:
            command = tyro.cli(_Command, args=argv, prog="treesearch", description=__doc__, config=_STYLE)
        return command.run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except _Usage as error:
        print(f"treesearch: {error}", file=sys.stderr)
        return 2
    except (TreeSearchError, RewardError, ValueError, TypeError, ImportError, OSError) as error:
        print(f"treesearch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntreesearch: interrupted", file=sys.stderr)
        return 130


def _leave_busy_cores_alone() -> None:
    """Use as many threads as cores are idle: two threads that wait for a busy core are slower than one alone."""
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        idle = (os.cpu_count() or 1) - round(os.getloadavg()[0])
        torch.set_num_threads(max(1, min(torch.get_num_threads(), idle)))


class _Usage(ValueError):
    """A command or method that does not exist."""


def _check_names(argv: Sequence[str]) -> None:
    """Suggest the nearest command or method before the parser sees a wrong one."""
    words = [a for a in argv if not a.startswith("-")]
    if words and words[0] not in COMMANDS and argv[0] == words[0]:
        raise _Usage(unknown("command", words[0], COMMANDS))
    if words[:1] == ["run"] and len(argv) > 1 and not argv[1].startswith("-") and argv[1] not in METHODS:
        raise _Usage(unknown("method", argv[1], METHODS))


if __name__ == "__main__":
    sys.exit(main())
