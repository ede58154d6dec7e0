"""Students on the ring: pages are what the rows say, what was claimed holds in the rows, and again where it is run."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch

from experiments.shared.cells import read
from experiments.students import beds, evaluate_mnist, evidence

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "students"


@pytest.fixture(scope="module")
def rows():
    return read(RESULTS / "ring.jsonl")


def figure(rows, table, arm, name):
    """Of every seed."""
    found = [row[name] for row in rows if (row["table"], row["arm"]) == (table, arm)]
    assert found
    return found


def test_committed_pages_are_what_the_command_writes(rows):
    assert evidence.page(rows) == (RESULTS / "ring.md").read_text("utf-8"), "run make pages"
    figures = json.loads((RESULTS / "mnist.json").read_text("utf-8"))
    assert evaluate_mnist.page(figures) == (RESULTS / "mnist.md").read_text("utf-8")


def test_rectified_students_are_first_order_and_good_in_one_step(rows):
    for seed, one in enumerate(figure(rows, "rectified", "rectified", "w1 at 1")):
        assert one < 0.2 * figure(rows, "rectified", "teacher", "w1 at 1")[seed]
        assert one < 0.5 * figure(rows, "rectified", "plain ε", "w1 at 1")[seed]  # the loss in x̂_0
    ours, theirs = (figure(rows, "rectified", arm, "variance of ε") for arm in ("rectified", "teacher"))
    assert all(a < 0.2 * b for a, b in zip(ours, theirs, strict=True))


def test_inconsistency_falls_fivefold_and_few_steps_beat_the_teacher_s(rows):
    for arm in ("consistency", "sub-path, linear", "flow map"):
        assert min(figure(rows, "consistency, sd", arm, "inconsistency, before over after")) > 5
        for n in (1, 2):
            pairs = (figure(rows, "consistency, sd", each, f"w1 at {n}") for each in (arm, "teacher"))
            assert all(a < b for a, b in zip(*pairs, strict=True))


def test_a_restorer_halves_the_distance(rows):
    for arm in ("dynamic", "fixed"):
        pairs = zip(*(figure(rows, "revive", each, "energy") for each in (arm, "degraded")), strict=True)
        assert all(a < 0.5 * b for a, b in pairs)
        pairs = zip(*(figure(rows, "revive", each, "energy") for each in (arm, "regression")), strict=True)
        assert all(a < b for a, b in pairs)


def test_a_search_trains_a_student_that_needs_no_search(rows):
    search, one = (figure(rows, "reflow", arm, "reward") for arm in ("search", "student in 1"))
    assert all(abs(a - b) < 0.05 for a, b in zip(search, one, strict=True))


def test_pages_have_a_table_for_each_part_that_was_run():
    row = {"table": "rectified", "arm": "teacher", "seed": 0, "w1 at 1": 1.5, "seconds": 2.0}
    text = evidence.page([row, row | {"seed": 1, "w1 at 1": 2.5}])
    assert "## rectified" in text
    assert "| teacher | 2.00 ± 0.50 |" in text
    assert "## reflow" not in text


def test_distances_of_the_beds():
    x, y = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(0))
    assert abs(beds.energy_distance(x, y)) < 0.05
    assert beds.energy_distance(x, y + 3) > 2
    points, mode = beds.ring(500, 0)
    assert mean(points.norm(dim=1).tolist()) == pytest.approx(beds.RADIUS, abs=0.05)
    assert mode.unique().tolist() == list(range(beds.MODES))


@pytest.mark.slow
def test_a_seed_of_its_own_says_the_same():
    teacher, one = ({**evidence.rectified(arm, 11)} for arm in ("teacher", "rectified"))
    assert one["w1 at 1"] < 0.2 * teacher["w1 at 1"]
    assert one["variance of ε"] < 0.2 * teacher["variance of ε"]
    found = evidence.consistency("sd")("consistency", 11)
    assert found["inconsistency, before over after"] > 5
