"""MSE, PSNR and SSIM of what an edit was to keep, against numbers by hand and a second way to compute them."""

import math

import pytest
import torch
from PIL import Image

from tests.support.tolerance import EPS, float32_tolerance
from treesearch.registry import registry as specs
from treesearch.rewards import background
from treesearch.rewards.images.fidelity import C1, C2, SPREAD, WINDOW, mse, psnr, ssim

RNG = torch.Generator().manual_seed(0)
ONE, OTHER = torch.rand(2, 3, 12, 14, generator=RNG), torch.rand(2, 3, 12, 14, generator=RNG)
CLOSE = float32_tolerance(2, WINDOW**2, 8) * 2.0**-52 / EPS / C2
"""Of float64 variances, differences of sums over a window, over a denominator of C2 at least."""
KEPT = torch.zeros(12, 14, dtype=torch.bool)
KEPT[:, :9] = True


def test_decibels_by_hand():
    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1, dtype=torch.float64)
    assert psnr(black, grey).item() == pytest.approx(20, abs=1e-12)
    assert psnr(black, black).item() == math.inf
    half = torch.arange(4) < 2
    grey[..., half] = 0
    assert mse(black, grey).item() == pytest.approx(0.005, rel=1e-12)
    assert mse(black, grey, ~half.expand(4, 4)).item() == pytest.approx(0.01, rel=1e-12)


def by_windows(x, y, kept):
    """SSIM of one channel, window by window."""
    found, reach = [], WINDOW // 2
    for i, j in kept.nonzero().tolist():
        seen = [(a, b) for a, b in kept.nonzero().tolist() if max(abs(a - i), abs(b - j)) <= reach]
        w = [math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * SPREAD**2)) for a, b in seen]
        w = torch.tensor(w, dtype=torch.float64)
        u, v = (torch.stack([each[a, b] for a, b in seen]).double() for each in (x, y))
        w /= w.sum()
        m, k = (w * u).sum(), (w * v).sum()
        s, r, c = (w * (u - m) ** 2).sum(), (w * (v - k) ** 2).sum(), (w * (u - m) * (v - k)).sum()
        found.append((2 * m * k + C1) * (2 * c + C2) / ((m**2 + k**2 + C1) * (s + r + C2)))
    return torch.stack(found).mean()


def test_similarity_by_windows_of_kept_pixels():
    want = torch.stack([by_windows(ONE[0, c], OTHER[0, c], KEPT) for c in range(3)]).mean()
    assert ssim(ONE, OTHER, KEPT)[0].item() == pytest.approx(want.item(), abs=CLOSE)
    assert ssim(ONE, ONE).tolist() == pytest.approx([1, 1], abs=1e-12)
    flat, a, b = torch.ones(1, 1, 12, 12, dtype=torch.float64), 0.2, 0.7
    assert ssim(a * flat, b * flat).item() == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1), abs=1e-9)


@pytest.mark.parametrize("measure", [mse, psnr, ssim])
def test_what_is_edited_does_not_enter(measure):
    edited = torch.where(KEPT, OTHER, torch.rand(OTHER.shape, generator=RNG))
    assert torch.equal(measure(ONE, edited, KEPT), measure(ONE, OTHER, KEPT))
    assert torch.equal(measure(ONE, OTHER, KEPT.expand(2, -1, -1)), measure(ONE, OTHER, KEPT))
    assert not torch.equal(measure(ONE, OTHER, KEPT), measure(ONE, OTHER))
    assert torch.equal(measure(ONE, OTHER[0]), measure(ONE, OTHER[:1].expand(2, -1, -1, -1)))


def test_a_reward_of_files(tmp_path):
    picture = (ONE[0].double() * 255).round() / 255
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    Image.fromarray(KEPT.byte().mul(255).numpy()).save(tmp_path / "mask.png")
    reward = specs.reward(f"background({str(tmp_path / 'photo.png')!r}, {str(tmp_path / 'mask.png')!r})")
    assert torch.equal(reward(OTHER), -mse(OTHER, picture, KEPT))
    assert reward == background(picture, KEPT) != background(picture, ~KEPT)
    x = OTHER.clone().requires_grad_()
    reward.attached(x).sum().backward()
    assert (x.grad != 0).any(0).any(0).equal(KEPT)
    grey = background(picture[:1], KEPT)
    assert torch.equal(grey(OTHER), -mse(OTHER, picture[:1].expand(3, -1, -1), KEPT))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mse(ONE[0], OTHER), "expected floats"),
        (lambda: mse((ONE * 255).byte(), OTHER), "expected floats"),
        (lambda: mse(*[[0.5], OTHER]), "pictures are list"),
        (lambda: psnr(ONE, OTHER[..., 1:]), "pictures to compare with"),
        (lambda: ssim(ONE, OTHER, KEPT.float()), "the mask is torch.float32"),
        (lambda: ssim(ONE, OTHER, KEPT[:5]), "the mask is"),
        (lambda: mse(ONE, OTHER, KEPT & False), "keeps nothing"),
        (lambda: mse(ONE, OTHER * math.nan), "not finite"),
        (lambda: background(2 * ONE[0], KEPT), r"outside \[0, 1\]"),
        (lambda: background(ONE[0], KEPT[1:]), "the mask is"),
        (lambda: background("absent.png", KEPT), "no such file"),
    ],
)
def test_what_is_no_picture_or_mask_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_constants_are_the_papers():
    assert pytest.approx((1e-4, 9e-4, 11, 1.5), abs=1e-15) == (C1, C2, WINDOW, SPREAD)


def test_a_grey_sample_is_compared_with_the_grey_of_a_colour_file():
    grey = torch.rand(1, 1, 4, 4)
    kept = torch.ones(4, 4, dtype=torch.bool)
    assert float(background(grey[0].expand(3, -1, -1), kept)(grey)) == pytest.approx(0, abs=1e-12)
