"""Edits of a picture: where its chain begins, what it keeps, and how it got to noise, in one call.

    edited(mnist(num_steps=25), 'digit.png', keep='mask.png')
    edited(diffusers('DIR', num_steps=50, guidance_scale=7.5), 'photo.png', source='a cat', keep='mask.png')

    x_0 of the picture -> y_0..y_T by an inversion, under the source prompt without guidance
    x_L = y_L, L = strength T;   the kept entries stay on the path, bitwise, so that x_0 has them as the picture has;
    the others take the kernel's steps, under the prompts of the search, and branch where these have noise

Kept entries are entries of states: of pixels for kernels of pixels, of latents for pipelines, whose decoder blends over
the border.

Sources: SDEdit (Meng et al., 2022), section 3. Blended Diffusion for Text-driven Editing of Natural Images (Avrahami
et al., 2022), algorithm 2, with the inverted path in place of fresh noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.base import Cond, describe, optional
from treesearch.backends.chains.diffusion import NEGATIVE
from treesearch.backends.chains.inversion import invert, walk
from treesearch.backends.interventions.cfg import bottom
from treesearch.backends.roots.bdia import Bdia, inverted
from treesearch.backends.roots.direct import Direct, direct
from treesearch.backends.roots.masks import on_state
from treesearch.backends.roots.negative_prompt import negative_prompt, unguided
from treesearch.backends.roots.null_text import null_text
from treesearch.backends.roots.rooted import Rooted
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards import files
from treesearch.rewards.numeric import is_number


def edited(
    kernel: Any,
    image: files.File,
    *,
    keep: files.File | None = None,
    source: str | None = None,
    inversion: str = "ddim",
    control: str | None = "either",
    strength: float = 1.0,
    iterations: int = 1,
) -> Rooted:
    """A kernel whose samples are edits of a picture.

    Args:
        kernel: on a chain, that knows the state of a picture.
        image: file of a picture of the kernel's size.
        keep: file of a mask of the picture, white is kept; None keeps nothing.
        source: prompt that describes the picture; None for kernels that take none.
        inversion: 'ddim'; 'direct', with the path beside the edit; 'negative_prompt' and 'null_text', which change the
            ∅ of guidance; 'bdia', exact for chains without noise; or 'noise', fresh in place of an inverted path.
        control: attention that 'direct' takes from the path, where there is a source prompt; see `roots.direct`.
        strength: L/T, the share of the steps that are taken, in (0, 1].
        iterations: evaluations a level of the inversion; see `chains.inversion.invert`. No budget pays for them.

    Raises:
        TypeError: a kernel that draws no pictures, or one without a chain.
        ValueError: a file that is not what it should be, of another size, a mask that keeps nothing or everything, or
            settings out of range.
    """
    if inversion not in INVERSIONS:
        raise ValueError(f"inversion is {inversion!r}, expected {', '.join(INVERSIONS)}")
    if not is_number(strength, 0, 1) or not strength:
        raise ValueError(f"strength is {strength!r}, expected a share of the steps in (0, 1]")
    if isinstance(kernel, Rooted):
        raise TypeError("the kernel begins at a picture already: edit with the kernel inside")
    if source is None and inversion != "noise" and takes_prompts(kernel):
        raise ValueError("the kernel is told what it draws: say what the picture shows, source='a cat'")
    steps = int(kernel.num_steps)
    x0 = state_of(kernel, image)[None]
    level = max(round(strength * steps), 1)
    asked = Asked(x0, source, conditioning(kernel, source), control, iterations, level)
    kernel, path = INVERSIONS[inversion](kernel, asked)
    if keep is not None:
        if isinstance(kernel, Bdia):
            raise ValueError("states of bdia are pairs, in which nothing can be kept: leave keep or bdia out")
        mask = kept(keep, describe(kernel, identify=False).state_shape, _size(image))
        kernel = Clamp(kernel, mask, path if len(path) > 1 else path[0, 0])
    return Rooted(kernel, path, level=level, noised=len(path) == 1)


def reconstruction(kernel: Rooted, source: str | None = None) -> Any:
    """The sample that the chain without noise leads to under the source prompt, nothing kept; None from fresh noise.

    Its misses are those of the inversion and of the guidance, before any search; the source branch of 'direct' has
    none.
    """
    if kernel.noised:
        return None
    inner = kernel.kernel.kernel if isinstance(kernel.kernel, Clamp) else kernel.kernel
    return kernel.decode(_back(inner, kernel, conditioning(inner, source)))[0]


def _back(inner: Any, kernel: Rooted, cond: Cond) -> Tensor:
    """x_0 of the chain without noise (1, *state)."""
    if isinstance(inner, Direct):
        return kernel.path[0, :1]
    x = kernel.path[kernel.num_steps, :1]
    if not isinstance(inner, Bdia):
        return walk(inner, x, kernel.num_steps, cond=cond)
    with torch.no_grad():
        for t in range(kernel.num_steps, 0, -1):
            x = inner.transition(x, torch.full((1,), t, device=x.device), cond).mean
    return x


def state_of(kernel: Any, image: files.File) -> Tensor:
    """x_0 (*state) of the picture in a file.

    Raises:
        TypeError: a kernel that draws no pictures.
        ValueError: no picture, or one of another size.
    """
    from PIL import Image, UnidentifiedImageError

    of = optional(kernel, "state_of")
    if of is None:
        raise TypeError(f"{type(kernel).__name__} draws no pictures: it knows no state of {image}")
    if not Path(image).is_file():
        raise ValueError(f"{image}: {'a folder' if Path(image).is_dir() else 'no such file'}, expected a picture")
    try:
        with Image.open(image) as opened:
            return of(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {image}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error


def takes_prompts(kernel: Any) -> bool:
    """Whether the kernel under all wrappers is told what to draw."""
    encode = optional(bottom(kernel), "encode")
    return encode is not None and bool(encode([""]))


def conditioning(kernel: Any, prompt: str | None) -> Cond:
    """Conditioning of one prompt, a row for the one image.

    Raises:
        TypeError: a kernel that takes no prompts.
    """
    if prompt is None:
        return None
    encode = optional(kernel, "encode")
    found = encode([prompt]) if encode else None
    if not found:
        raise TypeError(f"{type(kernel).__name__} takes no prompts: leave the source prompt out")
    return {name: getattr(value, "value", value) for name, value in found.items()}


def kept(mask: files.File, shape: tuple[int, ...], pixels: tuple[int, int]) -> Tensor:
    """The kept entries of a state (*state) bool, of a mask of a picture's pixels: those whose pixels are all kept.

    Raises:
        ValueError: another size than the picture's, states without height and width, or all or nothing is kept.
    """
    found = files.mask(mask)
    if tuple(found.shape) != pixels:
        raise ValueError(f"{mask} is {_by(found.shape)} pixels and the picture {_by(pixels)}: a mask has its size")
    if found.all() or not found.any():
        raise ValueError(f"{mask} keeps {'everything' if found.all() else 'nothing'}: white is kept, black is edited")
    return ~on_state(shape, ~found)


def _size(image: files.File) -> tuple[int, int]:
    height, width = files.picture(image).shape[-2:]
    return height, width


def _by(size: Any) -> str:
    return " x ".join(map(str, size))


class Asked(NamedTuple):
    """What an inversion is told.

    Args:
        x0: of the picture, (1, *state).
        source: its prompt, or None.
        cond: of that prompt.
        control: attention that is shared, where there is a prompt.
        iterations: evaluations a level.
        level: where the chain will begin.
    """

    x0: Tensor
    source: str | None
    cond: Cond
    control: Any
    iterations: int
    level: int

    def path(self, kernel: Any) -> Tensor:
        """The picture's path by DDIM inversion without guidance."""
        return path_of(kernel, self.x0, self.cond, self.iterations)


