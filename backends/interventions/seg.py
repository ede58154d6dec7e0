"""Smoothed energy guidance: away from a network whose queries are blurred along the image.

    Q̃ = G_σ * Q,     out = softmax(Q̃ K^T / √d) V,     ε̃ = ε + w (ε - ε_σ)

σ = 0 is the network; at σ = ∞ every token asks for the mean query. To blur queries is to blur the attention weights
before the softmax, at the cost of a small matrix. G_σ is Gaussian over rows and columns of tokens, its weights divided
by their sum over those that there are, so that its limit is the mean exactly; published code cuts the kernel off and
reflects the image at its border instead. Frames of a video are blurred each for itself. Where a text attends jointly,
its queries stay.

Source: Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention (Hong, 2024),
section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import expand
from treesearch.backends.base.taps import Attend, tapped
from treesearch.backends.interventions.away import Away
from treesearch.backends.interventions.base import Intervened, Intervention, Rows, network_of
from treesearch.backends.interventions.cfg import bottom
from treesearch.backends.interventions.heads import Heads, Network, check_heads, chosen, image_tokens
from treesearch.backends.interventions.softpag import all_of
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class SEG(Intervention):
    """Blurred queries.

    Args:
        parts: modules, as `all_of` has them.
        sides: frames, height and width of the image in any unit: tokens of each module are laid out in this proportion.
        sigma: σ in tokens, each a setting.

    Raises:
        ValueError: a σ out of range.
    """

    parts: Heads
    sides: tuple[int, int, int]
    sigma: tuple[float, ...] = (math.inf,)

    def __post_init__(self) -> None:
        check_heads(self.parts)
        if not self.sigma or not all(is_number(s, 0) for s in self.sigma):
            raise ValueError(f"sigma is {self.sigma!r}, expected numbers >= 0")

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"{', '.join(self.parts)}, σ = {s:g}" for s in self.sigma)

    def check(self, kernel: Any) -> None:
        chosen(network_of(kernel), self.parts)

    @contextmanager
    def on(self, network: Network, rows: Rows) -> Iterator[None]:
        with image_tokens(network) as image:
            taps = {name: partial(self._tap, rows, partial(image, name)) for name in chosen(network, self.parts)}
            with tapped(network, taps):
                yield

    def _tap(self, rows: Rows, image: Callable[[int], slice], attend: Attend, *qkv: Tensor) -> Tensor:
        q, k, v = qkv
        setting, mine = rows.of_network(q).setting, image(q.shape[2])
        layout = grid(q[:, :, mine].shape[2], self.sides)
        blurred = q.clone()
        for i, sigma in enumerate(self.sigma, 1):
            these = setting == i
            blurred[these, :, mine] = blur(q[these, :, mine], layout, sigma)
        return torch.where(expand(setting > 0, q), attend(blurred, k, v), attend(q, k, v))


def blur(tokens: Tensor, layout: tuple[int, int, int], sigma: float) -> Tensor:
    """Tokens (..., n, width), n = frames × height × width, blurred over height and width."""
    if sigma == 0:
        return tokens
    shaped = tokens.unflatten(-2, layout)
    down, across = (_weights(side, sigma, tokens) for side in layout[1:])
    return torch.einsum("ij,kl,...fjld->...fikd", down, across, shaped).flatten(-4, -2)


def _weights(side: int, sigma: float, like: Tensor) -> Tensor:
    """Gaussian weights (side, side), rows of sum 1."""
    at = torch.arange(side, device=like.device, dtype=torch.float64)
    return torch.softmax(-0.5 * ((at[:, None] - at) / sigma).square(), -1).to(like)


def grid(n: int, sides: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, height and width of n tokens: of all that fit, those in the proportion of the image.

    Raises:
        RuntimeError: they are no image of so many frames.
    """
    frames, height, width = sides
    each, rest = divmod(n, frames)
    fits = [h for h in range(1, each + 1) if each % h == 0]
    best = min(fits, key=lambda h: abs(math.log(h * h * width / (each * height))), default=0)
    if rest or not best or abs(math.log(best * best * width / (each * height))) > math.log(2):
        raise RuntimeError(f"{n} tokens are no {frames} images of {height}:{width}: SEG does not know where they lie")
    return frames, best, each // best


def seg(
    kernel: Any,
    parts: str | Sequence[str],
    sigma: float | tuple[float, ...] = math.inf,
    scale: float = 1.0,
    levels: tuple[int, int] | None = None,
) -> Away:
    """A kernel away from itself with blurred queries.

    Args:
        kernel: with a `network` that attends, of images or videos.
        parts: names of attention modules or of blocks of them, such as "mid_block".
        sigma: σ in tokens, one or several settings; left out, it is infinite.
        scale: w.
        levels: (low, high), t at which it acts, both included; None are all.

    Raises:
        TypeError: a kernel that names no network, whose states are no images, or no names.
        ValueError: a part that it does not have, or σ out of range.
    """
    several = sigma if isinstance(sigma, tuple) else (sigma,)
    return Away(kernel, Intervened(kernel, SEG(all_of(parts), sides_of(kernel), several), levels=levels), scale)


def sides_of(kernel: Any) -> tuple[int, int, int]:
    """Frames, height and width of a kernel's states.

    Raises:
        TypeError: they are no images.
    """
    family = getattr(bottom(kernel), "family", None)
    of_tokens = getattr(family, "patches", None) or getattr(family, "latent_size", None)
    shape = (1, *of_tokens) if of_tokens else tuple(kernel.state_shape)
    if len(shape) not in (3, 4):
        raise TypeError(f"states of {type(kernel).__name__} are {shape}, no images to blur along")
    return (shape[1] if len(shape) == 4 else 1, shape[-2], shape[-1])
