"""Known entries from files."""

import numpy as np
import pytest
import torch
from PIL import Image

import treesearch as ts
from tests.support import kernels
from treesearch.backends import clamp, cycle
from treesearch.backends.exact.gaussian_states import GaussianStates

SHAPE = (1, 6, 4)


def images(eta=1.0):
    return GaussianStates(torch.zeros(SHAPE), 0.3 * torch.eye(24), num_steps=8, eta=eta)


@pytest.fixture
def files(tmp_path):
    """A mask of the upper half and a seed, as pictures."""
    mask, seed = np.zeros((6, 4), np.uint8), np.arange(24, dtype=np.uint8).reshape(6, 4) * 10
    mask[:3] = 255
    for name, pixels in (("mask", mask), ("seed", seed), ("small", seed[:3])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path, torch.from_numpy(seed).float()[None] / 127.5 - 1


@pytest.mark.parametrize("inverted", [False, True])
def test_known_entries_are_those_of_the_seed(files, inverted):
    folder, seed = files
    held = clamp(images(), folder / "mask.png", folder / "seed.png", inverted=inverted)
    found = ts.search(held, kernels.total, ts.BestOfN(), budget=ts.Budget(nfe=40))
    assert (found.samples[:, :, :3] - seed[:, :3]).abs().max() < 1e-6
    assert found.samples[:, :, 3:].std(0).min() > 0.01
    assert "replacement" in str(held.departs)


def test_the_path_is_that_of_the_whole_seed(files):
    folder, seed = files
    held = clamp(images(), folder / "mask.png", folder / "seed.png", inverted=True, iterations=300)
    still, mask = images(0.0), held.mask
    x = held.values.clone()
    assert x.shape == (9, *SHAPE)
    assert not x[:, ~mask].any()
    assert (x[0] - seed)[mask].abs().max() < 1e-6
    for t in range(8, 1, -1):  # entries are independent
        back = still.transition(x[t][None], torch.tensor([t])).mean[0]
        assert (back - x[t - 1])[mask].abs().max() < 1e-4
    cycle(held, low=2, high=5, times=1)


@pytest.mark.parametrize(
    ("mask", "seed", "told"),
    [
        ("mask", "small", r"a mask \(6, 4\) and a seed \(1, 3, 4\)"),
        ("seed", "seed", "is no mask"),
        ("no", "seed", "no such file"),
    ],
)
def test_other_files_are_refused(files, mask, seed, told):
    folder, _ = files
    with pytest.raises(ValueError, match=told):
        clamp(images(), folder / f"{mask}.png", folder / f"{seed}.png")