def path_of(kernel: Any, x0: Tensor, cond: Cond, iterations: int) -> Tensor:
    """x_0..x_T of a picture by DDIM inversion under conditioning of its prompt, without guidance."""
    guides = any(name.startswith(NEGATIVE) for name in cond or {})
    return invert(kernel, x0, cond=unguided(kernel, cond) if guides else cond, iterations=iterations)


def _ddim(kernel: Any, asked: Asked) -> tuple[Any, Tensor]:
    return kernel, asked.path(kernel)


def _direct(kernel: Any, asked: Asked) -> tuple[Any, Tensor]:
    path = asked.path(kernel)
    return direct(
        kernel, path, asked.source, None if asked.source is None and asked.control == "either" else asked.control
    ), path


def _bdia(kernel: Any, asked: Asked) -> tuple[Any, Tensor]:
    pairs = Bdia(kernel, double=True)
    return pairs, inverted(pairs, asked.x0, cond=asked.cond, iterations=asked.iterations)


def _negative_prompt(kernel: Any, asked: Asked) -> tuple[Any, Tensor]:
    return negative_prompt(kernel, asked.cond), asked.path(kernel)


def _null_text(kernel: Any, asked: Asked) -> tuple[Any, Tensor]:
    path = asked.path(kernel)
    return null_text(kernel, path, cond=asked.cond, level=asked.level).kernel, path


def _noise(kernel: Any, asked: Asked) -> tuple[Any, Tensor]:
    return kernel, asked.x0[None]


INVERSIONS: dict[str, Callable[[Any, Asked], tuple[Any, Tensor]]] = {
    "ddim": _ddim,
    "direct": _direct,
    "negative_prompt": _negative_prompt,
    "null_text": _null_text,
    "bdia": _bdia,
    "noise": _noise,
}
