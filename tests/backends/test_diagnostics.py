"""Whether a field is a gradient, against fields that are known to be one or not; straightness against known paths."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import tiny
from tests.support.flows import THREE, Around, GaussianFlow, log_snr
from tests.support.tolerance import EPS
from treesearch.backends import mnist, ring
from treesearch.backends.base import Gaussian
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.diagnostics.conservative import (
    NoGradient,
    antisymmetry,
    asymmetry,
    endpoint_field,
    gauged,
    jacobian,
    loop,
    products,
)
from treesearch.backends.diagnostics.straightness import gaps, path
from treesearch.testing.chains import conditioning

F64 = torch.float64
EAST, NORTH = torch.eye(2, dtype=F64)


def normals(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mixture_score(x):
    """∇ log of three Gaussians, std .7."""
    means = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]], dtype=x.dtype)
    gap = means - x[:, None]
    return ((-0.5 * (gap**2).sum(2) / 0.49).softmax(1)[..., None] * gap / 0.49).sum(1)


def perceptron(sizes, seed=0):
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def test_an_exact_score_is_a_gradient_and_a_network_is_none():
    x, z = normals(64, 2), normals(64, 2, seed=1)
    assert asymmetry(mixture_score, x, z).value < 1e-12
    assert abs(loop(mixture_score, torch.tensor([0.3, -0.1], dtype=F64), EAST, NORTH, 0.8).share) < 1e-12
    network = perceptron([2, 32, 2])
    assert asymmetry(network, x, z).value > 0.1
    assert abs(loop(network, torch.zeros(2, dtype=F64), EAST, NORTH, 0.8).share) > 0.1


def test_a_network_that_is_the_gradient_of_an_energy_passes():
    energy = perceptron([2, 16, 1])

    def field(x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]

    assert asymmetry(field, normals(16, 2), normals(16, 2, seed=1)).value < 1e-12


def test_products_are_those_of_the_jacobian():
    network, x, z = perceptron([5, 16, 5]), normals(3, 5), normals(3, 5, seed=1)
    full = jacobian(network, x, range(5))
    forward, back = products(network, x, z)
    assert torch.allclose(forward, torch.einsum("nij,nj->ni", full, z), atol=1e-12)
    assert torch.allclose(back, torch.einsum("nij,ni->nj", full, z), atol=1e-12)
    assert not torch.allclose(forward, back, atol=1e-3)


def test_hutchinson_is_within_its_error_of_the_truth():
    network, x = perceptron([6, 32, 6]), normals(1, 6)
    true = antisymmetry(jacobian(network, x, range(6)))
    found = asymmetry(network, x.expand(2000, 6), normals(2000, 6, seed=2))
    assert abs(found.value - true) < 4 * found.se < 0.1 * true


def test_the_error_beside_an_asymmetry_is_how_far_it_varies():
    network, x = perceptron([6, 32, 6]), normals(1, 6).expand(60, 6)
    found = [asymmetry(network, x, normals(60, 6, seed=seed)) for seed in range(100)]
    told, seen = (np.mean([f.se for f in found]), np.std([f.value for f in found], ddof=1))
    assert 0.65 < told / seen < 1.5  # a standard deviation of 100 has an error of 7 %, that of 60 squares more


def test_a_probe_with_zeros_looks_at_a_part_of_the_jacobian():
    network, x = perceptron([6, 32, 6]), normals(1, 6)
    entries = [1, 4, 5]
    z = torch.zeros(2000, 6, dtype=F64)
    z[:, entries] = normals(2000, 3, seed=3)
    found, true = asymmetry(network, x.expand(2000, 6), z), antisymmetry(jacobian(network, x, entries))
    assert abs(found.value - true) < 4 * found.se < 0.1 * true


def test_stokes_holds_exactly_for_a_linear_field():
    radius, turn = 0.5, -0.375006549 / (math.pi * 0.25)
    j = torch.tensor([[0.7, 0.2], [0.2 + turn, -0.4]], dtype=F64)
    found = loop(lambda x: x @ j.T, torch.tensor([0.4, -1.0], dtype=F64), EAST, NORTH, radius)
    assert found.integral == pytest.approx(-0.375006549, abs=1e-15 * 256)
    assert abs(found.integral) < found.total


def test_a_gauge_field_is_no_gradient_and_leaves_the_law_alone():
    a, b = normals(4, 4), normals(4, 4, seed=1)
    covariance, k = a @ a.T + torch.eye(4, dtype=F64), (b - b.T) / 2
    precision = covariance.inverse()
    field = gauged(lambda x: -x @ precision, k)
    drift = jacobian(field, normals(1, 4), range(4))[0]
    # dx = A x dt + √2 dW keeps N(0, C) where A C + C Aᵀ + 2 I = 0
    residual = drift @ covariance + covariance @ drift.T + 2 * torch.eye(4, dtype=F64)
    assert residual.abs().max() < 1e-13 * covariance.abs().max() * drift.abs().max()
    assert antisymmetry(drift[None]) > 0.3
    with pytest.raises(ValueError, match="not antisymmetric"):
        gauged(mixture_score, b)


def test_endpoints_of_exact_kernels_are_gradients_at_every_level():
    kernel = ring(num_steps=20)
    x = kernel.prior(normals(16, 3))
    for t in (20, 10, 2):
        assert asymmetry(endpoint_field(kernel, t), x, normals(16, 2, seed=t)).value < 1e-12


def test_the_shipped_network_is_no_gradient_and_its_limit_is_not_taken_for_that():
    kernel = mnist(num_steps=10)
    x, z = normals(2, 1, 28, 28, dtype=torch.float32), normals(2, 1, 28, 28, seed=1, dtype=torch.float32)
    found = asymmetry(endpoint_field(kernel, 9), x, z)
    assert 0.1 < found.value < math.sqrt(2)
    level = torch.full((2,), 9)
    with torch.no_grad():
        output, alpha, sigma = (
            kernel.model(x, kernel.chain.timestep[level]),
            kernel.chain.alpha[9],
            kernel.chain.sigma[9],
        )
        free = alpha.float() * x - sigma.float() * output
        assert free.abs().max() > 1.0
        # ε̂ has the rounding of the mean over its part in it, and x̂_0 that over α
        room = 64 * EPS / float(kernel.chain.direction[9]) / float(alpha)
        assert (endpoint_field(kernel, 9)(x) - free).abs().max() < room
        assert room < 0.01


def test_attention_has_second_derivatives_here(tiny_root):
    from treesearch.backends.pipelines import DiffusersKernel

    kernel = DiffusersKernel.from_pretrained(str(tiny.checkpoint("sd", tiny_root)), num_steps=3)
    cond = conditioning(kernel, ["a cat"], np.zeros(1, np.int64))
    x = normals(1, *kernel.state_shape, dtype=torch.float32)
    assert 0 < asymmetry(endpoint_field(kernel, 2, cond), x, normals(*x.shape, seed=1, dtype=torch.float32)).value < 2


def test_a_field_without_a_gradient_says_so():
    with pytest.raises(NoGradient, match="no gradient"):
        asymmetry(lambda x: x.detach(), normals(2, 2), normals(2, 2))
    assert asymmetry(lambda x: 0 * x, normals(2, 2), normals(2, 2)).value == 0


def straight(x0, steps=6, bend=0.0):
    """A kernel whose network knows x_0, which it moves by bend · t."""
    schedule = Schedule.flow(torch.linspace(0, 1, steps + 1, dtype=F64))
    ends = torch.as_tensor(x0, dtype=torch.float32)

    def model(x, time):
        time = time[:, None].to(x.dtype) / 1000  # as networks are told it
        return (x - ends - bend * time) / time  # v = ε - x_0 at x = (1 - t) x_0 + t ε

    return DiffusionKernel(model, state_shape=(2,), schedule=schedule, eta=0.0)


def test_paths_of_first_order_have_no_gap_and_bent_ones_what_they_miss():
    x0 = normals(8, 2, dtype=torch.float32)
    ends, last = path(straight(x0), normals(8, 2, seed=1, dtype=torch.float32))
    assert torch.allclose(last, x0, atol=64 * EPS)
    assert max(float(g.mean()) for g in gaps(ends, last).values()) < 1e-10
    ends, last = path(straight(x0, bend=0.5), normals(8, 2, seed=1, dtype=torch.float32))
    times = straight(x0).chain.sigma
    spread = float(((last - last.mean(0)) ** 2).sum() / 7)
    for t, gap in gaps(ends, last).items():
        missed = 2 * (0.5 * float(times[t] - times[1])) ** 2
        assert float(gap.mean()) == pytest.approx(missed / spread, abs=1e-5)


def test_the_path_of_a_chain_that_draws_is_that_of_the_one_that_does_not():
    schedule = Schedule.flow(torch.linspace(0, 1, 6, dtype=F64))

    def model(x, time):
        return torch.sin(2 * x) + x * time[:, None].to(x.dtype) / 1000

    drawing, plain = (DiffusionKernel(model, state_shape=(2,), schedule=schedule, eta=eta) for eta in (1.0, 0.0))
    x = normals(8, 2, dtype=torch.float32)
    ends, last = path(drawing, x)
    for t in range(5, 0, -1):
        law = plain.transition(x, torch.full((8,), t))
        assert torch.allclose(ends[t], law.endpoint, atol=64 * EPS)
        x = law.sample(normals(8, 2, seed=t, dtype=torch.float32))
    assert torch.allclose(last, x, atol=64 * EPS)


def test_a_path_around_an_offset_is_that_of_what_lies_beyond_it():
    bed, x = GaussianFlow(log_snr(5), THREE), normals(4, 3)
    shifted = Around(bed)
    (_, plain), (ends, last) = path(bed, x), path(shifted, x + shifted.offset(x))
    assert (last - shifted.offset(x) - plain).abs().max() < 1e-13
    assert len(ends) == 5


def test_gaps_of_one_point_are_nothing_and_kernels_without_a_chain_have_no_path():
    same = torch.ones(4, 2)
    assert float(gaps({1: same}, same)[1].mean()) == 0
    with pytest.raises(ValueError, match="without a Gaussian chain"):
        path(ring(), torch.zeros(1, 2, dtype=F64))


def test_a_law_of_another_kind_gives_its_endpoint():
    class Plain:
        num_steps, state_shape = 2, (3,)

        def prior(self, noise, cond=None):
            return noise

        def transition(self, x, t, cond=None):
            return Gaussian(0.5 * x, torch.ones(len(x), 1), 0.8 * x)

        def encode(self, prompts):
            return None

        def decode(self, x0):
            return x0

    x = normals(2, 3)
    assert torch.equal(endpoint_field(Plain(), 1)(x), 0.8 * x)


@pytest.mark.slow
def test_a_trained_network_is_clearly_no_gradient():
    """With what `python -m experiments.diagnose.conservative` trains and writes."""
    from experiments.diagnose.conservative import plane, trained

    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for name, figures in plane(trained(1000, draw), draw).items():
        if name.endswith("exact"):
            assert figures["asymmetry"] < 1e-6
            assert abs(figures["loop"]) < 1e-4
        else:
            assert figures["asymmetry"] > 0.005
