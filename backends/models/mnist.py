"""The embedded default model: unconditional 28 x 28 MNIST digits, small enough for a CPU.

Notation: x_k = sqrt(alpha_bar_k) x_0 + sqrt(1 - alpha_bar_k) eps, k = 1..K; K = 1000.

    alpha_bar_k = cos^2(pi/2 * k / (K + 1))
    v_k         = sqrt(alpha_bar_k) eps - sqrt(1 - alpha_bar_k) x_0

The network predicts v, which stays well conditioned where alpha_bar is almost 0, so that a few
stochastic steps suffice. It works on a space-to-depth view of the image (1 x 28 x 28, padded to
32 x 32, becomes 4 x 16 x 16): the same picture at a quarter of the positions, so more than twice
the speed of a UNet of like size on the pixels.

Sources: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), eq. 17, for
the cosine schedule; Salimans & Ho, "Progressive Distillation" (2022), sec. 4 and app. D, for v;
Shi et al., "Real-Time Single Image and Video Super-Resolution" (2016), for space-to-depth.
The weights are the project's own: `backends/weights/README.md`.
"""

from __future__ import annotations

import math
from importlib import resources
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from treesearch.backends.chains.diffusion import DiffusionKernel
    from treesearch.backends.chains.heun import Heun
    from treesearch.backends.chains.second_order import SecondOrder

Solver = Literal["ddim", "2m", "heun"]
TRAIN_STEPS = 1000
STATE_SHAPE = (1, 28, 28)
CHANNELS = (48, 64, 96)
WEIGHTS = "mnist.safetensors"
_PAD = 2  # 28 -> 32, so that the space-to-depth view halves cleanly: 16, 8, 4


def cosine_alphas_cumprod(num_steps: int = TRAIN_STEPS) -> Tensor:
    """alpha_bar_k = cos^2(pi/2 * k / (K + 1)) for k = 1..K, as a float64 tensor of shape (K,).

    The divisor K + 1 keeps the last value (2.5e-6 at K = 1000) above zero: the prior N(0, I) fits
    it to 0.0016 standard deviations, and no formula divides by zero.
    """
    k = torch.arange(1, num_steps + 1, dtype=torch.float64, device="cpu")
    return torch.cos(0.5 * math.pi * k / (num_steps + 1)).square()


class MnistNetwork(nn.Module):
    """v-prediction network: a diffusers `UNet2DModel` on the space-to-depth view of the image."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ImportError("the MNIST model needs diffusers: pip install diffusers") from error
        levels = len(channels)
        self.unet = UNet2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Predict v.

        Args:
            x: (n, 1, 28, 28) noisy images.
            timestep: (n,) or scalar, 0..999; timestep i is training step k = i + 1.

        Returns:
            (n, 1, 28, 28) predicted v.
        """
        folded = F.pixel_unshuffle(F.pad(x, (_PAD,) * 4), 2)
        v = F.pixel_shuffle(self.unet(folded, timestep).sample, 2)
        return v[..., _PAD:-_PAD, _PAD:-_PAD]


def build_network() -> nn.Module:
    """The architecture of the embedded model with fresh random weights."""
    return MnistNetwork()


def load_network() -> nn.Module:
    """The embedded model with its trained weights: eval mode, float32, no gradients to weights.

    The file stores float16 to halve its size; figures are measured on the float32 cast of it.
    """
    from safetensors.torch import load

    with torch.device("cpu"):  # whatever torch's default device and dtype
        network = build_network().float()
    blob = resources.files("treesearch.backends").joinpath("weights", WEIGHTS).read_bytes()
    network.load_state_dict({name: w.float() for name, w in load(blob).items()})
    return network.eval().requires_grad_(False)


def to_images(x0: Tensor) -> Tensor:
    """Map states in [-1, 1] to images in [0, 1], clamped, shape (n, 1, 28, 28)."""
    return ((x0 + 1) / 2).clamp(0, 1)


def from_images(pixels: Tensor) -> Tensor:
    """Map images in [0, 1] to states in [-1, 1], the inverse of `to_images`."""
    return 2 * pixels - 1


def mnist_kernel(
    num_steps: int = 25, eta: float | None = None, device: str | torch.device = "cpu", solver: Solver = "ddim"
) -> DiffusionKernel | SecondOrder | Heun:
    """The embedded model as a kernel: unconditional digits.

    Args:
        num_steps: T, denoising steps from the prior to the image.
        eta: 1 is ancestral sampling, 0 is deterministic (and cannot branch below the prior); None is 1, and 0 for
            "heun", which takes no other. "2m" takes 0 or 1.
        device: where the network runs.
        solver: "ddim", DDIM(eta) steps; "2m", the same at second order by the endpoints before, see
            `chains.second_order`; "heun", the flow in 2 T - 1 half steps, see `chains.heun`.

    Returns:
        A kernel with states (1, 28, 28) in [-1, 1], a `DiffusionKernel`, or one with memory around it, whose states
        are (2, 1, 28, 28); `decode` gives images in [0, 1].

    Raises:
        ValueError: an unknown solver, or one that does not take this eta.
    """
    from treesearch.backends.chains.diffusion import DiffusionKernel
    from treesearch.backends.chains.heun import Heun
    from treesearch.backends.chains.schedules import Schedule
    from treesearch.backends.chains.second_order import SecondOrder

    solvers = {"ddim": lambda kernel: kernel, "2m": SecondOrder, "heun": Heun}
    if solver not in solvers:
        raise ValueError(f"unknown solver {solver!r}: choose {', '.join(solvers)}")
    network = load_network()
    return solvers[solver](
        DiffusionKernel(
            network.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]  # a sixth faster on a CPU
            state_shape=STATE_SHAPE,
            schedule=Schedule.variance_preserving(cosine_alphas_cumprod(), num_steps, prediction="v"),
            eta=(0.0 if solver == "heun" else 1.0) if eta is None else eta,
            clip_sample=1.0,
            decode=to_images,
            to_state=from_images,
            sample_range=(0.0, 1.0),
            device=device,
            name="mnist",
        )
    )
