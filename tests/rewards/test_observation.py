"""Observations: operators and their adjoints, and the likelihood of what is seen."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import treesearch as ts
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import Steered
from treesearch.rewards import files
from treesearch.rewards.base import Reward, RewardError
from treesearch.rewards.images.classifier import digit
from treesearch.rewards.observation import (
    Operator,
    _picked,
    blurred,
    check_adjoint,
    frequencies,
    grey,
    masked,
    matrix,
    measurement,
    pooled,
)

SHAPE = (3, 8, 12)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half(*shape: int) -> torch.Tensor:
    return draws(*shape, seed=9) > 0


OPERATORS = {
    "mask": (masked(half(*SHAPE)), SHAPE),
    "pooled": (pooled(4), SHAPE),
    "blurred": (blurred(1.3), SHAPE),
    "grey": (grey(), SHAPE),
    "frequencies": (frequencies(half(8, 12)), SHAPE),
    "matrix": (matrix(draws(3, 5)), (5,)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_its_adjoint(name):
    operator, shape = OPERATORS[name]
    check_adjoint(operator, shape)
    if operator.gram is not None:
        v = draws(*operator(draws(2, *shape)).shape, seed=1)
        assert (operator(operator.adjoint(v)) - operator.gram * v).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda v: -v, "grey"),
        (lambda v: v.repeat_interleave(4, 2).repeat_interleave(4, 3), "pooled"),  # sums for means
        (lambda v: blurred(1.3)(v).roll(1, 3), "blurred"),
        (lambda v: v[:, :2], "blurred"),
    ],
)
def test_an_adjoint_of_something_else_is_refused(wrong, name):
    operator, shape = OPERATORS[name]
    with pytest.raises(ValueError, match=r"do not belong together|the adjoint of"):
        check_adjoint(dataclasses.replace(operator, adjoint=wrong), shape)


def test_a_gram_of_something_else_is_refused():
    for name, gram in (("grey", 1.0), ("blurred", 1.0)):
        operator, shape = OPERATORS[name]
        with pytest.raises(ValueError, match="no multiple 1 of the identity"):
            check_adjoint(dataclasses.replace(operator, gram=gram), shape)


def test_a_blur_is_a_mean_of_neighbours():
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[0, 0, 7, 7] = 1
    seen = blurred(1.3)(x)[0, 0]
    assert float(seen.sum()) == pytest.approx(1, abs=1e-14)
    assert float(seen[7, 8] / seen[7, 7]) == pytest.approx(float(torch.tensor(-0.5 / 1.3**2).exp()), rel=1e-6)
    assert torch.equal(seen, seen.T)


def test_the_reward_is_the_log_likelihood_with_its_constant_and_its_gradient():
    operator, x, y = pooled(4), draws(3, *SHAPE).requires_grad_(), draws(3, 2, 3, seed=2)
    reward = measurement(operator, y, tolerance=0.3)
    want = torch.distributions.Normal(operator(x.detach()), 0.3).log_prob(y).flatten(1).sum(1)
    found = reward.attached(x)
    assert (found - want).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert (gradient - operator.adjoint(y - operator(x.detach())) / 0.3**2).abs().max() < 1e-12


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("mask", "matrix")])
def test_states_of_few_digits_are_seen_with_many(name):
    """A x of the state as it is: rounded to bfloat16, its miss would be many tolerances."""
    operator, shape = OPERATORS[name]
    x = draws(3, *shape).bfloat16()
    y = operator(x.double())[0]
    reward = measurement(operator, y, tolerance=0.02)
    assert torch.equal(reward(x), reward(x.double()))


def test_log_z_is_the_evidence():
    """log N(y; A m, A Σ Aᵀ + tolerance² I) of x_0 ~ N(m, Σ), within four standard errors of importance sampling."""
    kernel, a, y = LinearGaussian(dim=3), draws(2, 3, seed=3), torch.tensor([0.4, -0.2], dtype=torch.float64)
    mean, std = kernel.mean, kernel.std
    noise = 0.25 * torch.eye(2, dtype=torch.float64)
    seen = torch.distributions.MultivariateNormal(a @ torch.full((3,), mean).double(), std**2 * a @ a.T + noise)
    found = ts.search(kernel, measurement(matrix(a), y, tolerance=0.5), ts.BestOfN(n=4000), batch_size=512)
    assert abs(found.log_z - float(seen.log_prob(y))) < 4 * found.log_z_se


def test_what_was_seen_and_how_tells_rewards_apart():
    def settings(**change):
        given = {"operator": masked(half(*SHAPE)), "observed": torch.zeros(3), "tolerance": 0.1} | change
        return measurement(given["operator"], given["observed"], tolerance=given["tolerance"]).settings

    other = ({"observed": torch.full((3,), 1e-9)}, {"tolerance": 0.2}, {"operator": masked(~half(*SHAPE))})
    assert len({settings(), *(settings(**change) for change in other)}) == 4
    assert settings() == settings()


def doubled(x):
    return 2 * x


def test_equal_observations_are_equal_rewards():
    def made(**change):
        given = {"operator": masked(half(*SHAPE)), "observed": torch.zeros(3), "tolerance": 0.1} | change
        return measurement(given["operator"], given["observed"], tolerance=given["tolerance"])

    assert made() == made() != made(tolerance=0.2)
    assert made(operator=torch.sin) == made(operator=torch.sin) != made(operator=torch.cos)
    assert made(operator=torch.sin) != made(operator=torch.sin, tolerance=0.2)
    assert made(operator=torch.sin).fn != made(operator=torch.sin, observed=torch.ones(3)).fn
    own = [Operator(doubled, doubled, "own"), Operator(doubled, doubled, "own"), Operator(torch.sin, doubled, "own")]
    assert made(operator=own[0]) == made(operator=own[1]) != made(operator=own[2])
    assert pickle.loads(pickle.dumps(made(operator=own[0]))) == made(operator=own[1])


# Files.


def picture(path: Path, pixels: torch.Tensor) -> str:
    """8-bit pixels (H, W) or (H, W, 3) as a file."""
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return str(path)


def bytes_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))


def y_of(reward: Reward, shape: tuple[int, ...]) -> torch.Tensor:
    return reward.fn.fitted(shape).observed


def test_a_picture_is_in_the_range_and_has_the_channels_of_what_is_seen(tmp_path):
    grey_one, colour = bytes_of(2, 3), bytes_of(2, 3, 3)
    paths = [picture(tmp_path / "grey.png", grey_one), picture(tmp_path / "colour.png", colour)]
    one, three = (measurement(pooled(4), file, tolerance=0.1) for file in paths)
    want, wide = grey_one.double() / 127.5 - 1, colour.permute(2, 0, 1).double() / 127.5 - 1
    assert (y_of(one, (1, 2, 3)) - want).abs().max() < 1e-12
    assert (y_of(one, (3, 2, 3)) - want).abs().max() < 1e-12
    assert (y_of(three, (3, 2, 3)) - wide).abs().max() < 1e-12
    assert (y_of(three, (1, 2, 3)) - grey()(wide[None])[0]).abs().max() < 1e-12
    shown = measurement(pooled(4), paths[0], tolerance=0.1, of="sample")
    assert (y_of(shown, (1, 2, 3)) - grey_one.double() / 255).abs().max() < 1e-12
    x = draws(2, 1, 8, 12)
    assert torch.equal(one(x), measurement(pooled(4), want[None], tolerance=0.1)(x))
    with pytest.raises(RewardError, match=r"observed has shape \(1, 2, 3\), expected \(1, 1, 1\)"):
        one(draws(1, 1, 4, 4))


def test_a_picture_of_a_palette_has_its_colours(tmp_path):
    shades = Image.new("P", (3, 2))
    shades.putpalette([9, 60, 200, 255, 0, 30])
    shades.putdata([0, 1, 1, 0, 0, 1])
    shades.save(tmp_path / "y.png")
    with Image.open(tmp_path / "y.png") as kept:
        assert kept.mode == "P"
    seen = files.picture(tmp_path / "y.png")
    want = torch.tensor([[9, 60, 200], [255, 0, 30]], dtype=torch.float64)[[0, 1, 1, 0, 0, 1]] / 255
    assert torch.equal(seen, want.T.reshape(3, 2, 3))


def test_a_picture_of_a_camera_that_was_turned_is_upright(tmp_path):
    pixels, turned = bytes_of(2, 3), Image.Exif()
    turned[0x0112] = 6  # to be seen turned by 90 degrees clockwise
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "y.png", exif=turned)
    assert torch.equal(files.picture(tmp_path / "y.png")[0], pixels.rot90(-1).double() / 255)


def test_a_picture_under_a_mask_is_the_whole_one(tmp_path):
    seen, pixels = bytes_of(4, 6) > 99, bytes_of(4, 6, 3)
    where = picture(tmp_path / "mask.png", 255 * seen)
    operator = masked(where)
    check_adjoint(operator, (3, 4, 6))
    x = draws(2, 3, 4, 6)
    assert torch.equal(operator(x), x[..., seen])
    reward = measurement(operator, picture(tmp_path / "y.png", pixels), tolerance=0.1)
    whole = pixels.permute(2, 0, 1).double() / 127.5 - 1
    assert torch.equal(y_of(reward, (3, int(seen.sum()))), whole[:, seen])
    assert torch.equal(masked(seen)(x), operator(x))
    check_adjoint(frequencies(where), (3, 4, 6))


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "pt", "pth"])
def test_arrays_are_read_as_they_are(tmp_path, kind):
    y, path = draws(2, 3), tmp_path / f"y.{kind}"
    if kind == "npy":
        np.save(path, y.numpy())
    elif kind == "npz":
        np.savez(path, y=y.numpy())
    elif kind == "safetensors":
        save_file({"y": y}, path)
    else:
        torch.save({"y": y} if kind == "pt" else y, path)
    assert torch.equal(measurement(pooled(2), path, tolerance=1.0).fn.observed, y)
    assert torch.equal(matrix(str(path))(draws(1, 3)), draws(1, 3) @ y.T)
    assert measurement(pooled(2), path, tolerance=1.0) == measurement(pooled(2), y, tolerance=1.0)


def saved(folder: Path, name: str) -> str:
    """Files that are no observation."""
    path = folder / name
    made = {
        "bytes.npy": lambda: np.save(path, np.zeros((2, 2), np.uint8)),
        "two.npz": lambda: np.savez(path, a=np.zeros(2), b=np.zeros(2)),
        "objects.npy": lambda: np.save(path, np.array([{}], object), allow_pickle=True),
        "code.pt": lambda: torch.save(_picked, path),
        "alpha.png": lambda: Image.new("RGBA", (2, 2)).save(path),
        "deep.png": lambda: Image.new("I;16", (2, 2)).save(path),
        "text.png": lambda: path.write_text("no picture"),
        "half.png": lambda: Image.new("L", (2, 2), 128).save(path),
        "half.npy": lambda: np.save(path, np.full(3, 0.5)),
        "black.png": lambda: Image.new("L", (2, 2), 0).save(path),
        "none.png": lambda: None,
    }
    made[name]()
    return str(path)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda f: measurement(pooled(2), f, tolerance=1), "none.png", "no such file"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "bytes.npy", "uint8, expected numbers in units of states"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "two.npz", "it holds 2 arrays, expected one"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "objects.npy", "cannot read .*allow_pickle"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "code.pt", "cannot read"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "alpha.png", "mode RGBA, expected 8-bit"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "deep.png", "mode I;16, expected 8-bit"),
        (lambda f: measurement(pooled(2), f, tolerance=1), "text.png", "cannot read"),
        (lambda f: masked(f), "half.png", "is no mask: it has values between"),
        (lambda f: masked(f), "half.npy", "is no mask"),
        (lambda f: masked(f), "black.png", "with an entry set"),
        (lambda f: matrix(f), "black.png", "is no array: expected .npy"),
    ],
)
def test_files_that_hold_no_observation_are_refused(tmp_path, make, name, message):
    with pytest.raises(ValueError, match=message):
        make(saved(tmp_path, name))


@pytest.mark.parametrize("name", ["frequencies", "blurred", "grey", "pooled", "mask", "matrix"])
def test_the_reach_is_that_of_entries_between_0_and_1(name):
    operator, shape = OPERATORS[name]
    x = (draws(300, *shape) > 0).double()
    seen = operator(x)
    assert operator.reach[0] - 1e-12 <= float(seen.min()) < float(seen.max()) <= operator.reach[1] + 1e-12
    rows = operator(torch.eye(x[0].numel(), dtype=torch.float64).view(-1, *shape)).flatten(1).T  # A
    if name != "blurred":  # whose filter has its whole weight inside of no image as small as this
        least, most = float(rows.clamp(max=0).sum(1).min()), float(rows.clamp(min=0).sum(1).max())
        assert operator.reach == pytest.approx((least, most), rel=1e-12, abs=1e-12)


def test_values_that_nothing_within_a_range_gives_are_refused():
    def seen(*y):
        return measurement(pooled(2), torch.tensor(y), tolerance=0.27).fn

    seen(2.5).refuse_range("states", -1.0, 1.0)
    seen(3.5).refuse_range("states", -2.0, 2.0)
    seen(-0.8, 1.8).refuse_range("samples", 0.0, 1.0)
    for y, low in (((2.7,), -1.0), ((2.7, 0.0), 0.0), ((-1.7,), 0.0)):  # off by more than six tolerances
        with pytest.raises(ValueError, match=rf"and states within {low:g}..1 give {low:g} to 1 and noise of 0.27"):
            seen(*y).refuse_range("states", low, 1.0)
    few, many = (torch.full((n,), -1.0) for n in (2, 8))  # each by 3.7, which a few may be
    seen(*few).refuse_range("samples", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"entries from -1 to -1, and samples within 0\.\.1 give"):
        seen(*many).refuse_range("samples", 0.0, 1.0)


def test_noise_alone_is_hardly_ever_refused():
    """Observations of the least that samples can be: half of their noise is beyond."""
    noise = draws(2000, 50)
    for row in noise:
        measurement(pooled(2), 0.1 * row, tolerance=0.1).fn.refuse_range("samples", 0.0, 1.0)


@pytest.mark.parametrize("size", [255.0, 2.0])
def test_a_search_refuses_an_observation_of_samples_in_other_units(size, tmp_path):
    y = size * torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(0)) - float(size == 2)
    reward = measurement(pooled(4), y, tolerance=0.1, of="sample")
    schedule = Schedule.flow(torch.linspace(0, 1, 3))
    kernel = DiffusionKernel(lambda x, t: x, state_shape=(1, 28, 28), schedule=schedule, sample_range=(0, 1),
                             decode=torch.sigmoid)  # fmt: skip
    for wrong in (reward, reward + digit(8)):
        with pytest.raises(ValueError, match=r"samples within 0..1 give 0 to 1 .* images to \[0, 1\]"):
            ts.search(kernel, wrong, ts.BestOfN(n=1), store=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"samples within 0\.\.1"):
        Steered(kernel, reward)
    measurement(pooled(4), y, tolerance=0.1).fn.refuse_range("samples", -size, size)
    ts.search(kernel, measurement(pooled(4), (y - y.min()) / size, tolerance=0.1, of="sample"), ts.BestOfN(n=1))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: pooled(1), ValueError, "size is 1"),
        (lambda: pooled(2.0), ValueError, "size is 2.0"),
        (lambda: pooled(5)(draws(1, *SHAPE)), ValueError, "sides are multiples of 5"),
        (lambda: blurred(0.0), ValueError, "std is 0.0"),
        (lambda: blurred("1"), ValueError, "std is '1'"),
        (lambda: grey((0.0, 0.0)), ValueError, "not all zero"),
        (lambda: grey()(draws(2, 1, 4, 4)), ValueError, r"grey got \(2, 1, 4, 4\), expected images of 3 channels"),
        (lambda: grey((1.0,))(draws(1, *SHAPE)), ValueError, "expected images of 1 channels"),
        (lambda: masked(half(3, 4))(draws(1, 3, 5)), ValueError, r"mask has shape \(3, 4\), and states \(3, 5\)"),
        (lambda: masked(torch.zeros(3, dtype=torch.bool)), ValueError, "with an entry set"),
        (lambda: masked(torch.ones(3)), ValueError, "mask must be bool"),
        (lambda: frequencies(torch.ones(3, dtype=torch.bool)), ValueError, r"mask must be \(H, W\)"),
        (lambda: matrix([1.0]), ValueError, "expected a finite matrix"),
        (lambda: matrix([[float("nan")]]), ValueError, "expected a finite matrix"),
        (lambda: measurement(pooled(2), torch.tensor([float("nan")]), tolerance=1), ValueError, "not finite"),
        (
            lambda: measurement(pooled(2), torch.zeros(1) + 1j, tolerance=1),
            ValueError,
            "observed holds torch.complex64",
        ),
        (
            lambda: measurement(pooled(2), bytes_of(1, 2, 2).byte(), tolerance=1),
            ValueError,
            "observed holds torch.uint8",
        ),
        (
            lambda: measurement(pooled(2), np.ones(3, bool), tolerance=1),
            ValueError,
            "observed holds bool, expected real",
        ),
        (lambda: measurement(pooled(2), torch.zeros(1), tolerance=0), ValueError, "tolerance is 0"),
        (lambda: measurement(pooled(2), torch.zeros(1), tolerance=float("nan")), ValueError, "tolerance is nan"),
        (
            lambda: measurement(torch.fft.fft, torch.zeros(3), tolerance=1)(draws(2, 3)),
            RewardError,
            "A x is of torch.c",
        ),
        (
            lambda: measurement(torch.Tensor.int, torch.zeros(3), tolerance=1)(draws(2, 3)),
            RewardError,
            "A x is of torch.i",
        ),
        (lambda: measurement(3, torch.zeros(1), tolerance=1), TypeError, "operator is int"),
        (lambda: measurement(pooled(2), torch.zeros(1), tolerance=1, of="x"), ValueError, "of is 'x'"),
        (
            lambda: measurement(pooled(2), torch.zeros(1), tolerance=1)(draws(1, *SHAPE)),
            RewardError,
            r"expected \(3",
        ),
    ],
)
def test_observations_that_are_none_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
