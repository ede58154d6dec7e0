"""Negative-prompt inversion: ∅ := C, the prompt of the picture, so that under that prompt guidance does nothing.

    ε(C) + w (ε(C) - ε(C)) = ε(C)      back to the picture, it misses what DDIM inversion misses at w = 1
    ε(C) + w (ε(C') - ε(C))            of an edit under C'

Nothing is optimised and no evaluation is added. `unguided` is the same identity for an inversion: conditioning under
which any scale w is w = 1, at the cost of the two rows that guidance takes.

Source: Negative-prompt Inversion: Fast Image Inversion for Editing with Text-guided Diffusion Models (Miyake et al.,
2023), section 3.
"""

from __future__ import annotations

from typing import Any

from treesearch.backends.base import Cond
from treesearch.backends.chains.diffusion import NEGATIVE
from treesearch.backends.roots.absent import Absent, guided


def negative_prompt(kernel: Any, cond: Cond) -> Absent:
    """A kernel whose ∅ is the prompt of its picture.

    Args:
        kernel: under classifier-free guidance.
        cond: conditioning of the pictures' prompts, a row for each, as `invert` takes it.

    Raises:
        ValueError: conditioning without an ∅.
    """
    return Absent(kernel, {name: (cond or {})[name][None] for name in guided(kernel, cond)})


def unguided(kernel: Any, cond: Cond) -> dict[str, Any]:
    """Conditioning of the same prompts under which guidance does nothing.

    Raises:
        ValueError: conditioning without an ∅.
    """
    given = dict(cond or {})
    return given | {NEGATIVE + name: given[name] for name in guided(kernel, cond)}
