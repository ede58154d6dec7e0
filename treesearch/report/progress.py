"""The progress line of a search."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from treesearch.core.compiled import kept
from treesearch.core.tree import add_child
from treesearch.report.tables import DASH
from treesearch.report.terminal import say
from treesearch.session.interfaces import Snapshot
from treesearch.text import plain

COMPILING = "compiling, once after an installation: some ten seconds"
CELL_SECONDS = 0.25  # between two states of a line in a notebook
TEXT_SECONDS, TEXT = 1.0, 60  # between two looks for a better text, and how much of it is shown


class Progress:
    """One line a search: NFE, best, ESS, nodes, NFE/s. A callback; a context manager.

    Args:
        name: printed first.
        quiet: print nothing.
        error: on stderr; in a notebook in the cell's output.
        after: seconds before the line is shown, so that quick searches in a loop leave none.
        weighed: whether its samples have weights towards π, and with them an ESS.
        texts: whether its samples are texts, of which the best so far is shown.
    """

    def __init__(
        self,
        name: str,
        *,
        quiet: bool = False,
        error: bool = False,
        after: float = 0.0,
        weighed: bool = True,
        texts: bool = False,
    ) -> None:
        self.weighed, self.texts = weighed, texts
        self._best, self._text, self._read = -math.inf, "", -math.inf
        self.name, self.quiet, self.error, self.after = plain(name), quiet, error, after
        self._began, self._first, self._line, self._note = time.perf_counter(), None, "", ""
        self._record: dict[str, Any] | None = None
        self._last: Snapshot | None = None
        self._total: int | None = None
        self._display: Terminal | _Cell | None = None

    def __enter__(self) -> Progress:
        self._open()
        return self

    def _open(self) -> None:
        """Show the line, if it is time."""
        if self._display is None and not self.quiet and time.perf_counter() - self._began >= self.after:
            self._display = _Cell() if self.error and in_notebook() else Terminal(error=self.error)
            if not kept(add_child):
                self._display.update(f"{self.name:<12} {COMPILING}")

    def __call__(self, snapshot: Snapshot) -> None:
        if self._first is None:
            self._first = 0 if snapshot.wave == 0 else snapshot.record["nfe"]
        self._last, self._record, self._total = snapshot, snapshot.record, snapshot.total
        if time.perf_counter() - self._read > TEXT_SECONDS:
            self._look()
        self._write(snapshot.record)

    def _look(self) -> None:
        """Read the best text, if it is another one."""
        found = self._last
        if self.texts and not self.quiet and found is not None and found.best_reward > self._best:
            self._best, self._text = found.best_reward, f"  “{plain(_best(found))[:TEXT]}”"
            self._read = time.perf_counter()

    def _write(self, record: dict[str, Any]) -> None:
        rate = (record["nfe"] - (self._first or 0)) / max(time.perf_counter() - self._began, 1e-9)
        total = f"/{self._total}" if self._total else ""
        best = DASH if record["best_reward"] is None else f"{record['best_reward']:.3f}".replace("-0.000", "0.000")
        ess = f"{record['ess']:>7.1f}" if self.weighed else f"{DASH:>7}"
        self._line = (
            f"{self.name:<12} NFE {record['nfe']:>6}{total}  best {best:>8}  ESS {ess}  "
            f"nodes {record['nodes']:>6}  {rate:>7.0f} NFE/s{_workers(record.get('workers'))}{self._text}"
        )
        self._open()
        self._show()

    def _show(self) -> None:
        if self._display is not None:
            self._display.update(self._line + self._note)

    def ending(self) -> None:
        """Say that the search ends at the next opportunity. Nothing here takes long: a signal handler may call it."""
        self._note = "  ending after this wave, Ctrl-C again leaves at once"
        self._show()

    def settle(self, ess: float) -> None:
        """The line's last word: waves carry the ESS of a smaller tree, and a text up to a second old."""
        if self._record is not None:
            self._look()
            self._write(self._record | {"ess": ess})

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.close(self._line)


def _best(snapshot: Snapshot) -> str:
    """The best text of all tasks."""
    tasks = [task for task in snapshot.result().tasks if len(task.leaves)]
    found = max(tasks, key=lambda task: float(task.rewards.max()))
    return str(found.best(1)[0][0])


class Terminal:
    """A line that a terminal shows below what else is printed, and keeps in the end."""

    def __init__(self, *, error: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self.error = error
        self._live = Live("", console=Console(stderr=error), refresh_per_second=8, transient=True)
        self._live.start()

    def update(self, line: str) -> None:
        from rich.text import Text

        self._live.update(Text(line))

    def close(self, line: str) -> None:
        self._live.stop()
        say(line, error=self.error)


class _Cell:
    """A line in the output of a notebook's cell, written over a few times a second."""

    def __init__(self) -> None:
        self._last, self._longest = -math.inf, 0

    def update(self, line: str) -> None:
        if time.perf_counter() - self._last > CELL_SECONDS:
            self._print(line, end="")

    def close(self, line: str) -> None:
        self._print(line, end="\n")

    def _print(self, line: str, end: str) -> None:
        self._last, self._longest = time.perf_counter(), max(self._longest, len(line))
        print(f"\r{line:<{self._longest}}", end=end, flush=True)


def shown(progress: bool | None) -> bool:
    """Whether a line tells how far a search is; None asks whether somebody watches."""
    if progress is None:
        return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())
    return bool(progress)


def in_notebook() -> bool:
    """Whether a notebook runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return shell is not None and hasattr(shell(), "kernel")


def _workers(found: Mapping[str, Any] | None) -> str:
    """What workers do, for the progress line."""
    if not found:
        return ""
    moved = found["mb_in"] + found["mb_out"]
    return (
        f"  {found['workers']} workers {found['busy']:.0%} busy  fill {found['fill']:.0%}  queue {found['queue']:.0f}  "
        f"{moved:.1f} MB"
    )
