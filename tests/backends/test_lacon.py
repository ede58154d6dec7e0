"""A condition that is read off features: the capture in a step, the value, and the published guide."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import treesearch as ts
from treesearch.backends.base import fingerprint
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS, Aligned, LaCon, Likelihood, Valued
from treesearch.backends.guidance.lacon import lacon
from treesearch.backends.models.aligner import Aligner, Plan, load_aligner, save_aligner, time_of
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.rewards import edges, measurement
from treesearch.rewards.analytic import linear
from treesearch.rewards.observation import grey
from treesearch.testing import check_kernel

F64, T = torch.float64, 6
SHARE = torch.cat([torch.zeros(1, dtype=F64), torch.linspace(0.02, 0.98, T, dtype=F64)])
SCHEDULE = Schedule(torch.arange(1, T + 1), (1 - SHARE).sqrt(), SHARE.sqrt())
PLAN = Plan(condition="edges(2)", shape=(1, 4, 4), parts=("inner",), channels=(4,), width=6, knots=5)
LEVELS = torch.tensor([2, 4, 6, 3])


class Net(nn.Module):
    """A fixed smooth function."""

    def __init__(self, channels: int = 4, doubled: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.inner, self.out = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 1, 1)
        self.doubled = doubled
        for weight in self.parameters():
            weight.data = 0.4 * torch.randn(weight.shape, generator=draw)

    def forward(self, x, timestep):
        again = torch.cat([x, x]) if self.doubled else x
        return self.out(torch.tanh(self.inner(again)))[: len(x)]


def bed(eta: float = 1.0, **kwargs) -> DiffusionKernel:
    return DiffusionKernel(Net(**kwargs), state_shape=(1, 8, 8), schedule=SCHEDULE, eta=eta)


def aligner(plan: Plan = PLAN) -> Aligner:
    made, draw = Aligner(plan), torch.Generator().manual_seed(1)
    for weight in made.parameters():
        weight.data = 0.4 * torch.randn(weight.shape, generator=draw)
    made.basis.copy_(torch.linalg.qr(torch.randn(16, 16, generator=draw))[0])
    made.variances.copy_(torch.rand(5, 16, generator=draw) + 0.1)
    return made.eval().requires_grad_(False)


SEEN = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(2))
REWARD, ALIGNER = measurement(edges(2), SEEN, tolerance=0.3), aligner()


def draws(n: int = 4, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(3))


def precise(eta: float = 1.0, **how) -> LaCon:
    """The guide in float64."""
    kernel = bed(eta)
    kernel.model.double()
    return LaCon(Aligned(kernel, aligner().double()), REWARD, **how)


def test_a_step_tells_what_the_aligner_sees_and_is_the_kernels_own():
    kernel, x = bed(), draws(4, torch.float32)
    law, base = Aligned(kernel, ALIGNER).transition(x, LEVELS), kernel.transition(x, LEVELS)
    assert all(torch.equal(getattr(law, k), getattr(base, k)) for k in ("mean", "std", "endpoint"))
    u = time_of(SCHEDULE.alpha[LEVELS], SCHEDULE.sigma[LEVELS])
    want = ALIGNER([kernel.model.inner(x)], u)
    assert (law.seen - want).abs().max() < 1e-5
    assert (law.times - u).abs().max() < 1e-6
    picked = law.take(torch.tensor([2, 0]))
    assert torch.equal(picked.seen, law.seen[[2, 0]])
    assert not kernel.model.inner._forward_hooks


def test_hooks_are_gone_after_a_step_that_fails():
    kernel = bed()
    aligned, told = Aligned(kernel, ALIGNER), fingerprint.of(kernel.model)
    with pytest.raises(RuntimeError):
        aligned.transition(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]))
    assert fingerprint.of(kernel.model) == told


def test_the_value_is_the_evidence_of_the_error_that_was_measured():
    kernel, x = Aligned(bed(), ALIGNER), draws(4, torch.float32)
    law = kernel.transition(x, LEVELS)
    found = Likelihood(ALIGNER, REWARD)(x, LEVELS, law, None)
    low = (law.times.double() * 4).floor().long()
    share = (law.times.double() * 4 - low)[:, None]
    table, basis = ALIGNER.variances.double(), ALIGNER.basis.double()
    variances = table[low] * (1 - share) + table[low + 1] * share
    for row in range(4):
        cov = basis @ variances[row].diag() @ basis.T + 0.09 * torch.eye(16, dtype=F64)
        gap = (SEEN.double() - law.seen[row].double()).flatten()
        want = -0.5 * (gap @ torch.linalg.solve(cov, gap) + torch.logdet(2 * math.pi * cov))
        assert abs(float(found[row] - want)) < 1e-4 * abs(float(want))  # the basis is orthonormal in float32


def test_the_guide_moves_the_noise_by_a_share_of_its_distance_in_every_row():
    guide, x = precise(scale=0.7), draws()
    law, at = guide.transition(x, LEVELS), guide.chain.at
    alpha, sigma, alpha_s, direction = (at(k, LEVELS, x) for k in ("alpha", "sigma", "alpha_s", "direction"))
    moved = ((law.mean - law.base_mean) / (direction - alpha_s * sigma / alpha)).flatten(1)
    eps = (x - alpha * law.endpoint) / sigma
    distance = (eps - x).flatten(1).norm(dim=1)
    assert ((moved.norm(dim=1) - 0.7 * distance).abs() < 1e-6 * distance).all()
    leaf = x.clone().requires_grad_()
    values = guide.value(leaf, LEVELS, guide.kernel.transition(leaf, LEVELS), None)
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    assert (torch.cosine_similarity(moved, -slope.flatten(1)) > 1 - 1e-9).all()  # along g, the gradient of the loss
    assert torch.equal(law.rewards, values.detach())
    assert not law.seen.requires_grad


def test_rows_know_nothing_of_each_other():
    guide, x = precise(), draws()
    together = guide.transition(x, LEVELS)
    for row in range(4):
        alone = guide.transition(x[row : row + 1], LEVELS[row : row + 1])
        assert (alone.mean[0] - together.mean[row]).abs().max() < 1e-12


def test_off_is_the_base_bit_by_bit():
    x, base = draws(), precise().kernel.transition(draws(), LEVELS)
    outside = precise(window=(4, T)).transition(x, LEVELS)  # trunc = 3
    inside = LEVELS > 3
    assert torch.equal(outside.mean[~inside], base.mean[~inside])
    assert not torch.equal(outside.mean[inside], base.mean[inside])
    for eta in (0.0, 1.0):
        still = precise(eta, scale=0.0)
        assert torch.equal(still.transition(x, LEVELS).mean, still.kernel.transition(x, LEVELS).mean)
        assert still.departs is None
        assert not any(still.backward_per_nfe)


def test_without_noise_it_is_as_published_and_departs():
    guide, x = precise(0.0), draws()
    law, base = guide.transition(x, LEVELS), guide.kernel.transition(x, LEVELS)
    assert not torch.equal(law.mean, base.mean)
    assert not law.log_weight(law.mean).any()
    assert "no weights" in guide.departs
    assert precise().departs is None


@pytest.mark.parametrize(
    "make",
    [
        lambda k: Valued(k, REWARD, Likelihood(ALIGNER, REWARD)),
        lambda k: LaCon(k, REWARD, scale=0.1, max_shift=1.0),
        lambda k: TDS(k, REWARD, value=Likelihood(ALIGNER, REWARD)),
    ],
    ids=["value", "guide", "tds"],
)
def test_the_laws_of_kernels_hold(make):
    kernel = make(Aligned(bed(), ALIGNER))
    check_kernel(kernel, rows=4, proposal=not isinstance(kernel, Valued))


def test_what_it_costs():
    kernel = Aligned(bed(), ALIGNER)
    free = ts.search(Valued(kernel, REWARD, Likelihood(ALIGNER, REWARD)), REWARD, ts.FeynmanKac(num_particles=8))
    assert (free.cost.nfe, free.cost.backward_nfe, free.cost.reward_calls) == (8 * T, 0, 8)
    guided = ts.search(LaCon(kernel, REWARD, window=(4, T)), REWARD, ts.FeynmanKac(num_particles=8))
    assert (guided.cost.nfe, guided.cost.backward_nfe) == (8 * T, 8 * 3)


def test_a_file_keeps_the_plan(tmp_path):
    plan = Plan(condition="edges(2)", shape=(1, 4, 4), parts=("inner",), channels=(4,), margin=1, width=6, knots=5)
    made = aligner(plan)
    save_aligner(tmp_path / "a.safetensors", made)
    again, u = load_aligner(tmp_path / "a.safetensors"), torch.tensor([0.1, 0.9])
    assert again.plan == plan
    features = [torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(4))]
    assert again(features, u).shape == (2, 1, 4, 4)
    assert (again(features, u) - made(features, u)).abs().max() < 0.02  # float16
    assert torch.equal(again.variances, made.variances)


def doubled():
    return Aligned(bed(doubled=True), ALIGNER).transition(draws(2, torch.float32), torch.tensor([1, 2]))


def misplaced():
    return Valued(bed(), REWARD, Likelihood(ALIGNER, REWARD)).transition(draws(4, torch.float32), LEVELS)


def other(name: str):
    return Plan(condition=name, shape=(1, 4, 4), parts=("inner",), channels=(4,), width=6, knots=5)


def picture(tmp_path, shade):
    from PIL import Image

    Image.new("L", (8, 8), shade).save(tmp_path / "seen.png")
    return tmp_path / "seen.png"


def test_by_name(tmp_path):
    save_aligner(tmp_path / "a.safetensors", ALIGNER)
    told = (bed(), tmp_path / "a.safetensors", picture(tmp_path, 90))
    free, guided = lacon(*told), lacon(*told, scale=0.5, window=(3, T), max_shift=1.0)
    assert isinstance(free, Valued)
    assert isinstance(guided, LaCon)
    assert (
        guided.reward.settings
        == lacon(bed(), tmp_path / "a.safetensors", torch.full((1, 8, 8), 90 / 255)).reward.settings
    )
    assert guided.reward.input == "sample"
    law = free.transition(draws(2, torch.float32), LEVELS[:2])
    assert torch.equal(law.rewards, guided.transition(draws(2, torch.float32), LEVELS[:2]).rewards)
    with pytest.raises(FileNotFoundError):
        lacon(bed(), tmp_path / "none.safetensors", tmp_path / "seen.png")


def no_picture(tmp_path, kind):
    from PIL import Image

    path = tmp_path / "no.png"
    if kind == "none":
        return path
    Image.new(kind, (8, 8)).save(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: no_picture(p, "I;16"), "mode I;16, expected 8-bit"),
        (lambda p: no_picture(p, "RGBA"), "mode RGBA, expected 8-bit"),
        (lambda p: no_picture(p, "none"), "no such file"),
        (lambda p: torch.full((1, 8, 8), 90, dtype=torch.uint8), "of torch.uint8, 90 to 90"),
        (lambda p: torch.full((1, 8, 8), 90.0), r"expected \(C, h, w\) of real numbers in \[0, 1\]"),
        (lambda p: torch.full((1, 8, 8), math.nan), "nan to nan"),
        (lambda p: torch.zeros(8, 8), r"picture is \(8, 8\)"),
    ],
)
def test_pictures_that_are_none_are_refused(tmp_path, make, message):
    save_aligner(tmp_path / "a.safetensors", ALIGNER)
    with pytest.raises(ValueError, match=message):
        lacon(bed(), tmp_path / "a.safetensors", make(tmp_path))


def test_a_colour_picture_is_grey_for_an_aligner_of_one_channel(tmp_path):
    from PIL import Image

    save_aligner(tmp_path / "a.safetensors", ALIGNER)
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "colour.png")
    y, shown = (
        lacon(bed(), tmp_path / "a.safetensors", of).reward.fn.observed
        for of in (tmp_path / "colour.png", grey()(pixels.permute(2, 0, 1)[None] / 255)[0])
    )
    assert y.shape == ALIGNER.plan.shape
    assert (y - shown).abs().max() < 2.0**-20


WIDER = Plan(condition="edges(2)", shape=(1, 4, 4), parts=("inner", "mid"), channels=(4, 4))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Aligned(LinearGaussian(), ALIGNER), TypeError, "no `network` and `chain`"),
        (lambda: Aligned(bed(), "edges.safetensors"), TypeError, "expected an Aligner"),
        (lambda: Aligned(bed(), Aligner(WIDER)), ValueError, "no part 'mid'"),
        (doubled, ValueError, "with a row for each state"),
        (lambda: Aligned(bed(channels=5), ALIGNER).transition(draws(4, torch.float32), LEVELS), ValueError, "expected"),
        (lambda: Likelihood(ALIGNER, linear()), TypeError, "is no measurement"),
        (lambda: Likelihood(Aligner(other("silhouette(2)")), REWARD), ValueError, "the aligner predicts silhouette"),
        (
            lambda: Likelihood(ALIGNER, measurement(edges(2), torch.zeros(1, 2, 2), tolerance=0.1)),
            ValueError,
            "observed has shape",
        ),
        (lambda: LaCon(bed(), REWARD), TypeError, "expected Aligned"),
        (lambda: precise(scale=-1.0), ValueError, "scale is -1.0"),
        (lambda: precise(scale=math.nan), ValueError, "scale is nan"),
        (lambda: precise(through_network=False), ValueError, "through_network is False"),
        (lambda: precise(0.0, max_shift=1.0), ValueError, "max_shift is in units"),
        (misplaced, TypeError, "reads laws of an Aligned"),
        (lambda: load_aligner("mnist.safetensors"), ValueError, "no aligner"),
        (lambda: load_aligner("nothing.safetensors"), FileNotFoundError, "no weights"),
        (lambda: load_aligner(Path(__file__)), ValueError, "no file of safetensors"),
    ],
)  # fmt: skip
def test_bad_input(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.fixture(scope="module")
def published():
    """The shipped aligner on the chain of the paper, for the edges of another sample of the model."""
    kernel = Aligned(mnist_kernel(eta=0.0), load_aligner("edges.safetensors"))
    seen = edges(2)(rolled(kernel, noises(1, 11)))[0]
    return LaCon(kernel, measurement(edges(2), seen, tolerance=0.2, of="sample"))


def noises(n, seed):
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def rolled(kernel, x):
    """Samples of a chain without noise."""
    for t in range(25, 0, -1):
        x = kernel.transition(x, torch.full((len(x),), t)).mean
    return kernel.decode(x)


def miss(seen, guide):
    return (seen - guide.reward.fn.observed).square().mean((1, 2, 3))


def test_the_shipped_aligner_halves_the_error_of_the_condition(published):
    x = noises(3, 12)
    free, guided = (miss(edges(2)(rolled(k, x)), published) for k in (published.kernel, published))
    assert (guided < 0.5 * free).all()


def test_its_loss_falls_in_a_step(published):
    """Between an unguided state and the next of the guide, in 95 % of steps."""
    x, fell, plain = noises(2, 13), [], published.kernel
    for t in range(25, 1, -1):
        at = torch.full((2,), t)
        law = published.transition(x, at)
        after = plain.transition(law.mean, at - 1)
        fell.append(miss(after.seen, published) < miss(law.seen, published))
        x = plain.transition(x, at).mean
    assert torch.stack(fell).double().mean() >= 0.95
