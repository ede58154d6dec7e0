"""Results in notebooks and pipelines: files for programs, columns, what a notebook shows; none is held whole."""

import csv
import gc
import io
import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import treesearch as ts
from tests.support.pages import HOSTILE, Pixels, brightness, pixels
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.show import read_result_of
from treesearch.results import notebook, saving
from treesearch.rewards.analytic import linear


class Texts(LinearGaussian):
    """A chain whose samples are texts."""

    def decode(self, x0):
        return [f"<b>{float(row[0]):.3f}</b>, 1" for row in x0]


class Films(Pixels):
    """A chain whose samples are Pillow images."""

    def decode(self, x0):
        return [Image.fromarray((row[0].clip(0, 1) * 255).byte().numpy()).resize((16, 16)) for row in x0]


class Watched(Pixels):
    """Remembers how many decoded samples are alive whenever it decodes."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.calls = weakref.WeakSet(), 0, []

    def decode(self, x0):
        gc.collect(1)  # of the youngest: what other tests left is not looked through
        made = x0.repeat_interleave(4, -1).clone()
        self.calls.append(len(x0))
        self.most = max(self.most, sum(len(part) for part in self.alive) + len(made))
        self.alive.add(made)
        return made


def length(samples):
    return torch.tensor([float(len(sample)) for sample in samples])


def table(folder):
    with open(folder / "samples.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_arrays_are_saved_in_order_with_their_figures(tmp_path):
    result = pixels(None)
    assert result.save(tmp_path / "r") == tmp_path / "r"
    rows = table(tmp_path / "r")
    assert len(rows) == sum(len(task.leaves) for task in result.tasks)
    for i, task in enumerate(result.tasks):
        own = [row for row in rows if row["task"] == str(i)]
        saved = np.load(tmp_path / "r" / f"task{i}.npy")
        np.testing.assert_array_equal(saved, task.samples.numpy())
        assert [(row["file"], int(row["row"])) for row in own] == [(f"task{i}.npy", j) for j in range(len(saved))]
        assert [float(row["reward"]) for row in own] == task.rewards.tolist()
        assert {row["prompt"] for row in own} == {HOSTILE[i]}
        assert sum(float(row["weight"]) for row in own) == pytest.approx(1.0)
    found = json.loads((tmp_path / "r" / "result.json").read_text("utf-8"))
    assert [task["log_z"] for task in found["tasks"]] == [task.log_z for task in result.tasks]
    assert (found["cost"], found["history"]) == (result.cost.as_dict(), result.history)


def test_texts_and_pictures_are_saved_as_what_they_are(tmp_path):
    texts = ts.search(Texts(num_steps=2), length, ts.BestOfN(n=5))
    texts.save(tmp_path / "texts")
    assert [row["text"] for row in table(tmp_path / "texts")] == texts.samples
    films = ts.search(Films(), lambda x: torch.tensor([float(np.mean(i)) for i in x]), ts.BestOfN(n=3))
    films.save(tmp_path / "films")
    for row, sample in zip(table(tmp_path / "films"), films.samples, strict=True):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "films" / row["file"])), np.asarray(sample.convert("RGB"))
        )


def test_samples_are_let_go_of_as_they_are_written(tmp_path, monkeypatch):
    kernel = Watched()
    result = ts.search(kernel, brightness, ts.BestOfN(n=64), batch_size=64)
    one = 4 * 8 * 32
    monkeypatch.setattr(saving, "BYTES", 5 * one)
    kernel.most, kernel.calls = 0, []
    result.save(tmp_path)
    assert kernel.calls == [1] + [5] * 12 + [3]
    assert kernel.most <= 2 * 5
    assert len(np.load(tmp_path / "task0.npy")) == 64


def test_what_is_saved_stays_whole_where_saving_fails(tmp_path, monkeypatch):
    result = pixels(None, prompts=None)
    result.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = result.tasks[0].fetch
    monkeypatch.setattr(result.tasks[0], "fetch", lambda nodes: kept(nodes) if nodes[0] == result.leaves[0] else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_columns_have_a_row_a_sample(tmp_path):
    result = pixels(tmp_path / "r")
    found = result.to_table()
    count = sum(len(task.leaves) for task in result.tasks)
    assert {len(column) for column in found.values()} == {count}
    np.testing.assert_array_equal(found["reward"], np.concatenate([task.rewards for task in result.tasks]))
    np.testing.assert_array_equal(found["task"], [i for i, task in enumerate(result.tasks) for _ in task.leaves])
    assert found["prompt"][-1] == HOSTILE[-1]
    assert found["key"].dtype == np.uint64
    again = read_result_of(tmp_path / "r")[1].to_table()  # nothing is decoded
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_columns_of_samples_without_weight():
    result = ts.search(LinearGaussian(num_steps=2), lambda x: x[:, 0] * 0 - torch.inf, ts.BestOfN(n=4))
    assert result.to_table()["weight"].tolist() == [0.0] * 4


def test_a_notebook_is_shown_figures_and_the_best_samples_and_no_markup_of_others():
    result = pixels(None)
    html = result._repr_html_()
    assert "FeynmanKac on Pixels, reward brightness" in html
    for prompt in HOSTILE:
        assert prompt not in html
    assert "&lt;script&gt;window.owned=1" in html
    assert "<script" not in html
    png = result._repr_png_()
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert 'src="data:image/png;base64,' in html


def test_a_notebook_is_shown_figures_where_nothing_can_be_seen(tmp_path):
    vectors = ts.search(LinearGaussian(num_steps=2), linear(1.0), ts.BestOfN(n=4), store=tmp_path / "r")
    assert vectors._repr_png_() is None
    read = read_result_of(tmp_path / "r")[1]
    for result in (vectors, read):
        assert f"<td>{float(vectors.rewards.max()):.4g}</td>" in result._repr_html_()
        assert "<img" not in result._repr_html_()


def test_only_what_is_shown_is_decoded():
    kernel = Watched()
    result = ts.search(kernel, brightness, ts.BestOfN(n=64))
    kernel.calls = []
    result._repr_html_()
    assert sum(kernel.calls) == notebook.SAMPLES


def test_the_script_that_measures_it():
    from experiments.bench import saving as script

    found = script._case(9, 128)
    assert 9 * 3 * 128 * 128 * 4 / 2**20 < found["saved_mb"] < 2
    assert found["samples"] == 9


@pytest.mark.parametrize("folder", ["", 3, None])
def test_a_folder_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name a folder"):
        pixels(None).save(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_saved_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ts.StoreError, match="mend that and save the result again") as told:
        pixels(None).save(tmp_path / "file" / "r")
    assert "resume" not in str(told.value)


def test_a_greedy_result_has_no_weights_anywhere():
    found = ts.search(LinearGaussian(num_steps=3), linear(1.0), ts.TreeSearch(wave=4), budget=ts.Budget(nfe=60))
    assert "ESS" not in repr(found) + str(found.certificate())
    assert f"sample size: {len(found.leaves)} samples without weights" in str(found.certificate())
    assert "ESS" in repr(pixels(None)) + str(pixels(None).tasks[0].certificate())


def test_a_strip_of_pictures_is_no_wider_than_the_notebook():
    assert 'style="max-width:100%"' in pixels(None)._repr_html_()
