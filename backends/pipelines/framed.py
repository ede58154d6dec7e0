"""Pictures of a modular pipeline by its blocks: states of pictures, masks among packed states, and drawing.

The blocks size, encode, normalise and pack as they do in their own pipeline; nothing of it is written here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base.pictures import pixels_of
from treesearch.backends.pipelines import masks
from treesearch.backends.pipelines.blocks import Program, copied
from treesearch.backends.pipelines.inputs import ANY, Inputs
from treesearch.backends.pipelines.rows import as_blocks_take_them

_OUTPUTS = ("images", "videos")
_LANCZOS = 1  # of PIL, by which blocks resize pictures


def encoded(inputs: Inputs, program: Program, cond: dict[str, Any], image: Any, pixels: tuple[int, int]) -> Tensor:
    """x_0 (*state) of a picture at which a chain begins.

    Args:
        inputs: of the pipeline.
        program: its blocks for a picture.
        cond: conditioning of one row.
        image: of the size `pixels`.
        pixels: height and width.

    Raises:
        ValueError: a picture of another size.
    """
    given = {"image": pixels_of(image, 3, pixels)[None], "strength": 1.0, "num_inference_steps": ANY}
    seen = program.see(inputs.state(given, {})).get("image_latents")
    values = inputs.shared | as_blocks_take_them(cond, 1) | given | {"image_latents": seen}
    return program.prepare(inputs.state(values, inputs.rows)).get("image_latents")[0].float()


def drawn_under(mask: Any, ready: Any, program: Program, shape: tuple[int, ...], pixels: tuple[int, int]) -> Tensor:
    """Entries of a state (1, *state) that the chain draws under a mask, by where its entries are in latents.

    Args:
        mask: white where the picture is drawn anew.
        ready: the state of the blocks before their loop, of one row.
        program: the blocks.
        shape: of a state.
        pixels: height and width of the picture.

    Raises:
        ValueError: a mask of another size, or latents that are mixed when they are packed.
    """
    count, device = math.prod(shape), ready.get("latents").device
    index = torch.arange(count, dtype=torch.float64, device=device).reshape(1, *shape)
    places = program.unpack(copied(ready, latents=index)).get("latents")
    if places.numel() != count or not torch.equal(places.flatten().sort().values, index.flatten()):
        raise ValueError("its latents are mixed when they are packed, and a mask has no place there")
    small = torch.nn.functional.interpolate(masks.white(mask, pixels), size=places.shape[-2:])
    found = torch.empty(count, device=device)
    found[places.flatten().long()] = small.to(device).expand(places.shape[:-2].numel(), 1, -1, -1).flatten()
    return found.reshape(1, *shape)


def resized(mask: Any, pixels: tuple[int, int]) -> Any:
    """A mask of the size of a picture that the blocks resized."""
    return mask if isinstance(mask, Tensor) else mask.convert("L").resize(pixels[::-1], _LANCZOS)


def drawn(x0: Tensor, ready: Any, program: Program, vae: Any, shape: tuple[int, ...]) -> Tensor:
    """Pictures in [0, 1], float32, from states (n, *state).

    Args:
        x0: the states.
        ready: the state of the blocks before their loop, of n rows.
        program: the blocks.
        vae: the decoder among their components.
        shape: of one state as the decoder takes it.
    """
    state = copied(ready, latents=x0.to(vae.dtype))
    if x0.is_meta:  # some unpack by the values of positions, which are not there
        state = copied(state, latents=state.get("latents").new_empty(len(x0), *shape))
    else:
        state = program.unpack(state)
    done = program.decode(state)
    return next(done.get(name) for name in _OUTPUTS if done.get(name) is not None).float()
