"""One sweep: cells run once, choices, and committed rows: their sweeps find nothing to run."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.coverage import evidence as coverage
from experiments.mixtures import evidence as mixtures
from experiments.mnist import evidence as mnist
from experiments.mnist.targets import CORE
from experiments.planning import evidence as planning
from experiments.planning import locomotion_planning as locomotion
from experiments.shared import sweep
from experiments.shared.cells import Cells, read
from experiments.shared.grids import Entry, first_best
from experiments.shared.sweep import Sweep, reporting, tuned
from treesearch.errors import StoreError

BEDS = ("linear, mild", "discrete")
RESULTS = Path(__file__).parents[2] / "experiments" / "results"
# script, what runs a cell, committed rows, what of them is complete
COMMITTED = {
    "mixtures": (
        mixtures,
        ["cell", "target_of"],
        "mixtures/mixtures.jsonl",
        ["--nfe", "10k", "100k", "--beds", "ring"],
    ),
    "mnist": (mnist, ["sampled", "references"], "mnist/mnist_evidence.jsonl", ["--methods", *CORE[:-1]]),
    "search": (
        mnist,
        ["searched"],
        "mnist/mnist_search.jsonl",
        ["--part", "search", "--searchers", "fk_max", "beam", "--levels", "1k", "3k", "10k"],
    ),
    "planning": (
        planning,
        ["played", "base_rates"],
        "planning/planning.jsonl",
        ["--receding", "best_of_n", "fk", "--receding-rollouts", "1", "4", "16"],
    ),
    "locomotion": (
        locomotion,
        ["played"],
        "planning/locomotion.jsonl",
        ["--methods", "base", "best_of_n", "fk", "diffuser", "--rollouts", "8", "32"],
    ),
    "coverage": (coverage, ["cell"], "coverage/coverage.jsonl", ["--beds", *BEDS]),
}


@dataclass(frozen=True)
class Job(sweep.Job):
    method: str
    seed: int


def test_every_cell_is_run_once_and_errors_are_said(tmp_path, capsys):
    run, after, file = [], [], tmp_path / "cells.jsonl"

    def one(job):
        run.append(job)
        return job.row | ({"error": "too much"} if job.seed == 2 else {"value": job.seed / 2})

    for _ in range(2):
        every = Sweep(Cells(file, ("method", "seed")), one, lambda row: f"value {row['value']}", after.append)
        every.fill(Job("a", seed) for seed in (1, 2))
    assert run == [Job("a", 1), Job("a", 2)]
    assert after == run * 2
    assert read(file) == [{"method": "a", "seed": 1, "value": 0.5}, {"method": "a", "seed": 2, "error": "too much"}]
    assert capsys.readouterr().out == "1/2 a 1: value 0.5, 0.0 s\n2/2 a 2: too much, 0.0 s\n"


def test_a_file_is_of_one_kind_of_cells(tmp_path):
    file, key = tmp_path / "cells.jsonl", ("method",)
    Cells(file, key, {"pairs": 4, "weights": "a"}).add({"method": "one"})
    assert read(file) == [{"asked": {"pairs": 4, "weights": "a"}, "method": "one"}]
    assert {"method": "one"} in Cells(file, key, {"pairs": 4, "weights": "a", "later": 1})
    with pytest.raises(StoreError, match=r"rows of pairs 4, not 5: name another file with --out"):
        Cells(file, key, {"pairs": 5, "weights": "a"})
    with pytest.raises(StoreError, match="rows of weights a, not b"):
        Cells(file, key, {"pairs": 4, "weights": "b"})
    assert Cells(file, key).rows == read(file)


def test_a_choice_is_made_once(tmp_path):
    every = Sweep(Cells(tmp_path / "cells.jsonl", ("kind", "bed")), lambda job: {}, lambda row: "")
    assert every.choice({"bed": "x"}, lambda: {"picked": {"c": 1}})["picked"] == {"c": 1}
    assert every.choice({"bed": "x"}, lambda: pytest.fail("chosen again"))["picked"] == {"c": 1}
    assert [row["bed"] for row in read(tmp_path / "cells.jsonl")] == ["x"]


def test_only_methods_with_a_choice_are_tuned():
    methods = {"one": Entry(dict), "two": Entry(dict, ({"x": 1}, {"x": 2}))}
    assert list(tuned(methods, methods)) == [("two", {"x": 1}), ("two", {"x": 2})]


def test_the_first_of_the_best_is_chosen():
    assert first_best([None, 2.0, 1.0, 1.0], min) == 2
    assert first_best([None, [0.5, 1.0], [0.5, 2.0]], max) == 2
    assert first_best([None, None], min) == 0


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_are_complete_for_their_sweep(name, tmp_path, monkeypatch):
    script, runners, rows, words = COMMITTED[name]
    file = tmp_path / "rows.jsonl"
    shutil.copy(RESULTS / rows, file)
    for runner in runners:
        monkeypatch.setattr(script, runner, lambda *given: pytest.fail(f"{given[0]} is run again"))
    if script in (mixtures, mnist):
        words = [*words, "--work", str(tmp_path / "work")]
    if name == "locomotion":
        made = SimpleNamespace(horizon=16, fingerprint=read(file)[0]["asked"]["fingerprint"])
        monkeypatch.setattr(script, "kernel_of", lambda *given: made)
    if name == "mnist":
        np.savez(tmp_path / "mnist.npz")
        words = [*words, "--data", str(tmp_path / "mnist.npz")]
    assert script.main(["run", "--out", str(file), *words]) == 0
    assert file.read_bytes() == (RESULTS / rows).read_bytes()


def test_a_page_needs_rows_and_takes_not_their_place(tmp_path):
    report = reporting("none", ("at",), lambda rows: f"{len(rows)} rows")
    with pytest.raises(ValueError, match=r"no rows in .*rows\.jsonl: fill some by run"):
        report(rows=tmp_path / "rows.jsonl", out=tmp_path / "page.md").run()
    with pytest.raises(ValueError, match="would take the place of rows"):
        report(rows=tmp_path / "rows.jsonl", out=tmp_path / "others.jsonl").run()
    (tmp_path / "rows.jsonl").write_text('{"at": 1}\n')
    assert report(rows=tmp_path / "rows.jsonl", out=tmp_path / "new/page.md").run() == 0
    assert (tmp_path / "new/page.md").read_text() == "1 rows"
