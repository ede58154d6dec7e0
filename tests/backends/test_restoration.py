"""Restoration: whatever the process and the order, a kernel around a degraded image that every method searches."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import treesearch as ts
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.models.restoration import RestorationKernel, restoration_kernel
from treesearch.backends.models.restoration_file import Matched, RestorationNetwork, load_model, save_model
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.cli.main import main
from treesearch.rewards.analytic import constant
from treesearch.testing import check_kernel

PROCESS = MeanReverting(predicts="velocity")
WIDTHS = (8, 32)
KINDS = [("mean_reverting", 1, 1.0), ("mean_reverting", 2, 1.0), ("mean_reverting", 3, 0.0), ("residual", 1, 1.0)]


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).mul(255).round() / 255


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RestorationNetwork(WIDTHS)
    pair = {"degraded": images(), "clean": images(seed=1)}
    save_model(path, network, PROCESS, **pair, degradation="none", widths=WIDTHS)
    return path


@pytest.mark.parametrize(("process", "order", "eta"), KINDS)
def test_the_laws_of_kernels_hold(saved, process, order, eta):
    kernel = restoration_kernel(saved, process, order, num_steps=3, eta=eta)
    check_kernel(kernel, [images()[0], 1], rows=4)


class Gaussian(nn.Module):
    """x̂_0 - μ of data with x_0 - μ ~ N(mean, std²) at each entry, at the levels of a schedule."""

    def __init__(self, schedule: Schedule, mean: float, std: float) -> None:
        super().__init__()
        self.schedule, self.mean, self.std = schedule, mean, std

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        t = 1 + (self.schedule.timestep[None] - timestep[:, None]).abs().argmin(1)
        return tuple(v[t][:, None, None, None] for v in (self.schedule.alpha, self.schedule.sigma))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y, (alpha, sigma) = x[:, :1], self.levels(timestep)
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (y - alpha * self.mean)


def error(order: int, steps: int) -> float:
    """Largest distance to the closed form of the flow, from the same draws of the prior."""
    process, (mean, std) = MeanReverting(predicts="residual"), (0.2, 0.3)
    schedule = process.schedule(steps)
    network = Gaussian(schedule, mean, std)
    kernel = RestorationKernel(network, process=process, num_steps=steps, degraded=images(1)[..., :4, :4], eta=0.0)
    solver = kernel if order == 1 else SecondOrder(kernel, order)
    mu = kernel.offset(torch.zeros(8, 1, 4, 4, dtype=torch.float64))
    y = process.spread * torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = y + mu if order == 1 else torch.stack([y + mu, *[torch.zeros_like(y)] * (order - 1)], 1)
    for t in range(steps, 0, -1):
        x = solver.transition(x, torch.full((8,), t)).mean
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    exact = mean + std / (alpha**2 * std**2 + sigma**2).sqrt() * (y - alpha * mean)
    return float(((x if order == 1 else x[:, 0]) - mu - exact).abs().max())


@pytest.mark.parametrize(("order", "low", "high"), [(1, 0.95, 1.05), (2, 1.8, 2.3)])
def test_the_flow_is_solved_to_its_order(order, low, high):
    """Error C h^p (1 + O(h)): observed orders draw near p as steps are halved; rounding is 1e-12 of it."""
    errors = [error(order, steps) for steps in (20, 40, 80, 160)]
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    assert low <= found[-1] <= high, (errors, found)
    assert errors[0] <= (0.1, 0.02)[order - 1]


def test_the_second_order_has_the_published_correction():
    """α_n φ2 D1, φ2 = 1 - (1 - e^{-κh})/(κh) with κ = 1 for ODE-2 and 2 for SDE-2, D1 = (D - D_prev) h/h_prev."""
    process = MeanReverting(predicts="residual")
    schedule, t = process.schedule(8), torch.tensor([5])
    a, s = schedule.alpha, schedule.sigma
    lam = (a / s).log()
    h, before = lam[4] - lam[5], lam[5] - lam[6]
    x, old = (torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    for eta, weight in ((0.0, 1 + torch.expm1(-h) / h), (1.0, 1 + torch.expm1(-2 * h) / (2 * h))):
        kernel = RestorationKernel(
            Gaussian(schedule, 0.2, 0.3), process=process, num_steps=8, degraded=images(1)[..., :4, :4], eta=eta
        )
        first, law = kernel.transition(x, t), SecondOrder(kernel, 2).transition(torch.stack([x, old], 1), t)
        want = first.mean + a[4] * weight * (first.endpoint - old) * h / before
        assert (law.mean[:, 0] - want).abs().max() <= 64 * 2.0**-52
        assert torch.equal(law.mean[:, 1], first.endpoint)


@pytest.mark.parametrize("process", ["mean_reverting", "residual"])
def test_the_root_lies_around_the_degraded_image(saved, process):
    kernel, noise = restoration_kernel(saved, process, num_steps=3), torch.ones(2, 1, 28, 28)
    cond = kernel.encode([1, images()[0]])
    spread = kernel.prior(noise, cond) - (2 * images()[[1, 0]] - 1)
    assert (spread - kernel.chain.schedule.prior_std).abs().max() <= 4 * 2.0**-24
    assert torch.equal(kernel.prior(noise), kernel.prior(noise, kernel.encode([0, 0])))


def test_a_file_comes_back(saved):
    model = load_model(saved)
    assert model.process == PROCESS
    assert torch.equal(model.degraded, images())
    assert torch.equal(model.clean, images(seed=1))
    kernels = [restoration_kernel(saved, name, num_steps=3) for name in ("mean_reverting", "residual")]
    again = restoration_kernel(saved, num_steps=3)
    assert kernels[0].fingerprint == again.fingerprint != kernels[1].fingerprint
    again.degraded = images(seed=3)
    assert again.fingerprint != kernels[0].fingerprint


def test_one_network_serves_both_processes():
    """A perfect network of mean reversion is one of residual diffusion, where both know the level."""
    residual, r, eps = Residual(predicts="residual"), torch.tensor(0.7), torch.tensor(-0.4)
    clean, mu = torch.full((3, 1, 4, 4), 0.3 + r, dtype=torch.float64), torch.full((3, 1, 4, 4), 0.3)
    asked = []

    class Perfect(nn.Module):
        def forward(self, x, time):
            _, alpha, sigma = (v[:, None, None, None] for v in PROCESS.at(time / PROCESS.train_steps))
            y = x[:, :1]
            asked.append((y - alpha * r - sigma * eps).abs().max())
            return PROCESS.target(clean, x[:, 1:], (y - alpha * r) / sigma, alpha, sigma)

    i = torch.tensor([200.0, 500.0, 700.0], dtype=torch.float64)
    _, alpha, sigma = (v[:, None, None, None] for v in residual.at((i + 1) / residual.train_steps))
    y = alpha * r + sigma * eps.expand(3, 1, 4, 4)
    output = Matched(Perfect(), PROCESS, residual)(torch.cat([y, mu], 1), i)
    assert asked[0] <= 1e-12
    assert (output + r).abs().max() <= 1e-6  # r in float32


def test_prompts_are_images_files_or_numbers(saved, tmp_path):
    kernel = restoration_kernel(saved, num_steps=3)
    Image.fromarray((255 * images()[1, 0]).round().byte().numpy()).save(tmp_path / "digit.png")
    mu = kernel.encode([images()[1], str(tmp_path / "digit.png"), tmp_path / "digit.png", "1", 1])["mu"]
    assert all(torch.equal(row, mu[0]) for row in mu)
    assert torch.equal(mu[0], 2 * images()[1] - 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (images()[0, 0], r"shape \(28, 28\), expected \(1, 28, 28\)"),
        (2 * images()[0], r"expected floats in 0\.\.1"),
        (images()[0] * math.nan, r"expected floats in 0\.\.1"),
        ((255 * images()[0]).byte(), r"uint8 in .*: divide bytes by 255"),
        (2, "the prompt is 2, expected a degraded image.* 0 to 1"),
        (True, "the prompt is True"),
        (None, "the prompt is None"),
        ("nowhere.png", "nowhere.png"),
    ],
    ids=["flat", "range", "nan", "bytes", "number", "truth", "none", "file"],
)
def test_what_is_no_degraded_image_is_refused(saved, prompt, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        restoration_kernel(saved, num_steps=2).encode([prompt])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process": "flow"}, "unknown process 'flow': choose mean_reverting, residual"),
        ({"order": 4}, "order is 4, expected 1, 2 or 3"),
        ({"order": 2.0}, "order is 2.0"),
        ({"order": 2, "process": "residual"}, "order is 2, expected 1: steps of residual diffusion"),
        ({"order": 2, "eta": 0.5}, "needs eta = 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"path": "nothing.safetensors"}, "no weights 'nothing.safetensors'"),
        ({"path": "mnist.safetensors"}, "mnist.safetensors is no restoration model"),
    ],
)
def test_settings_that_are_none_are_refused(saved, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        restoration_kernel(**{"path": saved, **settings})


def test_a_network_that_returns_too_little_is_told(saved):
    model = load_model(saved)
    kernel = RestorationKernel(model.network, process=Residual(), num_steps=2, degraded=model.degraded)
    with pytest.raises(ValueError, match=r"returned shape \(1, 1, 28, 28\), expected \(1, 2, 28, 28\)"):
        kernel.transition(kernel.prior(torch.zeros(1, 1, 28, 28)), torch.tensor([2]))


def test_inpainting_refuses_a_chain_around_an_offset(saved):
    known = torch.ones(1, 28, 28, dtype=torch.bool)
    with pytest.raises(TypeError, match="a chain around an offset"):
        Clamp(restoration_kernel(saved, num_steps=2), known, torch.zeros(1, 28, 28))


def test_it_travels(saved):
    kernel = restoration_kernel(saved, order=2, num_steps=3)
    other, x = pickle.loads(pickle.dumps(kernel)), torch.stack([images(), images(seed=1)], 1)
    assert other.fingerprint == kernel.fingerprint
    assert torch.equal(other.transition(x, torch.tensor([1, 3])).mean, kernel.transition(x, torch.tensor([1, 3])).mean)


def test_a_search_goes_on(saved, tmp_path):
    kernel, half, whole = restoration_kernel(saved, order=2, num_steps=3), ts.Budget(nfe=12), ts.Budget(nfe=24)
    method, reward = ts.TreeSampling(), constant(0.0)
    want = ts.search(kernel, reward, method, prompts=["0", "1"], budget=whole)
    ts.search(kernel, reward, method, prompts=["0", "1"], budget=half, store=tmp_path / "run")
    again = ts.resume(tmp_path / "run", restoration_kernel(saved, order=2, num_steps=3), reward, budget=whole)
    for a, b in zip(want.tasks, again.tasks, strict=True):
        assert torch.equal(a.samples, b.samples)


@pytest.mark.parametrize("process", ["mean_reverting", "residual"])
def test_the_shipped_model_restores_on_the_command_line(process, tmp_path, capsys):
    order = 1 + (process == "mean_reverting")
    kernel = f'restoration("blur.safetensors", process="{process}", order={order}, num_steps=8)'
    words = ["run", "fk", "--kernel", kernel, "--reward", "digit(8)", "--nfe", "32", "--store", str(tmp_path / "run")]
    assert main(words) == 0
    assert "32/32" in capsys.readouterr().out
