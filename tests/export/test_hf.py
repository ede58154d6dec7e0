"""A saved result as a dataset of Hugging Face: what comes back, the card, the hub, and folders of others."""

import json
import math
import os

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.results.test_saving import Texts, length
from tests.support.pages import HOSTILE, pixels
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.main import main
from treesearch.export import hf
from treesearch.rewards.analytic import linear

datasets = pytest.importorskip("datasets")
COLUMNS = ["prompt", "task", "node", "reward", "log_weight", "weight", "key", "sample"]


def loaded(folder, tmp_path):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]


def test_images_come_back_with_their_weights_and_a_card_that_holds_no_markup_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 2_000)
    result = pixels(None)
    found = loaded(hf.write_hf(result.save(tmp_path / "saved"), tmp_path / "out"), tmp_path)
    assert found.column_names == COLUMNS
    assert len(list((tmp_path / "out/data").iterdir())) > 1
    table = result.to_table()
    for name in ("prompt", "task", "node", "reward", "log_weight", "weight"):
        assert found[name] == list(table[name])
    assert [int(key, 16) for key in found["key"]] == table["key"].tolist()
    samples = torch.cat([task.samples for task in result.tasks])
    pixels_of = np.stack([np.asarray(image) for image in found["sample"]])
    np.testing.assert_array_equal(pixels_of, (samples[:, 0].clip(0, 1) * 255).round().byte().numpy())
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert card.startswith(hf.FRONT)
    assert f"# {len(samples):,} samples of FeynmanKac" in card
    assert "[0.0, " not in card
    assert not any(text in card for text in HOSTILE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "data"]


class Arrays(LinearGaussian):
    """A chain whose samples are arrays of a shape."""

    def __init__(self, shape):
        super().__init__(num_steps=2)
        self.shape = shape

    def decode(self, x0):
        return x0.reshape(-1, *[1] * len(self.shape)).expand(-1, *self.shape)


@pytest.mark.parametrize("shape", [(), (2,), (1, 3), (2, 5, 2, 1)])
def test_arrays_come_back_as_they_are(tmp_path, shape):
    result = ts.search(Arrays(shape), lambda x: x.reshape(len(x), -1).sum(1), ts.BestOfN(n=5))
    found = loaded(hf.write_hf(result.save(tmp_path / "saved"), tmp_path / "out"), tmp_path)
    assert np.array(found["sample"]).tolist() == result.samples.tolist()
    assert found["prompt"] == [None] * 5


def test_texts_come_back_as_they_are(tmp_path):
    result = ts.search(Texts(num_steps=2), length, ts.BestOfN(n=5))
    found = loaded(hf.write_hf(result.save(tmp_path / "saved"), tmp_path / "out"), tmp_path)
    assert found["sample"] == result.samples


def test_samples_that_are_not_alike_are_refused(tmp_path):
    class Growing(LinearGaussian):
        def decode(self, x0):
            return [np.zeros(i + 2) for i in range(len(x0))]

    result = ts.search(Growing(num_steps=2), lambda x: np.array([float(len(a)) for a in x]), ts.BestOfN(n=5))
    with pytest.raises(ts.TreeSearchError, match="those of a dataset are alike"):
        hf.write_hf(result.save(tmp_path / "saved"), tmp_path / "out")


def test_forbidden_samples_are_rows_and_one_task_can_stand_alone(tmp_path):
    reward = linear(1.0).gate(linear(1.0), above=0.0)
    result = ts.search(LinearGaussian(num_steps=2), reward, ts.BestOfN(n=8), prompts=["a", "b"])
    saved = result.save(tmp_path / "saved")
    found = loaded(hf.write_hf(saved, tmp_path / "out", task=1), tmp_path)
    assert found["reward"] == result.tasks[1].rewards.tolist()
    assert -math.inf in found["reward"]
    assert set(found["prompt"]) == {"b"}
    with pytest.raises(ts.StoreError, match="not empty"):
        hf.write_hf(saved, tmp_path / "out")
    with pytest.raises(ts.TreeSearchError, match="no samples of task 2"):
        hf.write_hf(saved, tmp_path / "other", task=2)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("samples.csv", "task0.npy", "../secret.npy", "is not in its folder"),
        ("samples.csv", "task0.npy", "link.npy", "is not in its folder"),
        ("result.json", '"asked"', '"told"', "was not written by result.save"),
        ("samples.csv", "log_weight", "weight of", "is damaged"),
    ],
)
def test_a_folder_of_others_gives_nothing_else_away(tmp_path, file, old, new, said):
    saved = ts.search(LinearGaussian(num_steps=2), linear(1.0), ts.BestOfN(n=3)).save(tmp_path / "saved")
    np.save(tmp_path / "secret.npy", np.zeros((3, 1)))
    os.symlink(tmp_path / "secret.npy", saved / "link.npy")
    text = (saved / file).read_text("utf-8")
    assert old in text
    (saved / file).write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ts.StoreError, match=said):
        hf.write_hf(saved, tmp_path / "out")


class Hub:
    """Stands for the hub: what it was asked."""

    asked: list

    def create_repo(self, name, **how):
        self.asked.append(("create", name, how))
        return f"https://hub.example/{name}"

    def upload_folder(self, **how):
        self.asked.append(("upload", how["repo_id"], how["repo_type"], sorted(os.listdir(how["folder_path"]))))


def test_a_run_is_pushed_with_the_users_own_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    store, out = str(tmp_path / "run"), str(tmp_path / "out")
    words = ["run", "fk", "--kernel", "gaussian(dim=2)", "--reward", "linear(1.0)", "--nfe", "200", "--store", store]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["export", store, "hf", "--out", out, "--push", "me/eights"]) == 0
    assert capsys.readouterr().out == f"{out}\nhttps://hub.example/me/eights\n"
    how = {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert Hub.asked == [("create", "me/eights", how), ("upload", "me/eights", "dataset", ["README.md", "data"])]
    assert len(loaded(out, tmp_path)) > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "run"]

    def refuses(self, name, **how):
        raise OSError("401: log in\nmore")

    monkeypatch.setattr(Hub, "create_repo", refuses)
    assert main(["export", store, "hf", "--push", "me/eights", "--public"]) == 1
    told = capsys.readouterr().err
    assert "me/eights was not pushed: 401: log in; the dataset is in " in told
    assert (tmp_path / "run/hf/README.md").exists()


def test_a_saved_result_is_exported_as_a_run_is(tmp_path, capsys):
    saved = ts.search(LinearGaussian(num_steps=2), linear(1.0), ts.BestOfN(n=3)).save(tmp_path / "saved")
    assert main(["export", str(saved), "hf"]) == 0
    assert json.loads((saved / "result.json").read_text())["asked"]["method"]["name"] == "BestOfN"
    assert (saved / "hf/README.md").exists()
    for words, said in (
        (["hf", "--push", "eights"], "expected OWNER/NAME"),
        (["hf", "--public"], "only with --push"),
        (["npz", "--push", "me/eights"], "--push: not with npz"),
        (["hf", "--draws", "3"], "--draws: not with hf"),
    ):
        assert main(["export", str(saved), *words]) == 2
        assert said in capsys.readouterr().err
