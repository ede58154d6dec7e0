"""The progress line of a search."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from treesearch.report.tables import DASH, say
from treesearch.session.interfaces import Snapshot
from treesearch.text import plain


class Progress:
    """One line a search: NFE, best, ESS, nodes, NFE/s. A callback; a context manager.

    Args:
        name: printed first.
        quiet: print nothing.
    """

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self.name, self.quiet = plain(name), quiet
        self._began, self._first, self._line = time.perf_counter(), None, ""
        self._record: dict[str, Any] | None = None
        self._total: int | None = None
        self._live: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet:
            from rich.live import Live

            self._live = Live("", refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __call__(self, snapshot: Snapshot) -> None:
        if self._first is None:
            self._first = 0 if snapshot.wave == 0 else snapshot.record["nfe"]
        self._record, self._total = snapshot.record, snapshot.total
        self._write(snapshot.record)

    def _write(self, record: dict[str, Any]) -> None:
        rate = (record["nfe"] - (self._first or 0)) / max(time.perf_counter() - self._began, 1e-9)
        total = f"/{self._total}" if self._total else ""
        best = DASH if record["best_reward"] is None else f"{record['best_reward']:.3f}".replace("-0.000", "0.000")
        self._line = (
            f"{self.name:<12} NFE {record['nfe']:>6}{total}  best {best:>8}  ESS {record['ess']:>7.1f}  "
            f"nodes {record['nodes']:>6}  {rate:>7.0f} NFE/s{_workers(record.get('workers'))}"
        )
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(self._line))

    def settle(self, ess: float) -> None:
        """The line's last word: waves carry the ESS of a slightly smaller tree."""
        if self._record is not None:
            self._write(self._record | {"ess": ess})

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            say(self._line)


def _workers(found: Mapping[str, Any] | None) -> str:
    """What workers do, for the progress line."""
    if not found:
        return ""
    moved = found["mb_in"] + found["mb_out"]
    return (
        f"  {found['workers']} workers {found['busy']:.0%} busy  fill {found['fill']:.0%}  queue {found['queue']:.0f}  "
        f"{moved:.1f} MB"
    )
