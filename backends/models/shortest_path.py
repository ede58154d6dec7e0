"""Digits along a shortest path: a small model whose states are cosine coordinates of images, one schedule a frequency.

    x_0 = C (image - mean) Cᵀ          C the orthonormal cosine transform, Σ_0 the variance of each entry over MNIST
    v̂   = α σ (1 - Σ_0)/Σ_τ x + √(Σ_0/Σ_τ) F(x / √Σ_τ, x)        Σ_τ = α² Σ_0 + σ²

v̂ with F = 0 is the posterior mean of v = α ε - σ x_0 under N(0, Σ_0), and √(Σ_0/Σ_τ) its standard deviation, so that
the network F, which works on pixels, learns only what is not Gaussian, at unit scale in every frequency and level.
The transform is orthonormal: a squared error of coordinates is one of pixels.

Sources: Image generation with shortest path diffusion (Das et al., 2023), for the schedule, with ε in place of v;
Progressive Distillation (Salimans and Ho, 2022), for v; Elucidating the Design Space of Diffusion-Based Generative
Models (Karras et al., 2022), section 5, for outputs around a skip connection. The weights are the project's own:
`backends/weights/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from treesearch.backends.chains import shortest_path
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.models.shipped import load_weights
from treesearch.backends.models.unet2d import SmallUNet
from treesearch.rewards.cosines import cosine_transform

SIZE = 28
STATE_SHAPE = (1, SIZE, SIZE)
WEIGHTS = "spd_mnist.safetensors"
Levels = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(Σ_0, τ (n,)) -> (ᾱ, 1 - ᾱ), each broadcastable to (n, *state)."""


@final
class SpectralNetwork(nn.Module):
    """Predicts v of cosine coordinates.

    Args:
        levels: ᾱ and 1 - ᾱ of the path that it is taught on.
    """

    mean: Tensor
    spectrum: Tensor
    cosines: Tensor

    def __init__(self, levels: Levels = shortest_path.levels) -> None:
        super().__init__()
        self.levels, self.unet = levels, SmallUNet(2, 1)
        self.register_buffer("mean", torch.zeros(STATE_SHAPE))
        self.register_buffer("spectrum", torch.ones(STATE_SHAPE))
        self.register_buffer("cosines", cosine_transform(SIZE).float(), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """v (n, 1, 28, 28) of states x (n, 1, 28, 28) at timesteps 1000 τ (n,)."""
        kept, lost = self.levels(self.spectrum, timestep / 1000)
        variance = kept * self.spectrum + lost
        skip = ((kept * lost).sqrt() * (1 - self.spectrum) / variance).to(x.dtype)
        scale, whitened = (self.spectrum / variance).sqrt().to(x.dtype), x / variance.sqrt().to(x.dtype)
        residual, _ = self.unet(torch.cat([self.pixels(whitened), self.pixels(x)], 1), timestep)
        return skip * x + scale * self.coordinates(residual.to(x.dtype))

    def coordinates(self, pixels: Tensor) -> Tensor:
        """C x Cᵀ of (..., 28, 28)."""
        return self.cosines @ pixels @ self.cosines.T

    def pixels(self, coordinates: Tensor) -> Tensor:
        """CᵀyC, the inverse of `coordinates`."""
        return self.cosines.T @ coordinates @ self.cosines

    def encode(self, images: Tensor) -> Tensor:
        """States x_0 of images in [-1, 1]."""
        return self.coordinates(images - self.mean)

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1], clamped, (n, 1, 28, 28)."""
        return ((self.pixels(x0) + self.mean + 1) / 2).clamp(0, 1)

    def to_state(self, pixels: Tensor) -> Tensor:
        """States x_0 of images in [0, 1], the inverse of `decode`."""
        return self.encode(2 * pixels - 1)

    def fit(self, images: Tensor) -> None:
        """Take mean and spectrum from images in [-1, 1], (n, 1, 28, 28)."""
        self.mean.copy_(images.mean(0))
        self.spectrum.copy_(self.encode(images).var(0))


def shortest_path_kernel(
    weights: str | Path = WEIGHTS, num_steps: int = 25, eta: float = 1.0, device: str | torch.device = "cpu"
) -> DiffusionKernel:
    """A trained model of digits along a shortest path: DDIM(eta) steps in every frequency.

    Args:
        weights: a shipped file by name, or the path of one that `experiments/processes/train_spd.py` wrote.
        num_steps: T.
        eta: 1 is ancestral sampling, 0 is deterministic after the prior.
        device: where the network runs.

    Returns:
        A kernel of cosine coordinates (1, 28, 28); `decode` gives images in [0, 1].

    Raises:
        FileNotFoundError: no such file.
    """
    network = load_weights(SpectralNetwork, weights)
    return DiffusionKernel(
        network,
        state_shape=STATE_SHAPE,
        schedule=shortest_path.shortest_path(network.spectrum, num_steps),
        eta=eta,
        decode=network.decode,
        to_state=network.to_state,
        sample_range=(0.0, 1.0),
        device=device,
        name="spd",
    )
