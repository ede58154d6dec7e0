"""Edits of a picture from files, by where its regions go.

    diffeditor(mnist(eta=0.0), 'digit.png', 'digit_mask.png', by=(0, 3))                 moves it
    diffeditor(mnist(eta=0.0), 'digit.png', 'digit_mask.png', size=1.3)                  resizes it
    diffeditor(mnist(eta=0.0), 'digit.png', points=[((8, 14), (8, 17))])                 drags points
    diffeditor(mnist(eta=0.0), 'digit.png', 'its_mask.png', reference='other.png')       pastes a region of another

The chain begins at the inverted picture (`roots.Rooted`) and has noise where the edit happens (`roots.Regional`): there
the energies of `DiffEditor` propose with exact weights; weights=False takes their own rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import describe
from treesearch.backends.guidance.diffeditor import DiffEditor
from treesearch.backends.guidance.regions import Region, dragged, moved
from treesearch.backends.roots.edited import conditioning, path_of, state_of
from treesearch.backends.roots.masks import mask_of, on_state
from treesearch.backends.roots.regional import Regional
from treesearch.backends.roots.rooted import Rooted
from treesearch.rewards import files


def diffeditor(
    kernel: Any,
    image: files.File,
    mask: files.File | None = None,
    *,
    by: tuple[float, float] = (0.0, 0.0),
    size: float = 1.0,
    points: Sequence[Any] = (),
    radius: float = 3.0,
    reference: files.File | None = None,
    where: files.File | None = None,
    source: str | None = None,
    eta: float = 0.4,
    levels: tuple[int, int] | None = None,
    iterations: int = 1,
    **settings: Any,
) -> DiffEditor:
    """A kernel whose chain begins at a picture and whose steps move regions of it.

    Args:
        kernel: at eta=0, on a chain of states (C, H, W), that knows the state of a picture.
        image: file of the picture.
        mask: file of the region, white, in the picture or in the reference; not with points.
        by: how far it goes, in entries of a state, down and to the right.
        size: how many times as large it becomes.
        points: pairs of a handle and its target, (row, column) in entries of a state.
        radius: of the discs around handles that are dragged, likewise.
        reference: file of the picture that the region is in, where it is pasted.
        where: file of a mask, white where there is noise; None is where regions come from and go.
        source: prompt of the pictures, for a kernel that takes prompts.
        eta, levels: of the noise, see `roots.Regional`.
        iterations: of the inversion, see `chains.inversion.invert`; T times as many evaluations, which no budget pays
            for.
        settings: of `DiffEditor`.

    Raises:
        TypeError: a kernel that knows no state of a picture, or one that `DiffEditor` refuses.
        ValueError: files that are not what they should be, a mask and points or neither, or a setting out of range.
    """
    shape = describe(kernel, identify=False).state_shape
    regions = _regions(kernel, shape, mask, by, size, points, radius)
    path = _path(kernel, image, source, iterations)
    pasted = None if reference is None else _path(kernel, reference, source, iterations)
    taken = [region.target if pasted is not None else region.target | region.mask for region in regions]
    inside = on_state(shape, torch.stack(taken).any(0)) if where is None else mask_of(kernel, where)
    rooted = Rooted(Regional(kernel, inside, eta=eta, levels=levels), path)
    told = None if source is None else (source,)
    return DiffEditor(rooted, path, regions, reference=pasted, source=told, **settings)


def _regions(
    kernel: Any,
    shape: tuple[int, ...],
    mask: files.File | None,
    by: tuple[float, float],
    size: float,
    points: Sequence[Any],
    radius: float,
) -> tuple[Region, ...]:
    if (mask is None) == (not points):
        raise ValueError("expected a mask that goes somewhere, or points=[((row, column), (row, column)), ...]")
    if mask is None:
        return dragged(shape[-2:], points, radius)
    return moved(mask_of(kernel, mask).any(0), by, size)


def _path(kernel: Any, image: files.File, source: str | None, iterations: int) -> Tensor:
    """x_0..x_T (T + 1, 1, *state) of a picture."""
    return path_of(kernel, state_of(kernel, image)[None], conditioning(kernel, source), iterations)
