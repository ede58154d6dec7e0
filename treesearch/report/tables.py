"""What people read: the progress line, the table, the summary of a run and its card.

Everything that reaches a terminal goes through `say` or `print_table`, and a card through `treesearch.text`: prompts
and names are text of others.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treesearch.budget import Cost
from treesearch.results import certificate
from treesearch.results.result import SearchResult, TaskResult
from treesearch.runs.files import write_text
from treesearch.session.session import Snapshot
from treesearch.text import code, markdown, plain, printable

DASH = "-"


def say(text: Any = "", *, error: bool = False) -> None:
    """Print lines of text, with nothing in them that a terminal obeys; errors go to stderr."""
    stream = sys.stderr if error else sys.stdout
    print(_encodable(printable(text), stream), file=stream, flush=True)


def _encodable(text: str, stream: Any) -> str:
    """Text that a stream of a small alphabet (LANG=C) can hold: what it cannot is escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


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


def summary(result: SearchResult) -> list[dict[str, Any]]:
    """One record a task, plain numbers: what `show` and the table print and run cards hold."""
    return [_task(task) for task in result.tasks]


def _task(task: TaskResult) -> dict[str, Any]:
    rewards, found = task.rewards, task.diagnostics
    finite = rewards[rewards.isfinite()]
    return {
        "prompt": task.prompt,
        "samples": len(rewards),
        "best": _number(float(rewards.max())) if len(rewards) else None,
        "mean": _number(float(finite.mean())) if len(finite) else None,
        "log_z": _number(task.log_z),
        "log_z_se": _number(task.log_z_se),
        "ess": found["ess"],
        "roots": found["surviving_roots"],
        "kl": _number(found["kl"]),
        "lam": _number(found["lam"]),
        "status": str(task.status.name).lower(),
        "warnings": found["warnings"],
        "certificate": task.certificate().asdict(),
    }


def certified(name: str, tasks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The certificates of one search for people: a heading a task, and its lines."""
    found = {}
    for i, task in enumerate(tasks):
        which = "" if len(tasks) == 1 else f", task {i}" + (f": {task['prompt']}" if task["prompt"] else "")
        found[name + which] = certificate.lines(task["certificate"])
    return found


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def figure(value: float | None) -> str:
    """A number of a table."""
    return DASH if value is None else f"{value:.3f}".replace("-0.000", "0.000")


def rows(name: str, tasks: Sequence[Mapping[str, Any]], cost: Cost) -> list[list[str]]:
    """Table rows of one search; its cost stands on its first row."""
    out = []
    for i, task in enumerate(tasks):
        z = DASH if task["log_z"] is None else f"{task['log_z']:.3f}"
        se = "" if task["log_z_se"] is None else f" ± {task['log_z_se']:.3f}"
        spent = [f"{cost.nfe}", f"{cost.reward_calls}", f"{cost.seconds:.1f}"] if i == 0 else ["", "", ""]
        label = name if task["prompt"] is None else f"{name}: {task['prompt']}"
        numbers = [figure(task[k]) for k in ("best", "mean")]
        out.append([label, *numbers, z + se, f"{task['ess']:.1f}", str(task["roots"]), *spent])
    return out


COLUMNS = ("method", "best", "mean", "log Z", "ESS", "roots", "NFE", "rewards", "seconds")


def print_table(lines: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> None:
    """Print a table to the terminal."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, *body = ([plain(cell) for cell in line] for line in [columns, *lines])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(head):
        table.add_column(Text(column), justify="left" if i == 0 else "right", no_wrap=True)
    for line in body:
        table.add_row(*map(Text, line))
    needed = sum(max(cell_len(line[i]) for line in [head, *body]) + 2 for i in range(len(head)))
    console = Console(width=max(needed, Console().width))
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write(_encodable(captured.get(), sys.stdout))


def markdown_table(lines: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """A table of cells that are Markdown: texts of others go through `treesearch.text.markdown` first."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines])


def card(
    path: Path,
    title: str,
    command: Mapping[str, Any],
    lines: Sequence[Sequence[str]],
    notes: Mapping[str, Sequence[str]],
    pictures: Sequence[tuple[str, str]],
    certificates: Mapping[str, Sequence[str]],
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Write README.md of a run folder: what was asked, what came out, what to know, what it may claim, the pictures."""
    asked = "\n".join(f"- {markdown(key)}: {code(value)}" for key, value in command.items())
    told = [f"- {markdown(name)}: {markdown(note)}" for name, found in notes.items() for note in found]
    known = "\n".join(told) or "- none"
    claimed = "\n\n".join(
        "\n".join([f"{markdown(name)}:", "", *(f"- {markdown(line)}" for line in found)])
        for name, found in certificates.items()
    )
    head, *body = ([markdown(cell) for cell in line] for line in [columns, *lines])
    shown = "\n\n".join(f"![{markdown(caption)}]({file})\n\n{markdown(caption)}" for file, caption in pictures)
    write_text(
        path / "README.md",
        f"# {markdown(title)}\n\n{asked}\n\n{markdown_table(body, head)}\n\n"
        "log Z estimates log E_p[exp(λ r)] (± standard error where one exists; a dash where the method has none). "
        "ESS is the effective number of samples among the weights. Roots: distinct draws of x_T among the samples "
        f"that carry weight.\n\n## To know before using the numbers\n\n{known}\n\n## Certificate\n\n{claimed}\n\n"
        f"{shown}\n",
    )


def resume_command(path: str | Path) -> str:
    """What to type to go on with a run."""
    return f"treesearch resume {shlex.quote(str(path))}"
