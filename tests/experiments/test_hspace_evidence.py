"""Attributes of pixels, the command that finds directions, the shipped ones, and the page of what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.interventions import directions, hspace
from experiments.interventions.attributes import ATTRIBUTES, measured, size, slant, thickness
from experiments.shared.cells import Cells
from treesearch.backends import hspace as moved
from treesearch.backends import mnist
from treesearch.backends.base.kernel import describe
from treesearch.backends.interventions.directions import Directions
from treesearch.backends.models.shipped import shipped_file

SHIPPED = "hspace.safetensors"


def bar(width, height, lean=0.0):
    """An upright stroke that leans to the right by so many pixels a pixel of height."""
    image = torch.zeros(1, 1, 40, 40)
    for y in range(-height // 2, height // 2):
        left = 20 + round(-lean * y) - width // 2
        image[0, 0, 20 + y, left : left + width] = 1.0
    return image


def test_attributes_are_those_of_strokes():
    assert float(slant(bar(3, 30, 0.5))) == pytest.approx(0.5, abs=0.03)
    assert float(slant(bar(3, 30))) == pytest.approx(0.0, abs=0.03)
    assert float(thickness(bar(4, 36)) / thickness(bar(2, 36))) == pytest.approx(2.0, rel=0.15)
    assert float(size(bar(2, 30)) / size(bar(1, 15))) == pytest.approx(2.0, rel=0.05)
    assert measured(torch.zeros(2, 1, 28, 28)).isfinite().all()


@pytest.mark.parametrize(
    "words",
    [
        ["pca", "--k", "2", "--rollouts", "6"],
        ["supervised", "--labels", "slant", "brightness", "--apart", "--rollouts", "8", "--part", "up_blocks.0"],
        ["jacobian", "--t", "2", "--k", "1", "--box", "0", "0", "14", "14"],
    ],
    ids=lambda words: words[0],
)
def test_the_command_writes_directions_that_the_kernel_takes(words, tmp_path, monkeypatch):
    monkeypatch.setattr(directions, "SHOWN", 2)
    out = tmp_path / "found.safetensors"
    assert directions.main([*words, "--kernel", "mnist(num_steps=3)", "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 1000
    found = moved(mnist(num_steps=3), str(out))
    assert words[0] in found.intervention.directions.card.method


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    out = ["--kernel", "mnist(num_steps=3)", "--out", str(tmp_path / "a.safetensors")]
    for words, says in (
        (["jacobian", "--t", "9", *out], "expected 1..T = 3"),
        (["jacobian", "--t", "2", "--box", "3", "0", "3", "9", *out], "empty"),
        (["pca", "--part", "nowhere", *out], "no part"),
    ):
        assert directions.main(words) == 1
        assert says in capsys.readouterr().err


def test_the_shipped_directions_are_of_the_shipped_model_and_move_what_they_are_called_after():
    with shipped_file(SHIPPED) as path:
        assert path.stat().st_size < 200_000
    card = Directions.load(SHIPPED).card
    assert card.names == tuple(ATTRIBUTES)
    kernel = moved(mnist(num_steps=25, eta=0.0), SHIPPED)
    assert describe(kernel).num_steps == 25
    noise = directions.noises(kernel, 8, 7)
    low, high = (
        kernel.decode(directions.carried(kernel, noise[25], 25, noise, kernel.intervention.settings.index(name) + 1))
        for name in ("slant -3", "slant 3")
    )
    assert float((slant(high) - slant(low)).mean()) > 0.1  # half a standard deviation of it among samples


def test_shares_and_leaks_are_what_their_names_say():
    x = torch.zeros(3, 1, 28, 28)
    x[1, 0, :14, 14:] = 1.0
    x[2, 0, 14:, :14] = 1.0
    assert hspace.share(x, directions.boxed((1, 28, 28), hspace.BOX)) == pytest.approx(0.5)
    assert hspace.AREA == 0.25
    assert hspace.leaked({"slopes": [[2.0, 0.5, -0.5], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]}, 0) == pytest.approx(0.5)
    assert hspace.leaked({"slopes": [[2.0, 0.5, -0.5], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]}, 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="run the experiment first"):
        hspace.report([])


def test_a_cell_of_siblings_is_paid_for_alike(monkeypatch):
    monkeypatch.setattr(hspace, "PARENTS", 1)
    rows = [hspace.diversity(hspace.Job("diversity", way, "", 2, 0)) for way in hspace.WAYS]
    assert {row["nfe"] for row in rows} == {14}
    assert all(row["distance"] > 0 for row in rows)


def test_the_committed_page_is_that_of_the_committed_rows():
    folder = Path(hspace.__file__).parents[1] / "results" / "interventions"
    assert hspace.report(Cells(folder / "hspace.jsonl", hspace.KEY).rows) == (folder / "hspace.md").read_text("utf-8")
