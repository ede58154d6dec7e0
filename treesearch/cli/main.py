"""treesearch: the command line, over the same dataclasses as the library.

    treesearch run dts --reward "digit(8)" --nfe 10k --store runs/eight
    treesearch resume runs/eight --nfe 20k

Exit codes: 0 done, 1 an error (its message says what to do; --debug shows its traceback), 2 wrong usage (a number, an
option, a name or an expression that cannot be read), 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Union

import torch
import tyro
from tyro.conf import CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from treesearch import host
from treesearch.cli import about, compare, diagnose, edit, export, names, run, serve, show
from treesearch.errors import TreeSearchError, UsageError, unknown
from treesearch.methods import METHODS as CLASSES
from treesearch.registry.blame import where
from treesearch.registry.registry import METHOD_NAMES
from treesearch.report.tables import say
from treesearch.rewards.base import RewardError

METHODS = {name.replace("_", "-"): CLASSES[path] for name, path in METHOD_NAMES.items()}
SUBCOMMANDS = {"advised": run.Advised} | METHODS
_Method: Any = Union[tuple(Annotated[m, subcommand(name)] for name, m in SUBCOMMANDS.items())]  # noqa: UP007 - from the table
Run = make_dataclass(
    "Run",
    [("method", _Method, field(default=run.Advised(), kw_only=True))],
    bases=(run.Run,),
    frozen=True,
    kw_only=True,
    namespace={"__doc__": run.Run.__doc__},
)
COMMANDS = {
    "run": Run,
    "resume": run.Resume,
    "edit": edit.Edit,
    "ls": show.Ls,
    "show": show.Show,
    "plot": show.Plot,
    "serve": serve.Serve,
    "export": export.Export,
    "compare": compare.Compare,
    "diagnose": diagnose.Diagnose,
    "bench": about.Bench,
    "list": names.Names,
    "env": about.Env,
    "cite": about.Cite,
}
_Command: Any = Union[tuple(Annotated[c, subcommand(name)] for name, c in COMMANDS.items())]  # noqa: UP007 - from the table
EXPECTED = (TreeSearchError, RewardError, ValueError, TypeError, ImportError, OSError)
_STYLE = (CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _leave_busy_cores_alone()
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _close_quietly()
        return 141
    return code


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    try:
        command = _parse(argv)
        return command if isinstance(command, int) else command.run()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        say("\ntreesearch: interrupted", error=True)
        return 130
    except SystemExit as error:  # of code that the command runs; the parser's own is dealt with in `_parse`
        _tell(error, f"the kernel or the reward ended the process: {error!r}", debug=debug)
    except EXPECTED as error:
        _tell(error, str(error), debug=debug)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        _tell(error, f"{type(error).__name__}: {error}", debug=debug)
    return 1


def _parse(argv: list[str]) -> Any:
    """The command, or the exit code of a parser that has said everything."""
    try:
        argv = _spelt(argv)
        if argv[:1] and argv[0] in COMMANDS:
            return tyro.cli(COMMANDS[argv[0]], args=argv[1:], prog=f"treesearch {argv[0]}", config=_STYLE)
        return tyro.cli(_Command, args=argv, prog="treesearch", description=__doc__, config=_STYLE)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2


def _tell(error: BaseException, text: str, *, debug: bool) -> None:
    """An error for people: what, where in their own files, and the traceback if it was asked for."""
    if debug:
        say("".join(traceback.format_exception(error)).rstrip(), error=True)
    say(f"treesearch: {text}", error=True)
    if (at := where(error)) and at not in text:
        say(f"  raised at {at}", error=True)
    if not debug and not isinstance(error, EXPECTED):
        say("  --debug shows the traceback", error=True)


def _close_quietly() -> None:
    """Let Python's own last flush of a pipe that nobody reads find another place."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(devnull, stream.fileno())
    os.close(devnull)


def _leave_busy_cores_alone() -> None:
    """Use as many threads as cores are idle: two threads that wait for a busy core are slower than one alone."""
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        idle = (os.cpu_count() or 1) - round(os.getloadavg()[0])
        torch.set_num_threads(max(1, min(torch.get_num_threads(), idle, host.cores())))


def _spelt(argv: list[str]) -> list[str]:
    """The words with the method as the parser spells it: dts_star and DiffusionTreeSearch are dts-star.

    Raises:
        UsageError: no such command or method; the message names the nearest.
    """
    words = [a for a in argv if not a.startswith("-")]
    if words and words[0] not in COMMANDS and argv[0] == words[0]:
        raise UsageError(unknown("command", words[0], COMMANDS))
    if argv[:1] != ["run"] or len(argv) < 2 or argv[1].startswith("-"):
        return argv
    classes = {method.__name__: name for name, method in METHODS.items()}
    method = classes.get(argv[1], argv[1].replace("_", "-"))
    if method not in SUBCOMMANDS:
        raise UsageError(unknown("method", argv[1], SUBCOMMANDS))
    return ["run", method, *argv[2:]]


if __name__ == "__main__":
    sys.exit(main())
