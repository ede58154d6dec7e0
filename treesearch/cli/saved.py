"""How to make the kernel and the reward of a run folder: what it keeps of the command that began it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treesearch.cli.arguments import written
from treesearch.errors import StoreError, UsageError
from treesearch.registry import expressions
from treesearch.registry import trust as trusting
from treesearch.report.terminal import say
from treesearch.rewards.redact import STRUCK
from treesearch.runs import files
from treesearch.runs.command import COMMAND, COMMAND_BYTES
from treesearch.runs.config import read_config
from treesearch.session.session import Session


def begin(session: Session, path: Path, command: Mapping[str, str]) -> None:
    """Start a new run in a folder, which keeps how to make its kernel and reward."""
    session.start(path, {COMMAND: kept(command)})


def kept(command: Mapping[str, str]) -> dict[str, Any]:
    """The command as a run folder keeps it: without secrets, with the mark of who made it."""
    return trusting.signed({what: expressions.public(command[what]) for what in ("kernel", "reward")})


def told(
    path: Path,
    *,
    kernel: str | None = None,
    reward: str | None = None,
    trust: bool = False,
    wanted: Sequence[str] = ("kernel", "reward"),
) -> dict[str, str]:
    """How to make what is wanted of a run's kernel and reward: as is typed, else as the folder says.

    Raises:
        StoreError: the folder does not say, or says what it takes `--trust` to follow.
    """
    typed = {what: text for what, text in (("kernel", kernel), ("reward", reward)) if text is not None}
    rest = [what for what in wanted if what not in typed]
    saved = read_command(path) if rest else {}
    if struck := [what for what in rest if STRUCK in saved[what]]:
        raise StoreError(
            f"{path} keeps {', '.join(f'its {what} as {saved[what]}' for what in struck)}, without what may be secret: "
            f"say it again with {' and '.join(f'--{what}' for what in struck)}"
        )
    with of_folder(path, typed=not rest):
        if not trust:
            trusting.check(path, saved, rest)
        for name in (name for what in rest for name in trusting.reaches(saved[what])):
            say(f"treesearch: {path} names {name}, loading it", error=True)
    command = saved | typed
    return written(command["kernel"], command.get("reward", ""))


@contextmanager
def of_folder(path: Path, *, typed: bool) -> Iterator[None]:
    """Expressions that cannot be read are wrong usage where they were typed, else a folder that is no good."""
    try:
        yield
    except UsageError as error:
        if typed:
            raise
        raise StoreError(f"{path / COMMAND}: {error}") from error


def read_command(path: Path) -> dict[str, str]:
    """The kernel and reward expressions of a run made by the command line, and the mark of who made it.

    Raises:
        StoreError: the run was made from Python, or the file is no such thing.
    """
    file = path / COMMAND
    if not file.exists():
        read_config(path)
        raise StoreError(
            f"{path} was made from Python, where kernel and reward are objects: say how to make them with "
            f"--kernel and --reward, or use treesearch.resume({str(path)!r}, kernel, reward)"
        )
    try:
        with files.reading(file, COMMAND_BYTES) as opened:
            found = json.loads(opened.read())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(k), str) for k in ("kernel", "reward")):
        raise StoreError(f'{file} is damaged: expected {{"kernel": "...", "reward": "..."}}')
    return {key: value for key, value in found.items() if isinstance(value, str)}
