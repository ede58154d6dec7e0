"""Prompt-to-Prompt: an edited picture attends where its source does, so that what is edited keeps its place.

    A  = softmax(Q K^T / √d)                              maps of the row, A_s those of its pivot
    A' = (A_s M + A diag(1 - 1^T M > 0)) diag(c)          of cross-attention, M and c by `alignment`: a share of steps
    A' = A_s                                              of self-attention on few tokens: a smaller share
    out = A' V                                            V the row's own

in the rows of the prompt; those of ∅ stay. c multiplies the maps of words that shall count more or less; what is left
does not add up to 1, as published. Maps are made in full where they are exchanged, by the attention of the module
itself: attend(Q, K, 1) = A, its mask and scale included.

Of networks with cross-attention. Where text and image attend jointly (SD3, FLUX), keys of the text depend on the image
and one softmax is over both: there are no such maps, and those networks are refused; `Mutual` is for them.

Source: Prompt-to-Prompt Image Editing with Cross-Attention Control (Hertz et al., 2023), section 3.2 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, final, get_args

import torch
from torch import Tensor

from treesearch.backends.base.taps import Attend, Tap, tapped
from treesearch.backends.interventions.alignment import How, alignment, emphasis, tokenizer_of, words_of
from treesearch.backends.interventions.base import network_of
from treesearch.backends.interventions.cfg import bottom
from treesearch.backends.interventions.heads import Network, attentions
from treesearch.backends.interventions.paired import Control, Pairs, put, steps_of
from treesearch.rewards.numeric import is_number, is_whole

TAKEN, KEPT = "p2p_taken", "p2p_kept"  # of conditioning: M diag(c) (n, L, L), and what of a row's own maps stays (n, L)
EMBEDS = "prompt_embeds"  # (n, L, E)


@final
@dataclass(frozen=True)
class PromptToPrompt(Control):
    """Maps of pivots.

    Args:
        how: "replace" of words one by one, "refine" of prompts that say more; "either" replaces where a pair of prompts
            has as many words, and refines where not.
        cross: the share of steps, from the noise on, in which maps of words are the source's.
        own: the share in which those of self-attention are.
        tokens: self-attention over more tokens stays the row's own.
        weights: c by words of the target; 1 for all others.

    Raises:
        ValueError: another way, a share out of range, or weights that are no numbers.
    """

    how: How = "either"
    _: KW_ONLY
    cross: float = 0.8
    own: float = 0.5
    tokens: int = 16**2
    weights: Mapping[str, float] = field(default_factory=dict)

    needs_source = True

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise ValueError(f"how is {self.how!r}, expected one of {get_args(How)}")
        if not is_number(self.cross, 0, 1) or not is_number(self.own, 0, 1):
            raise ValueError(f"cross is {self.cross!r} and own {self.own!r}, expected shares of steps in [0, 1]")
        if not is_whole(self.tokens, 0):
            raise ValueError(f"tokens is {self.tokens!r}, expected a whole number >= 0")
        if not all(isinstance(word, str) and is_number(c, -1e6, 1e6) for word, c in self.weights.items()):
            raise ValueError(f"weights are {self.weights!r}, expected numbers by words, such as {{'snowy': 2.0}}")

    def acts(self, step: Tensor, num_steps: int) -> Tensor:
        return step < steps_of(max(self.cross, self.own), num_steps)

    def check(self, kernel: Any) -> None:
        network, name = network_of(kernel), type(bottom(kernel)).__name__
        if not attentions(network, ("cross",)):
            why = "has no cross-attention"
            if attentions(network, ("joint",)):
                why = "lets text and image attend jointly, where words have no maps of their own"
            raise ValueError(f"the network of {name} {why}: Prompt-to-Prompt needs cross-attention, use control='kv'")
        family = getattr(bottom(kernel), "family", None)
        if family is None or tokenizer_of(family) is None:
            raise TypeError(f"{name} has no tokenizer: words of two prompts cannot be aligned")

    def rows(
        self, kernel: Any, encoded: dict[str, Any], sources: Sequence[str], prompts: Sequence[str]
    ) -> dict[str, Any]:
        tokenizer, embeds = tokenizer_of(bottom(kernel).family), encoded[EMBEDS]
        length, taken, kept = embeds.shape[1], [], []
        for pair in zip(sources, prompts, strict=True):
            source, target = (words_of(tokenizer, prompt, length) for prompt in pair)
            m, c = alignment(source, target, length, self.how), emphasis(target, length, self.weights)
            taken.append(m * c)
            kept.append((m.sum(0) == 0) * c)
        return {TAKEN: torch.stack(taken).to(embeds.device), KEPT: torch.stack(kept).to(embeds.device)}

    @contextmanager
    def on(self, network: Network, pairs: Pairs) -> Iterator[None]:
        taps: dict[str, Tap] = {}
        for kind, share, tap in (("cross", self.cross, self._cross), ("self", self.own, self._self)):
            acts = pairs.step < steps_of(share, pairs.num_steps)
            if acts.any():
                taps |= {name: partial(tap, pairs, acts) for name in attentions(network, (kind,))}
        with tapped(network, taps):
            yield

    def _cross(self, pairs: Pairs, acts: Tensor, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at, cond = pairs.places(q, acts, prompted=True), pairs.cond or {}
        if not len(at.rows):
            return attend(q, k, v)
        maps = maps_of(attend, q, k)
        taken, kept = (cond[name].to(maps)[at.which] for name in (TAKEN, KEPT))
        edited = maps[at.pivots] @ taken[:, None] + maps[at.rows] * kept[:, None, None]
        return put(attend(q, k, v), at.rows, edited @ v[at.rows])

    def _self(self, pairs: Pairs, acts: Tensor, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = pairs.places(q, acts, prompted=True)
        if not len(at.rows) or q.shape[2] > self.tokens:
            return attend(q, k, v)
        return put(attend(q, k, v), at.rows, maps_of(attend, q, k)[at.pivots] @ v[at.rows])


def maps_of(attend: Attend, q: Tensor, k: Tensor) -> Tensor:
    """A (B, heads, queries, keys)."""
    one = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
    return attend(q, k, one.expand(*k.shape[:2], *one.shape))
