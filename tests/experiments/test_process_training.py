"""Training of the shortest-path and the multi-task model: a resumed run is an uninterrupted one, weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.processes import train_multi_task, train_spd
from treesearch.backends.models.multi_task import multi_task_kernel
from treesearch.backends.models.shortest_path import shortest_path_kernel


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Noise in the format of the data set."""
    draw, file = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "mnist.npz"
    images, labels = draw.integers(0, 256, (32, 28, 28), dtype=np.uint8), draw.integers(0, 10, 32)
    np.savez(file, train_x=images, test_x=images, train_y=labels, test_y=labels)
    return file


@pytest.mark.parametrize(
    ("script", "options", "kernel"),
    [
        (train_spd, {"path": "shortest"}, shortest_path_kernel),
        (train_multi_task, {"task": "joint"}, multi_task_kernel),
        (train_multi_task, {"task": "label"}, multi_task_kernel),
    ],
)
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, digits, script: Any, options, kernel: Any):
    how = {"data": digits, "steps": 1, "batch_size": 4, "warmup": 1, "cooldown": 1e-9, **options}
    script.main(script.Args(out=tmp_path / "once", epochs=2, **how))
    script.main(script.Args(out=tmp_path / "twice", epochs=1, **how))
    script.main(script.Args(out=tmp_path / "twice", epochs=2, **how))
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("once", "twice"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len((tmp_path / "twice" / "curve.csv").read_text("utf-8").splitlines()) == 3
    made = kernel(str(tmp_path / "twice" / "weights.safetensors"), num_steps=2)
    assert made.transition(torch.zeros(1, *made.state_shape), torch.tensor([2])).mean.isfinite().all()
