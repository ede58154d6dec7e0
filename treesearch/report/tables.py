"""Tables of a terminal, the summary of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from treesearch.budget import Cost
from treesearch.report.terminal import encodable
from treesearch.results.text import lines as lines_of
from treesearch.text import plain

DASH = "-"


def certified(name: str, tasks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The certificates of one search for people: a heading a task, and its lines."""
    found = {}
    for i, task in enumerate(tasks):
        which = "" if len(tasks) == 1 else f", task {i}" + (f": {task['prompt']}" if task["prompt"] else "")
        found[name + which] = lines_of(task["certificate"])
    return found


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
        ess = DASH if task["log_z"] is None else f"{task['ess']:.1f}"  # a greedy search has no weights towards π
        out.append([label, *numbers, z + se, ess, str(task["roots"]), *spent])
    return out


def notes(tasks: Sequence[Mapping[str, Any]], cost: Cost) -> list[str]:
    """What to know before using the numbers of one search."""
    drafted = [f"{cost.draft_nfe:,} of {cost.nfe:,} NFE went into drafts"] if cost.draft_nfe else []
    return [warning for task in tasks for warning in task["warnings"]] + drafted + _timed(cost)


def _timed(cost: Cost) -> list[str]:
    """That NFE alone mislead, where the reward took much of the time."""
    spent = cost.model_seconds + cost.reward_seconds
    if spent < NOTABLE or cost.reward_seconds < MUCH * spent:
        return []
    return [
        f"the kernel took {cost.model_seconds:.1f} s and the reward, with decoding, {cost.reward_seconds:.1f} s: "
        "compare searches by seconds, NFE alone mislead"
    ]


NOTABLE, MUCH = 1.0, 0.25  # seconds, and the share of a reward in them, from which on it is said where they went
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
    sys.stdout.write(encodable(captured.get(), sys.stdout))


def markdown_table(lines: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """A table of cells that are Markdown: texts of others go through `treesearch.text.markdown` first."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines])
