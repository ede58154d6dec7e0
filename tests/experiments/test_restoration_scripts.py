"""The scripts of restoration run, for seconds."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.processes import restoration, train_restoration
from treesearch.backends.models.restoration_file import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    chance = np.random.default_rng(0)
    arrays = {
        f"{split}_x": chance.integers(0, 256, (n, 28, 28), np.uint8) for split, n in (("train", 32), ("test", 1010))
    }
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, **arrays, train_y=np.arange(32) % 10, test_y=np.arange(1010) % 10)
    return path


def test_training_goes_on_and_leaves_a_model(data, tmp_path):
    places = {
        "out": tmp_path / "out",
        "weights": tmp_path / "blur.safetensors",
        "curve": tmp_path / "c.csv",
    }
    for epochs in (1, 2):
        train_restoration.main(train_restoration.Args(data=data, **places, epochs=epochs, batch_size=16, limit=32))
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    model = load_model(places["weights"])
    assert model.process == train_restoration.PROCESS
    assert model.degraded.shape == model.clean.shape == (10, 1, 28, 28)


def test_degraded_images_are_blurred_noisy_and_of_eight_bits():
    point = torch.zeros(200, 1, 28, 28)
    point[:, :, 14, 14] = 1
    found = train_restoration.degrade(0.5 + 0 * point, torch.Generator().manual_seed(0))
    inner = found[..., 10:18, 10:18]
    assert abs(float(inner.mean()) - 0.5) <= 5 * 0.15 / inner.numel() ** 0.5
    assert abs(float(inner.std()) - 0.15) <= 0.01
    assert torch.equal((255 * found).round() / 255, found)


def test_figures_are_measured_and_written(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restoration, "SAMPLERS", {"ODE-2, 2 steps": {"order": 2, "eta": 0.0, "num_steps": 2}})
    args = restoration.Args(data=data, out=tmp_path / "found.json", rollouts=2, seeds=2, digits=2)
    restoration.main(args)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"degraded", "MRS ODE-2, 2 steps", "RDDM η = 0, 5 steps"} <= set(found["quality"])
    duel = found["search"]["recognised"]
    assert [row["nfe"] for row in duel["rows"]["fk"]] == [2 * 8 * 4] * 2
    assert duel["fk_minus_best_of_n"]["best"]["low"] <= duel["fk_minus_best_of_n"]["best"]["mean"]
    assert "best-of-N" in capsys.readouterr().out


def test_committed_figures_are_what_the_page_says():
    found = json.loads((ROOT / "experiments/results/processes/restoration.json").read_text("utf-8"))
    page = (ROOT / "docs/processes.md").read_text("utf-8")
    psnr = {name: row["psnr"] for name, row in found["quality"].items()}
    assert psnr["MRS ODE-2, 10 steps"] >= max(psnr["MRS ODE-2, 100 steps"], psnr["MRS SDE-1, 100 steps"]) - 0.3
    for name in restoration.SAMPLERS:
        assert f"{psnr[f'MRS {name}']:.2f} ± " in page, name
    for eta in (0, 1):
        left = found["quality"][f"RDDM η = {eta}, 5 steps"]["mse"]
        assert left < 0.5 * found["quality"]["degraded"]["mse"]
        assert f"{left:.4f}"[1:] in page
    for name, what, digits in (
        ("compressibility", "best", 3),
        ("compressibility", "mean", 3),
        ("recognised", "mean", 2),
    ):
        gap = found["search"][name]["fk_minus_best_of_n"][what]
        assert gap["low"] > 0
        assert f"+{gap['mean']:.{digits}f}".replace("+0.", "+.") in page
