"""Mutual self-attention: an edited picture asks with its own queries for what the source has there.

    replace   softmax(Q K_s^T / √d) V_s                  K_s, V_s of the pivot, in the same module and call
    concat    softmax(Q [K; K_s]^T / √d) [V; V_s]        its own beside them

of self-attention, in the rows of ∅ as in those of the prompt. Where a text attends jointly (SD3, FLUX), its keys and
values stay those of the row's own prompt, and those of the image are the pivot's. Cross-attention is not touched.

Published: after the fourth of 50 steps, in the decoder of the U-Net from its second block that attends
(parts="up_blocks" is one block more). Editing by drag and paste reads such a bank of keys and values as well.

Sources: MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing (Cao et al.,
2023), section 3.2. DiffEditor: Boosting Accuracy and Flexibility on Diffusion-based Image Editing (Mou et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor

from treesearch.backends.base.taps import Attend, tapped
from treesearch.backends.interventions.base import network_of
from treesearch.backends.interventions.heads import Network, attentions, chosen, image_tokens
from treesearch.backends.interventions.paired import Control, Pairs, put, steps_of
from treesearch.backends.interventions.softpag import all_of
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class Mutual(Control):
    """Keys and values of pivots.

    Args:
        mode: "replace" or "concat".
        parts: names of attention modules, or of blocks of them; None are all.
        after: the share of the chain that is walked before it begins, in [0, 1).
        until: the share after which it ends, in (0, 1].

    Raises:
        TypeError: no names.
        ValueError: another mode, or shares out of range.
    """

    mode: Literal["replace", "concat"] = "replace"
    _: KW_ONLY
    parts: str | tuple[str, ...] | None = None
    after: float = 0.08
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in ("replace", "concat"):
            raise ValueError(f"mode is {self.mode!r}, expected 'replace' or 'concat'")
        if not is_number(self.after, 0, 1) or not is_number(self.until, 0, 1) or self.after >= self.until:
            raise ValueError(f"after is {self.after!r} and until {self.until!r}, expected 0 <= after < until <= 1")
        if self.parts is not None:
            all_of(self.parts)

    def acts(self, step: Tensor, num_steps: int) -> Tensor:
        return (step >= steps_of(self.after, num_steps)) & (step < steps_of(self.until, num_steps))

    def check(self, kernel: Any) -> None:
        if not self._names(network_of(kernel)):
            raise ValueError(f"the network of {type(kernel).__name__} has no self-attention: there is nothing to share")

    @contextmanager
    def on(self, network: Network, pairs: Pairs) -> Iterator[None]:
        acts = self.acts(pairs.step, pairs.num_steps)
        with image_tokens(network) as image:
            taps = {name: partial(self._tap, pairs, acts, partial(image, name)) for name in self._names(network)}
            with tapped(network, taps):
                yield

    def _names(self, network: Network) -> list[str]:
        return list(attentions(network) if self.parts is None else chosen(network, all_of(self.parts)))

    def _tap(
        self, pairs: Pairs, acts: Tensor, image: Callable[[int], slice], attend: Attend, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        at, out, tokens = pairs.places(q, acts), attend(q, k, v), image(q.shape[2])
        if not len(at.rows):
            return out
        source = [put(each[:, :, tokens], at.rows, each[at.pivots][:, :, tokens]) for each in (k, v)]
        if self.mode == "concat":
            theirs = [torch.cat([own, new], 2) for own, new in zip((k, v), source, strict=True)]
        else:
            theirs = [_among(own, tokens, new) for own, new in zip((k, v), source, strict=True)]
        return put(out, at.rows, attend(q, *theirs)[at.rows])


def _among(every: Tensor, tokens: slice, new: Tensor) -> Tensor:
    """Keys or values of a module with those of the image replaced."""
    return torch.cat([every[:, :, : tokens.start], new, every[:, :, tokens.stop :]], 2)
