"""treesearch: the command line, over the same dataclasses as the library.

    treesearch run dts --reward "digit(8)" --nfe 10k --store runs/eight
    treesearch resume runs/eight --nfe 20k
    treesearch --version

Exit codes: 0 done, 1 an error (its message says what to do; --debug shows its traceback), 2 wrong usage (a number, an
option, a name or an expression that cannot be read), 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from treesearch.cli import front
from treesearch.errors import TreeSearchError, UsageError
from treesearch.registry.blame import where
from treesearch.report.terminal import say

EXPECTED = (TreeSearchError, ValueError, TypeError, ImportError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
        if front.answered(argv, __doc__):
            return 0
        _quiet_libraries()
        from treesearch.cli import commands

        command = commands.parse(argv, __doc__)
        commands.leave_busy_cores_alone()
        return command if isinstance(command, int) else command.run()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        say("\ntreesearch: interrupted", error=True)
        return 130
    except SystemExit as error:  # of code that the command runs; the parser's own is dealt with in `parse`
        _tell(error, f"the kernel or the reward ended the process: {error!r}", debug=debug)
    except EXPECTED as error:
        _tell(error, str(error), debug=debug)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        _tell(error, f"{type(error).__name__}: {error}", debug=debug)
    return 1


def _quiet_libraries() -> None:
    """Leave warnings and bars of the libraries that load models out, unless the user's environment asks for them.

    They are read when the libraries are imported. Bars of downloads say themselves that they are shown.
    """
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)


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


if __name__ == "__main__":
    sys.exit(main())
