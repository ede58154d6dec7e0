"""Where a chain begins instead of its prior: a picture, or noise of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base.pictures import is_same, pixels_of
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import vae
from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.masks import Held


@dataclass(frozen=True)
class Root:
    """Where a chain begins.

    Args:
        state: (*state), x_T or x_0 of a picture; None is the prior's.
        is_prior: whether it is x_T.
        held: what a mask keeps of a picture.
    """

    state: Tensor | None = None
    is_prior: bool = False
    held: Held | None = None

    def to(self, device: str | torch.device) -> Root:
        """The same on a device."""
        state = None if self.state is None else self.state.to(device)
        return Root(state, self.is_prior, None if self.held is None else self.held.to(device))

    def first(self, schedule: Schedule, noise: Tensor) -> Tensor:
        """The first states (n, *state) of a chain on a grid, from noise (n, *state)."""
        if self.state is None:
            return schedule.prior_std * noise
        if self.is_prior:
            return self.state.expand_as(noise).clone()
        return float(schedule.alpha[-1]) * self.state + float(schedule.sigma[-1]) * noise


def noise_of(noise: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise of a state's shape.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or values that are not finite.
    """
    if not isinstance(noise, Tensor):
        raise TypeError(f"x_T is {type(noise).__name__}, expected a tensor {shape}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"x_T has shape {tuple(noise.shape)}, expected {shape}")
    if not (noise.is_floating_point() and noise.isfinite().all()):
        raise ValueError(f"x_T is {noise.dtype} or has values that are not finite, expected finite floats")
    return noise


def refuse_another(family: Family, image: Any, mask: Any) -> None:
    """Refuse to begin at a picture, or under a mask, of which the network is told another.

    Raises:
        ValueError: it is.
    """
    refuse_another_picture(family, image)
    if family.sees and not is_same(mask, family.settings.mask, 1):
        raise ValueError(f"the network of {family.name} is told the mask that this kernel was made with: make another "
                         "kernel, image=..., mask=...")  # fmt: skip


def refuse_another_picture(family: Family, image: Any) -> None:
    """The part of `refuse_another` that is about the picture."""
    if family.is_told and not is_same(image, family.settings.image, 3):
        raise ValueError(f"the network of {family.name} is told the picture that this kernel was made with: make "
                         "another kernel, image=...")  # fmt: skip


def state_of(family: Family, image: Any) -> Tensor:
    """x_0 (*state) of a picture, see `DiffusersKernel.state_of`."""
    pipe, shape = family.pipe, family.state_shape
    if hasattr(pipe, "video_processor"):
        raise ValueError(f"{type(pipe).__name__} draws videos, of which an image is no state: begin from latents with "
                         "from_noise")  # fmt: skip
    if not family.plain:
        return family.state_of(image)
    decoder = getattr(pipe, "vae", None)
    height, width = family.unpack(torch.empty(1, *shape, device="meta")).shape[-2:]
    if decoder is None:
        return family.pack(2 * pixels_of(image, shape[0], (height, width))[None].to(family.device) - 1)[0]
    side = vae.factor(pipe)
    pixels = pixels_of(image, 3, (side * height, side * width))
    return family.pack(vae.encode(decoder, pixels[None]))[0].to(family.device)
