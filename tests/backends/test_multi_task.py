"""Several modalities on one chain: the accumulated mean, its posterior, which weights have a prior, known parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.multi_task import accumulated, first_only, multi_task
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.mnist import cosine_alphas_cumprod, to_images
from treesearch.backends.models.multi_task import (
    LabelHead,
    Labelled,
    MultiTaskKernel,
    MultiTaskNetwork,
    patterns,
)
from treesearch.testing import check_kernel

K, T = 400, 8
EPS = 2.0**-52
BARS = cosine_alphas_cumprod(K)
FALLING = 0.5 ** torch.arange(K, dtype=torch.float64)  # of w: half of what came before at each step


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# the chain


def test_means_accumulate():
    """A_t of the closed form is that of the recursion z_t = √α_t (z_{t-1} + w_t E)."""
    kept, before, mean = accumulated(BARS, FALLING), 1.0, 0.0
    for t, (bar, w) in enumerate(zip(BARS.tolist(), FALLING.tolist(), strict=True)):
        mean = math.sqrt(bar / before) * (mean + w)
        before = bar
        assert kept[t] == pytest.approx(mean, rel=16 * K * EPS)


def test_the_first_weight_alone_is_ddpm():
    one, other = multi_task(BARS, T), Schedule.variance_preserving(BARS, T, prediction="sample")
    assert torch.equal(one.timestep, other.timestep)
    for name in ("alpha", "sigma"):
        assert (getattr(one, name) - getattr(other, name)).abs().max() <= 2 * EPS
    x, output, t = draws(4, 3), draws(4, 3, seed=1), torch.tensor([1, 2, 5, T])
    laws = [Chain(schedule, eta=0.6).law(x, t, output) for schedule in (one, other)]
    for name in ("mean", "std", "endpoint"):
        assert (getattr(laws[0], name) - getattr(laws[1], name)).abs().max() <= 16 * EPS, name


def test_a_step_is_the_posterior_of_the_process():
    """q(z_s | z_t, E) by Bayes, of z_s ~ N(A_s E, σ_s²) and z_t = c z_s + (A_t - c A_s) E + √(σ_t² - c²σ_s²) ε."""
    schedule = multi_task(BARS, T, weights=FALLING)
    z, e, t = draws(3, 2), draws(3, 2, seed=1), torch.tensor([2, 4, T])
    law = Chain(schedule).law(z, t, e)
    bar = torch.cat([torch.ones(1).double(), BARS[schedule.timestep]])
    a_t, a_s = (schedule.alpha[k][:, None] for k in (t, t - 1))
    c, var_s = (bar[t] / bar[t - 1]).sqrt()[:, None], (1 - bar[t - 1])[:, None]
    noise = 1 - c**2  # of all steps between the two
    precision = 1 / var_s + c**2 / noise
    mean = (a_s * e / var_s + c * (z - (a_t - c * a_s) * e) / noise) / precision
    assert (law.mean - mean).abs().max() <= 1e-13
    assert (law.std - precision.rsqrt()).abs().max() <= 1e-13


def test_marginals_of_the_chain_are_those_of_the_process():
    """Steps with the true E lead from N(A_T E, σ_T²) to N(A_t E, σ_t²) at every t."""
    schedule = multi_task(BARS, T, weights=FALLING)
    chain, e = Chain(schedule), torch.full((1, 1), 1.7, dtype=torch.float64)
    mean, variance = schedule.alpha[T] * e, schedule.sigma[T] ** 2
    for t in range(T, 0, -1):
        level = torch.tensor([t])
        law, moved = chain.law(mean, level, e), chain.law(mean + 1, level, e)
        mean, variance = law.mean, (moved.mean - law.mean) ** 2 * variance + law.std**2
        assert float(mean - schedule.alpha[t - 1] * e) == pytest.approx(0, abs=64 * EPS)
        assert float(variance - schedule.sigma[t - 1] ** 2) == pytest.approx(0, abs=64 * EPS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (0.1 * torch.ones(K), "A_T is 0.58, expected at most 0.01"),
        (torch.full((K,), torch.nan), "400 finite numbers"),
        (torch.ones(K - 1), r"shape \(399,\), expected 400"),
        (first_only(K) + 0.5 * torch.eye(1, K)[0].roll(9), "A/σ rises at step 10"),
        (torch.zeros(K), "alpha stays above 0"),
    ],
)
def test_weights_without_a_chain_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        multi_task(BARS, T, weights=weights)


# the model


@pytest.fixture(scope="module")
def network() -> MultiTaskNetwork:
    torch.manual_seed(0)
    return MultiTaskNetwork().eval()


def test_the_plane_tells_the_label_as_bayes_says(network):
    """log-odds of a plane are differences of log N(plane; A E_2(y), σ²)."""
    alpha, sigma = torch.tensor([[0.6], [0.2]]), torch.tensor([[0.8], [0.9]])
    plane = draws(2, 28, 28).float()
    gap = plane.flatten(1)[:, None] - alpha[..., None] * patterns()
    want = (-0.5 * gap.double().square().sum(2) / sigma**2).log_softmax(1)
    found = network.evidence(plane, alpha, sigma).double().log_softmax(1)
    assert (found - want).abs().max() <= 1e-4  # sums of 784 float32


def test_labels_are_read_off_their_planes(network):
    labels = torch.arange(10)
    plane = network.plane(torch.eye(10))
    assert network.labels(torch.cat([torch.zeros_like(plane), plane], 1)).tolist() == labels.tolist()


def test_known_parts_are_the_endpoint(network):
    kernel = MultiTaskKernel(network, num_steps=4)
    image = torch.rand(1, 28, 28)
    cond = kernel.encode([{"label": 3}, {"image": image}, "both, please", {"label": 7, "image": image}])
    x, t = draws(4, 2, 28, 28).float(), torch.tensor([1, 2, 3, 4])
    law, free = kernel.transition(x, t, cond), kernel.transition(x, t)
    told = network.plane(torch.eye(10)[[3, 7]])[:, 0]
    assert torch.equal(law.endpoint[[0, 3], 1], told)
    assert torch.equal(law.endpoint[[1, 3], 0], (2 * image - 1).expand(2, 28, 28))
    assert torch.equal(law.endpoint[2], free.endpoint[2])
    assert not torch.equal(law.endpoint[0, 0], free.endpoint[0, 0])  # the network is told the label too
    assert torch.equal(law.endpoint[1, 1], free.endpoint[1, 1])
    assert torch.equal(kernel.decode(law.endpoint)[[1, 3]], to_images((2 * image - 1).expand(2, 1, 28, 28)))


def test_the_two_terms_of_the_posterior_are_apart(network):
    """The head sees no plane and no label that is told, and the plane's term no image."""
    z, t = draws(3, 2, 28, 28).float(), torch.tensor([10, 400, 900])
    other = draws(3, 2, 28, 28, seed=1).float()
    _, seen, evidence = network(z, t)
    _, told, _ = network(torch.stack([z[:, 0], other[:, 1]], 1), t, torch.tensor([1, 2, 3]))
    _, _, plane = network(torch.stack([other[:, 0], z[:, 1]], 1), t)
    assert torch.equal(seen, told)
    assert torch.equal(evidence, plane)


