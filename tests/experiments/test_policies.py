"""Scripts of steered policies: rows, pages and the demo, from learners that have hardly begun."""

import json

import pytest

from experiments.policies import compare, demo_policy, learning, shares


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A learner that has looked round, and learnt for one segment of two steps."""
    return tmp_path_factory.mktemp("learners")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (learning, compare):
        settings = {"batch_size": 4, "updates": 1, "noise_steps": 1, "warmup": 3, "every": 4, "temperature": 0.01}
        monkeypatch.setattr(module, "SETTINGS", settings | {"width": 8})


def test_learning_keeps_its_rows_and_writes_its_page(tmp_path, work):
    rows, page = tmp_path / "learning.jsonl", tmp_path / "learning.md"
    how = ["--seeds", "0", "--steps", "4", "--episodes", "2", "--work", str(work), "--out", str(rows)]
    assert learning.main(["run", *how]) == 0
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [(row["method"], row["steps"]) for row in found] == [("na", [4]), ("sac", [4]), ("na_search", [4])]
    assert all(row["untouched"] for row in found)
    before = rows.read_text(encoding="utf-8")
    assert learning.main(["run", *how]) == 0
    assert rows.read_text(encoding="utf-8") == before
    assert learning.main(["report", "--rows", str(rows), "--out", str(page)]) == 0
    assert "## sac" in page.read_text(encoding="utf-8")


def test_every_method_of_the_comparison_plays(tmp_path, work):
    rows, page = tmp_path / "compare.jsonl", tmp_path / "compare.md"
    how = [
        "--seeds",
        "0",
        "--steps",
        "4",
        "--episodes",
        "1",
        "--rollouts",
        "2",
        "--work",
        str(work / "few"),
        "--out",
        str(rows),
    ]
    assert compare.main(["run", *how]) == 0
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [row["method"] for row in found] == list(compare.METHODS)
    assert not [row for row in found if "error" in row]
    assert compare.main(["report", "--rows", str(rows), "--out", str(page)]) == 0
    assert "tree_search_law" in page.read_text(encoding="utf-8")


def test_learners_of_more_steps_leave_those_of_fewer_as_they_were(tmp_path):
    """4 steps, then 8 beside them: the first learner stays, the second goes on from it."""
    rows, work = tmp_path / "rows.jsonl", tmp_path / "few"

    def kept(steps):
        index = json.loads((work / f"na_0_{steps}" / "dsrl.json").read_text(encoding="utf-8"))
        return index["steps"], index["episodes"]

    how = ["--seeds", "0", "--methods", "dsrl", "--episodes", "1", "--work", str(work), "--out", str(rows), "--steps"]
    assert compare.main(["run", *how, "4"]) == 0
    first = kept(4)
    assert compare.main(["run", *how, "8", "4"]) == 0
    assert kept(4) == first
    assert kept(8)[0] == 8
    assert kept(8)[1][: len(first[1])] == first[1]
    found = [json.loads(line)["steps"] for line in rows.read_text(encoding="utf-8").splitlines()]
    assert found == [4, 8]
    assert compare.main(["run", *how[:-1], "--episodes", "2", "--steps", "4"]) == 1


def test_the_demo_leaves_a_table_and_a_picture(tmp_path, capsys):
    assert demo_policy.main(["--steps", "4", "--episodes", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "weights of the policy unchanged" in said
    assert (tmp_path / "routes.png").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("\n") == 2 + len(demo_policy.SHOWN)
    assert demo_policy.main(["--steps", "5", "--out", str(tmp_path)]) == 1
    assert "multiple of every = 4" in capsys.readouterr().err


def test_what_x_t_decides_falls_from_all_to_nothing(tmp_path):
    out = tmp_path / "shares.json"
    assert shares.main(["--noises", "64", "--draws", "16", "--out", str(out)]) == 0
    found = [row["decided"] for row in json.loads(out.read_text(encoding="utf-8")).values()]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1, abs=0.05)
    assert found[-1] == pytest.approx(0, abs=0.1)
