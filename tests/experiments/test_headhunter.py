"""The hunt for heads: what it selects, what it is compared to, cells that go on, and the committed page."""

from pathlib import Path

import pytest

import experiments.headhunter.__main__ as command
from experiments.headhunter import report
from experiments.headhunter.hunt import by_part, every_head, hunt, layers, others, written
from experiments.shared.cells import Cells

HEADS = every_head({"a": 2, "b": 3})


def test_it_adds_the_best_heads_of_each_round():
    """Worth 5, 1, 4, 3, 2 alone, and less the second of a layer: greedy is told of what is there already."""
    worth, asked = dict(zip(HEADS, (5.0, 1.0, 4.0, 3.0, 2.0), strict=True)), []

    def score(of):
        asked.append(of)
        return sum(worth[head] for head in of) - 10 * (len(of) - len({name for name, _ in of}))

    assert hunt(HEADS, score, 2, 1) == [(("a", 0),), (("a", 0), ("b", 0))]
    assert len(asked) == 5 + 4
    assert hunt(HEADS, score, 1, 2) == [(("a", 0), ("b", 0))]
    assert hunt(HEADS, lambda of: 0.0, 9, 2)[-1] == HEADS


def test_it_is_compared_to_all_other_sets_or_to_some():
    assert layers(HEADS) == [(("a", 0), ("a", 1)), (("b", 0), ("b", 1), ("b", 2))]
    chosen = (("a", 1), ("b", 2))
    every, some = others(HEADS, chosen, 20), others(HEADS, chosen, 4)
    assert (len(set(every)), len(set(some))) == (9, 4)
    assert chosen not in [*every, *some]
    assert all(len(of) == 2 and list(of) == [head for head in HEADS if head in of] for of in some)
    assert by_part(chosen) == {"a": [1], "b": [2]}
    assert command._read(written(HEADS)) == set(HEADS)


def test_a_hunt_goes_on_where_it_was_and_is_told(tmp_path, capsys):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    words = [
        "run",
        "--kernel",
        "mnist(num_steps=2)",
        "--reward",
        "brightness",
        "--n",
        "3",
        "--held",
        "4",
        "--rounds",
        "1",
    ]
    assert command.main([*words, "--out", str(rows)]) == 0
    before = rows.read_bytes()
    assert command.main([*words, "--out", str(rows)]) == 0
    assert rows.read_bytes() == before
    assert command.main(["report", "--rows", str(rows), "--out", str(page)]) == 0
    cells = Cells(rows, report.KEY)
    plain = next(row for row in cells.rows if row["heads"] == "" and row["n"] == 4)
    assert f"| none | - | {plain['mean']:.4g} (" in page.read_text("utf-8")
    assert "| 2 others of that size |" in page.read_text("utf-8")
    assert command.main(["run", "--kernel", "spd(num_steps=2)", "--out", str(rows)]) == 1
    assert "0 heads of self-attention" in capsys.readouterr().err
    assert command.main([*words, "--rounds", "0", "--out", str(rows)]) == 1
    with pytest.raises(ValueError, match="run the experiment first"):
        report.page([])


def test_the_committed_page_is_that_of_the_committed_rows():
    folder = Path(report.__file__).parents[1] / "results" / "interventions"
    rows = Cells(folder / "headhunter.jsonl", report.KEY).rows
    assert report.page(rows) == (folder / "headhunter.md").read_text("utf-8")
