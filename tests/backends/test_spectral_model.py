"""The model of digits along a shortest path: coordinates, what its skip connection knows, the shipped weights."""

from __future__ import annotations

import pytest
import torch

from tests.support.tolerance import float32_tolerance
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.shortest_path import shortest_path
from treesearch.backends.models.shipped import load_weights
from treesearch.backends.models.shortest_path import STATE_SHAPE, SpectralNetwork, shortest_path_kernel
from treesearch.testing import check_kernel


@pytest.fixture
def network() -> SpectralNetwork:
    """With mean and spectrum of random images, and a network that says nothing."""
    torch.manual_seed(0)
    network = SpectralNetwork().eval().requires_grad_(False)
    network.fit(torch.rand(200, *STATE_SHAPE).cumsum(3) / 14 - 1)
    for weights in network.unet.last.parameters():
        torch.nn.init.zeros_(weights)
    return network


def test_coordinates_and_images_are_inverse(network):
    images = 2 * torch.rand(5, *STATE_SHAPE) - 1
    room = float32_tolerance(28.0, terms=28, layers=4)
    assert (network.decode(network.encode(images)) - (images + 1) / 2).abs().max() <= room
    again = network.encode(torch.rand(200, *STATE_SHAPE))
    assert again.square().sum() == pytest.approx(float((network.pixels(again)).square().sum()), rel=1e-5)


def test_the_spectrum_is_the_variance_of_coordinates(network):
    images = torch.rand(50, *STATE_SHAPE)
    network.fit(images)
    states = network.encode(images)
    assert (states.mean(0)).abs().max() <= float32_tolerance(28.0, terms=28, layers=4)
    assert torch.allclose(states.var(0), network.spectrum)


def test_a_silent_network_is_the_gaussian_denoiser(network):
    """x̂_0 = α Σ_0 / (α² Σ_0 + σ²) x in every frequency."""
    schedule = shortest_path(network.spectrum, 5)
    kernel = DiffusionKernel(network, state_shape=STATE_SHAPE, schedule=schedule)
    x, t = torch.randn(5, *STATE_SHAPE), torch.arange(1, 6)
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    want = alpha * network.spectrum / (alpha**2 * network.spectrum + sigma**2) * x
    assert (kernel.transition(x, t).endpoint - want).abs().max() <= float32_tolerance(8.0, layers=8)


def test_the_shipped_model_obeys_the_laws():
    check_kernel(shortest_path_kernel(num_steps=2))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("none.safetensors", FileNotFoundError, r"no weights 'none\.safetensors': neither a file nor the name"),
        ("../weights/mnist.safetensors", FileNotFoundError, "neither a file nor the name"),
        ("mnist.safetensors", ValueError, "has no weights of a SpectralNetwork"),
        (__file__, ValueError, "has no weights of a SpectralNetwork"),
        (3, TypeError, "3 is no name of a file of weights"),
    ],
)
def test_weights_that_are_none_are_refused(name, kind, message):
    with pytest.raises(kind, match=message):
        load_weights(SpectralNetwork, name)
