"""What reports of sampling experiments share: rows by what identifies them, tables, what failed, where it ran.

A place is a bed or a target. A line is a method with its published settings or with those that tuning chose; a method
has one line where they are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.shared.cells import Row, read
from experiments.shared.stats import Mean, mean_se
from experiments.shared.tables import NOT_RUN, table
from treesearch.errors import StoreError
from treesearch.report.tables import DASH, markdown_table

Which = Literal["published", "tuned"]
WHICH: tuple[Which, ...] = ("published", "tuned")
COSTS = {
    "nfe": "NFE",
    "work": "NFE + 2·backward",
    "reward_calls": "reward calls",
    "seconds": "seconds",
    "nodes": "nodes",
    "tree_bytes": "tree, bytes",
    "state_bytes": "states, bytes",
}
FAILED = "failed"


# rows


def read_all(files: Sequence[Path], key: Sequence[str]) -> list[Row]:
    """Rows of those files that are there, each identity once.

    Raises:
        StoreError: none is there, or one is damaged.
    """
    there = [file for file in files if file.exists()]
    if not there:
        raise StoreError(f"cannot read {' or '.join(map(str, files))}: run the experiment first")
    rows = [row for file in there for row in read(file)]
    known: dict[str, Row] = {}
    for row in rows:
        known.setdefault(json.dumps([row.get(name) for name in key], sort_keys=True), row)
    return list(known.values())


def text_of(settings: Row) -> str:
    """Settings, to compare and to show."""
    return json.dumps(settings, sort_keys=True)


class Line(NamedTuple):
    """A method and its settings; None where nothing of it is known."""

    label: str
    method: str
    settings: str | None


Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Found:
    """Rows by what identifies them.

    Args:
        place: field that names the place.
        references: reference rows, by place, those of the largest pool.
        methods: of each place, in order.
        choices: (place, method) -> what tuning chose.
        cells: (place, method, settings as JSON, budget) -> rows, one a seed, with their distances.
    """

    place: str
    references: dict[str, Row]
    methods: dict[str, list[str]]
    choices: dict[tuple[str, str], Row]
    cells: dict[Key, list[Row]]

    @property
    def places(self) -> list[str]:
        """In order."""
        return list(self.methods)

    @property
    def budgets(self) -> list[int]:
        """Of the cells."""
        return sorted({key[3] for key in self.cells})

    @property
    def all_methods(self) -> list[str]:
        """Of any place, in order."""
        return list(dict.fromkeys(name for names in self.methods.values() for name in names))

    def line(self, place: str, method: str, which: Which) -> Line:
        """Published or chosen settings of a method."""
        choice = self.choices.get((place, method))
        if choice is None:
            run = next((key[2] for key in self.cells if key[:2] == (place, method)), None)
            return Line(method, method, run)
        tuned, published = text_of(choice["picked"]), text_of(choice["published"])
        if tuned == published:
            return Line(f"{method}, published = tuned" if len(choice["grid"]) > 1 else method, method, tuned)
        return Line(f"{method}, {which}", method, tuned if which == "tuned" else published)

    def lines(self, place: str) -> list[Line]:
        """All of a place, the chosen settings of a method before its published ones."""
        both = [self.line(place, method, which) for method in self.methods[place] for which in reversed(WHICH)]
        return list(dict.fromkeys(both))

    def named(self) -> dict[str, tuple[str, Which]]:
        """Label -> method and settings, for tables that go over places; a method without a grid has one label."""
        grids = {method for (_, method), choice in self.choices.items() if len(choice["grid"]) > 1}
        return {
            (f"{method}, {which}" if method in grids else method): (method, which)
            for method in self.all_methods
            for which in reversed(WHICH)
        }

    def rows(self, place: str, line: Line, budget: int) -> list[Row]:
        """Cells of a line."""
        return self.cells.get((place, line.method, line.settings or "", budget), [])

    def values(self, place: str, line: Line, budget: int, metric: str) -> dict[int, float]:
        """A metric by seed; nothing where a seed failed or the method has no such metric."""
        rows = self.rows(place, line, budget)
        return {} if any(row.get(metric) is None for row in rows) else {row["seed"]: row[metric] for row in rows}

    def mean(self, place: str, line: Line, budget: int, metric: str) -> Mean | None:
        """Mean over seeds, None where there are no values."""
        values = list(self.values(place, line, budget, metric).values())
        return mean_se(values) if values else None


def gather(rows: Sequence[Row], place: str, names: Mapping[str, Sequence[str]] | None = None) -> Found:
    """Sort rows.

    Args:
        rows: of any kind; those of other kinds are left out.
        place: field that names the place.
        names: places, and methods of each, that the report shows even where nothing was run; others follow them.
    """
    methods = {name: list(known) for name, known in (names or {}).items()}
    cells: dict[Key, dict[int, Row]] = {}
    rows = sorted(rows, key=lambda row: (row["kind"] == "cell distances", row.get("pool") or 0))
    for row in rows:
        if row["kind"] in ("choice", "cell") and row["method"] not in methods.setdefault(row[place], []):
            methods[row[place]].append(row["method"])
        if row["kind"] in ("cell", "cell distances"):
            key = (row[place], row["method"], text_of(row["settings"]), row["budget"])
            known = cells.setdefault(key, {})
            known[row["seed"]] = known.get(row["seed"], {}) | row
    return Found(
        place,
        {row[place]: row for row in rows if row["kind"] == "reference"},
        methods,
        {(row[place], row["method"]): row for row in rows if row["kind"] == "choice"},
        {key: list(each.values()) for key, each in cells.items()},
    )


# tables


def cell_text(rows: Sequence[Row], name: str, scale: float = 1.0) -> str | None:
    """Mean ± standard error over seeds, None where nothing was run."""
    if not rows:
        return None
    if any("error" in row for row in rows):
        return FAILED
    values = [row[name] for row in rows if row.get(name) is not None]
    return mean_se(values).text(scale) if len(values) == len(rows) else DASH


def metric_table(found: Found, place: str, budget: int, metrics: Mapping[str, tuple[str, float]]) -> str:
    """One place at one budget: lines by metrics, (title, scale) each."""
    lines = {line.label: line for line in found.lines(place)}
    columns = {title: (name, scale) for name, (title, scale) in metrics.items()}

    def one(label: str, column: str) -> str | None:
        rows = found.rows(place, lines[label], budget)
        return (str(len(rows)) if rows else None) if column == "seeds" else cell_text(rows, *columns[column])

    return table(list(lines), [*columns, "seeds"], one)


def cost_table(found: Found, budget: int) -> str:
    """What a line took at one budget, means over places and seeds; seconds where all ran on one machine class."""
    named = found.named()
    whole = [row for key, each in found.cells.items() for row in each if key[3] == budget and "error" not in row]
    shown = {name for row in whole for name in row} - ({"seconds"} if machines(whole) > 1 else set())
    columns = {title: name for name, title in COSTS.items() if name in shown}

    def one(label: str, column: str) -> str | None:
        rows = [row for place in found.places for row in found.rows(place, found.line(place, *named[label]), budget)]
        values = [row[columns[column]] for row in rows if "error" not in row]
        return Mean(float(np.mean(values)), math.nan).text() if values else FAILED if rows else None

    return table(list(named), list(columns), one)


def machines(rows: Sequence[Row]) -> int:
    """How many machine classes rows ran on."""
    return len({row["machine"] for row in rows if "machine" in row})


def sections(found: Found, metrics: Mapping[str, tuple[str, float]], budgets: Sequence[int]) -> list[str]:
    """Every place at every budget, then costs."""
    parts, budgets = [], found.budgets or budgets
    for place in found.places:
        for n in budgets:
            run = any(found.rows(place, line, n) for line in found.lines(place))
            parts.append(f"## {place}, {n:,} NFE\n\n{metric_table(found, place, n, metrics) if run else NOT_RUN}")
    for n in found.budgets:
        parts.append(f"## Costs at {n:,} NFE, mean over {found.place}s\n\n{cost_table(found, n)}")
    return parts


def coverage_table(found: Found, budgets: Sequence[int], seeds: int) -> str:
    """How many lines of each place have so many seeds or more."""
    budgets = sorted({*budgets, *found.budgets})

    def one(place: str, column: str) -> str | None:
        budget, lines = int(column.split()[0].replace(",", "")), found.lines(place)
        counts = [len(found.rows(place, line, budget)) for line in lines]
        whole = sum(count >= seeds for count in counts)
        return f"{whole} of {len(lines)} lines" if sum(counts) else None

    body = table(found.places, [f"{n:,} NFE" for n in budgets], one, corner=found.place)
    return f"Lines with {seeds} seeds or more.\n\n{body}"


def grid_table(found: Found) -> str:
    """Settings of the grids, by method; the first ones are published."""
    grids = {method: choice["grid"] for (_, method), choice in found.choices.items() if len(choice["grid"]) > 1}
    most = max((len(grid) for grid in grids.values()), default=0)
    body = []
    for method in found.all_methods:
        shown = [f"`{text_of(each['settings'])}`" for each in grids.get(method, ())]
        if shown:
            body.append([method, *shown, *[DASH] * (most - len(shown))])
    columns = ("method", "1, published", *(str(i) for i in range(2, most + 1)))
    return markdown_table(body, columns) if body else NOT_RUN


def choice_table(found: Found) -> str:
    """Scores of the grids; the chosen one is bold."""
    body = []
    for (place, method), choice in found.choices.items():
        if len(choice["grid"]) == 1:
            continue
        scores = []
        for each in choice["grid"]:
            score = FAILED if each["mmd2"] is None else f"{each['mmd2'] * 1e3:.3g}"
            scores.append(f"**{score}**" if each["settings"] == choice["picked"] else score)
        body.append([place, method, f"`{text_of(choice['picked'])}`", ", ".join(scores)])
    return (
        markdown_table(body, (found.place, "method", "chosen", "MMD² × 10³ of settings 1, 2, …")) if body else NOT_RUN
    )


def tuning_section(found: Found) -> str:
    """Grids and choices."""
    return f"## Tuning\n\nGrids:\n\n{grid_table(found)}\n\nChoices:\n\n{choice_table(found)}"


# what is wrong, and where it ran


def failures(found: Found) -> str:
    """A line for every cell that failed on some seed."""
    lines = []
    for (place, method, settings, budget), rows in found.cells.items():
        errors = [row["error"] for row in rows if "error" in row]
        if errors:
            why = errors[0].split(",")[0].split(" (")[0]
            lines.append(
                f"- {place}, {method}, `{settings}`, {budget:,} NFE, {len(errors)} of {len(rows)} seeds: {why}"
            )
    return "\n".join(lines) or "None."


def below(found: Found) -> str:
    """A line for every cell that ended below 95 % of its budget."""
    lines = []
    for (place, method, settings, budget), rows in found.cells.items():
        nfe = [row["nfe"] for row in rows if "error" not in row]
        if nfe and np.mean(nfe) < 0.95 * budget:
            lines.append(f"- {place}, {method}, `{settings}`: {np.mean(nfe):,.0f} of {budget:,} NFE")
    return "\n".join(lines) or "None."


def where(rows: Sequence[Row]) -> str:
    """Machines, versions, and the seconds of all rows."""
    machines = dict.fromkeys(f"- {row['machine']}; {row['versions']}" for row in rows if "machine" in row)
    spent: dict[str, list[float]] = {}
    for row in rows:
        if row.get("seconds"):
            spent.setdefault(row["kind"], []).append(row["seconds"])
    kinds = ", ".join(f"{kind} {sum(s):,.0f} s in {len(s):,} rows" for kind, s in spent.items())
    total = sum(map(sum, spent.values()))
    return "\n".join(machines) + f"\n\n{total:,.0f} s = {total / 3600:.2f} h in all: {kinds}."
