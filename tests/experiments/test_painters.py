"""The figures of Gaussian starts are made, from noise in the format of the data set."""

import json

import numpy as np

from experiments.mnist import moments
from experiments.processes import painters
from treesearch.backends.exact.moments import Moments


def test_moments_and_figures_are_written(tmp_path, capsys):
    draw, data = np.random.default_rng(0), tmp_path / "mnist.npz"
    pixels = {f"{part}_x": draw.integers(0, 256, (20, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    np.savez(data, **pixels, **{f"{part}_y": draw.integers(0, 10, 20) for part in ("train", "test")})
    moments.main(moments.Args(data=data, out=tmp_path / "m.safetensors", rank=3))
    assert Moments.load(tmp_path / "m.safetensors").basis.shape == (3, 1, 28, 28)
    out = tmp_path / "p.json"
    painters.main(painters.Args(data=data, out=out, num_steps=2, samples=3, images=3, skips=(0.5,), seeds=(0,)))
    found = json.loads(out.read_text())
    assert [row["t"] for row in found["explained"]] == [2, 1]
    assert [row.get("levels") for row in found["quality"]] == [None, *[2, 1] * 4]
    assert all(row["frechet"] > 0 for row in found["quality"])
    assert "3 components" in capsys.readouterr().out