def test_the_label_head_is_a_value_of_the_same_call(network, monkeypatch):
    kernel, calls = MultiTaskKernel(network, num_steps=4), []
    monkeypatch.setattr(network.unet, "forward", lambda *args, own=network.unet.forward: calls.append(1) or own(*args))
    x, t = draws(3, 2, 28, 28).float(), torch.tensor([1, 2, 4])
    law = kernel.transition(x, t)
    values = torch.stack([LabelHead(y)(x, t, law, None) for y in range(10)], 1)
    assert len(calls) == 1
    assert (values.exp().sum(1) - 1).abs().max() <= 1e-5
    taken = law.take(torch.tensor([2, 0]))
    assert isinstance(taken, Labelled)
    assert torch.equal(LabelHead(4)(x, t, taken, None), values[[2, 0], 4])


def test_the_kernel_obeys_the_laws(network):
    kernel = MultiTaskKernel(network, num_steps=3)
    check_kernel(kernel, prompts=[{"label": 3}, {"image": torch.zeros(1, 28, 28)}, None])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda k: k.encode([{"label": 10}]), ValueError, "label is 10, expected 0..9"),
        (lambda k: k.encode([{"label": "8"}]), ValueError, "label is '8', expected 0..9"),
        (lambda k: k.encode([{"image": torch.zeros(28, 28)}]), ValueError, r"shape \(28, 28\), expected \(1, 28, 28\)"),
        (lambda k: k.encode([{"image": torch.full((1, 28, 28), torch.nan)}]), ValueError, "pixels in 0..1"),
        (lambda k: LabelHead(-1), ValueError, "label is -1, expected 0..9"),
        (
            lambda k: LabelHead(8)(torch.zeros(1), torch.ones(1), object(), None),
            TypeError,
            "log-odds of labels, got object",
        ),
    ],
)
def test_bad_input_is_refused(network, make, error, message):
    with pytest.raises(error, match=message):
        make(MultiTaskKernel(network, num_steps=2))
