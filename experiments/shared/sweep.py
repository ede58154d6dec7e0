"""One sweep: every cell of method, settings, place, budget and seed once, settings chosen on seeds of their own.

    sweep = Sweep(Cells(file, KEY), run, words)
    sweep.fill(Job(..., how, seed) for name, how in tuned(names, METHODS) for seed in tuning_seeds)
    picked = sweep.choice(place | {"method": name}, choose)["picked"]      a row as well, made where it is absent
    sweep.fill(Job(..., picked, seed) for seed in seeds)

A row is written as soon as its cell is done, and a cell whose row is there is not run: a sweep that was stopped goes on
where it was. An experiment says what its jobs are, how one is run, and what the rows of a grid are worth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.shared.cells import Cells, Row
from experiments.shared.grids import Entry, How
from treesearch.errors import TreeSearchError
from treesearch.rewards.base import RewardError
from treesearch.runs.files import write_text

FAILURES = (TreeSearchError, ArithmeticError, ValueError)  # of a cell, whose row then says why it has no figures


@dataclass(frozen=True)
class Job:
    """A cell to run; its fields are what identifies its row."""

    @property
    def row(self) -> Row:
        """The identity."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


J = TypeVar("J", bound=Job)


class Sweep(Generic[J]):
    """Fills a file of cells.

    Args:
        cells: rows that are there.
        run: job -> its whole row, with an `error` where it failed.
        words: what is printed of a row that did not.
        then: called after each job, run now or earlier.
    """

    def __init__(
        self,
        cells: Cells,
        run: Callable[[J], Row],
        words: Callable[[Row], str],
        then: Callable[[J], None] = lambda job: None,
    ) -> None:
        self.cells, self._run, self._words, self._then = cells, run, words, then

    def fill(self, jobs: Iterable[J]) -> None:
        """Run the jobs whose rows are not there."""
        jobs = list(jobs)
        for i, job in enumerate(jobs):
            if job.row not in self.cells:
                self.cells.add(row := self._run(job))
                asked = " ".join(map(str, job.row.values()))
                said = row.get("error") or self._words(row)
                print(f"{i + 1}/{len(jobs)} {asked}: {said}, {row.get('seconds', 0):.1f} s", flush=True)
            self._then(job)

    def choice(self, where: Row, choose: Callable[[], Row]) -> Row:
        """The row that says which settings were chosen somewhere; `choose` has its other fields, if it is not there."""
        identity = {"kind": "choice"} | where
        if not self.cells.where(**identity):
            self.cells.add(identity | choose())
        return self.cells.where(**identity)[0]


def tuned(names: Iterable[str], methods: Mapping[str, Entry]) -> Iterator[tuple[str, How]]:
    """Every setting of the methods that have a choice."""
    for name in names:
        grid = methods[name].grid
        yield from ((name, how) for how in (grid if len(grid) > 1 else ()))


def check_seeds(seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
    """Nothing is reported on seeds that it was tuned on.

    Raises:
        ValueError: some are in both.
    """
    if set(seeds) & set(tuning_seeds):
        raise ValueError("seeds and tuning_seeds overlap: report on seeds that nothing was tuned on")


def reporting(name: str, key: Sequence[str], page: Callable[[Sequence[Row]], str]) -> type:
    """A script's command `report`: the page of the rows that its command `run` wrote.

    Args:
        name: of both files below runs/results/.
        key: of the rows.
        page: rows -> text.
    """

    @dataclass(frozen=True, kw_only=True)
    class Report:
        """The page of the rows."""

        rows: Path = Path(f"runs/results/{name}.jsonl")
        """what `run` wrote"""
        out: Path = Path(f"runs/results/{name}.md")
        """the page"""

        def run(self) -> int:
            if self.out.suffix == self.rows.suffix:
                raise ValueError(f"--out {self.out} would take the place of rows: it is the page, --rows names them")
            if not (rows := Cells(self.rows, key).rows):
                raise ValueError(f"no rows in {self.rows}: fill some by run, or name others by --rows")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.out, page(rows))
            print(self.out)
            return 0

    return Report


def command_line(name: str, commands: Mapping[str, Any], argv: Sequence[str] | None, description: str | None) -> int:
    """Run one of a script's commands; returns its exit code."""
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(dict(commands), args=argv, description=description).run()
    except (TreeSearchError, RewardError, ValueError, ImportError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on", file=sys.stderr)
        return 130
