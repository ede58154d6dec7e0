"""Restoration: a chain from a noisy copy of a degraded image μ, that a task is given, to a clean one.

    mean reversion       x_t = μ + α_t (x_0 - μ) + σ_t ε              `treesearch.backends.chains.mean_reverting`
    residual diffusion   x_t = x_0 + ā_t (μ - x_0) + b̄_t ε            `treesearch.backends.chains.residual`

Both are a `Chain` on y = x - μ, whose prior is noise alone: the root of a search lies around the degraded image. The
network is called as network(cat(y, μ), timestep); the shipped one was trained on mean reversion and serves both.
Prompts are degraded images; without one a task restores the first that the model's file has.

Order 2 and 3 use the endpoints predicted before, which a state then holds (`SecondOrder`): an offset cancels in their
differences, so they are the paper's ODE-2, ODE-3 and SDE-2. Steps with noise are exact Gaussians at every order.

Weights: the project's own, `backends/weights/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, fingerprint
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.models.mnist import to_images
from treesearch.backends.models.restoration_file import Matched, load_model
from treesearch.backends.models.shipped import shipped_file
from treesearch.rewards.numeric import is_whole

Process = MeanReverting | Residual


@final
class RestorationKernel:
    """The chain of a network that restores.

    Args:
        network: called as network(x, timestep) with x (n, 2 C, h, w), y and then μ, and timestep (n,); returns what the
            process predicts. It is moved to the device, called in evaluation mode and otherwise left as it is.
        process: what it was trained on.
        num_steps: T.
        degraded: images (N, C, h, w) in [0, 1] that prompts may name by number, of which the first is the default.
        eta: 1 draws from the reverse process, 0 is deterministic after the prior.
        name: enters the fingerprint.

    Raises:
        ValueError: a setting out of range, or images that are none.
    """

    sample_range = (0.0, 1.0)

    def __init__(
        self,
        network: nn.Module,
        *,
        process: Process,
        num_steps: int,
        degraded: Tensor,
        eta: float = 1.0,
        device: str | torch.device = "cpu",
        name: str = "restoration",
    ) -> None:
        if degraded.ndim != 4 or not len(degraded):
            raise ValueError(f"degraded has shape {tuple(degraded.shape)}, expected (N, C, h, w)")
        schedule = process.schedule(num_steps)
        self.network, self.process, self.name = network, process, name
        self.degraded = torch.stack([_checked(image, tuple(degraded.shape[1:])) for image in degraded])
        self.num_steps, self.state_shape = schedule.num_steps, tuple(degraded.shape[1:])
        self.device, self.dtype = torch.device(device), torch.float32
        self.chain = Chain(schedule, eta=eta).to(self.device)
        self.stochastic = self.chain.stochastic
        self._quiet = Quiet(network.to(self.device))

    def to(self, device: str | torch.device) -> RestorationKernel:
        """The same kernel, moved to a device."""
        self.device = torch.device(device)
        self.chain.to(self.device)
        self.network.to(self.device)
        return self

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        self._quiet.look()
        noise = noise.to(self.device, self.dtype)
        return self.offset(noise, cond) + self.chain.schedule.prior_std * noise

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        with self._quiet, torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            mu = self.offset(x, cond)
            y = x - mu
            output = self.network(torch.cat([y, mu], 1), self.chain.timestep[t])
            _refuse_output(output, (len(x), self.process.outputs * x.shape[1], *x.shape[2:]))
            alpha, sigma = self.chain.at("alpha", t, x), self.chain.at("sigma", t, x)
            return self.chain.law(x, t, self.process.read(output, y, mu, alpha, sigma), offset=mu)

    def offset(self, x: Tensor, cond: Cond = None) -> Tensor:
        """μ of rows x (n, *state), in units of states."""
        if cond is not None and "mu" in cond:
            return cond["mu"].to(x.dtype)
        return _states(self.degraded[:1]).to(x.device, x.dtype).expand_as(x)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Tensor]:
        """μ of the prompts, (n, *state).

        Args:
            prompts: degraded images, each as a tensor (C, h, w) in [0, 1], as the path of an image file, or as the
                number of one that the model has, from 0.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an image of another size or out of range, or a number beyond those that the model has.
        """
        images = [self._image(prompt) for prompt in prompts]
        return {"mu": _states(torch.stack(images)).to(self.device, self.dtype)}

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return to_images(x0)

    @property
    def fingerprint(self) -> str | None:
        """Hash of the network as it is now, the process, the grid and the images; None for an unreadable network."""
        settings = (self.name, repr(self.process), self.chain.settings())
        found = fingerprint.of([settings, self.chain.tables(), self.degraded, self.network])
        return None if found is None else f"{self.name}:{found}"

    def _image(self, prompt: Any) -> Tensor:
        if isinstance(prompt, str) and prompt.isdecimal():
            prompt = int(prompt)
        if isinstance(prompt, (str, Path)):
            return _checked(_read(Path(prompt), self.state_shape[0]), self.state_shape)
        if is_whole(prompt, 0, len(self.degraded) - 1):
            return self.degraded[prompt]
        if isinstance(prompt, Tensor):
            return _checked(prompt, self.state_shape)
        raise ValueError(
            f"the prompt is {prompt!r}, expected a degraded image: a tensor {self.state_shape} in [0, 1], the path of "
            f"an image file, or the number of one that the model has, 0 to {len(self.degraded) - 1}"
        )


def _states(images: Tensor) -> Tensor:
    """States in [-1, 1] of images in [0, 1]."""
    return 2 * images - 1


def _read(path: Path, channels: int) -> Tensor:
    """An image file as (C, h, w) in [0, 1]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.atleast_3d(np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32))
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def _checked(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(image.shape) != shape:
        raise ValueError(f"the degraded image has shape {tuple(image.shape)}, expected {shape}")
    if not (image.is_floating_point() and image.min() >= 0 and image.max() <= 1):  # NaN compares false
        ends = f"{image.dtype} in {float(image.min()):g}..{float(image.max()):g}"
        raise ValueError(f"the degraded image is {ends}, expected floats in 0..1: divide bytes by 255")
    return image.detach().float().cpu()


def _refuse_output(output: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(output, Tensor) or tuple(output.shape) != shape:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the network returned {got}, expected {shape}: as many images as its process predicts")


def restoration_kernel(
    path: str | Path = "blur.safetensors",
    process: Literal["mean_reverting", "residual"] = "mean_reverting",
    order: int = 1,
    num_steps: int = 8,
    eta: float = 1.0,
    device: str | torch.device = "cpu",
) -> RestorationKernel | SecondOrder:
    """A saved restoration model as a kernel.

    Args:
        path: written by `treesearch.backends.models.restoration_file.save_model`, or the name of a shipped file.
        process: the one that the network was trained on, or residual diffusion, by `Matched`.
        order: 1, 2 or 3; above 1 a state holds earlier endpoints, and eta is 0 or 1.
        num_steps: T.
        eta: 1 draws from the reverse process, 0 is deterministic after the prior.
        device: where the network runs.

    Raises:
        FileNotFoundError: no file of that name is there or shipped.
        ValueError: a setting out of range, or a residual process of an order above 1.
    """
    if process not in ("mean_reverting", "residual"):
        raise ValueError(f"unknown process {process!r}: choose mean_reverting, residual")
    if not is_whole(order, 1, 3):
        raise ValueError(f"order is {order!r}, expected 1, 2 or 3")
    if process == "residual" and order > 1:
        raise ValueError(f"order is {order}, expected 1: steps of residual diffusion are of the first order")
    with shipped_file(path) as file:
        network, taught, degraded, *_ = load_model(file)
    own: Process = taught
    if process == "residual":
        own = Residual(predicts="residual")
        network = Matched(network, taught, own)
    kernel = RestorationKernel(network, process=own, num_steps=num_steps, degraded=degraded, eta=eta, device=device)
    return kernel if order == 1 else SecondOrder(kernel, order)
