"""Which masked positions a step reveals: each by its own chance, or the first k of an order that x_t decides.

    random       each with probability (α_s - α_t) / (1 - α_t), the law of masked diffusion
    confidence   the k positions whose most probable token has most probability
    left         the k positions furthest to the left

    k = ⌈masked positions / steps left⌉, so that with as many steps as masks one is revealed at a time

The last two are laws of their own; one position at a time is exact for a network whose conditionals are those of one
joint law, in whatever order.

Source of `confidence`: Unveiling the Potential of Diffusion Large Language Model in Controllable Generation (Xiong et
al., 2025), section 4, as LLaDA's low-confidence remasking without the draw.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from treesearch.backends.base.tokens import log_norm, parts_of

Order = Literal["random", "confidence", "left"]
ORDERS: tuple[Order, ...] = ("random", "confidence", "left")
DEPARTS = {
    "confidence": "the positions of highest confidence are revealed first: a law of its own, not masked diffusion's",
    "left": "positions are revealed from left to right: a law of its own, not masked diffusion's",
}


def first(order: Order, logits: Tensor, row: Tensor, column: Tensor, t: Tensor) -> Tensor:
    """Which of m masked positions are the first k of their row, (m,) bool.

    Args:
        order: "confidence" or "left".
        logits: of the positions (m, V).
        row, column: where they are (m,), in order of both.
        t: steps left, of all n rows.
    """
    masks = torch.bincount(row, minlength=len(t))
    k = -(-masks // t)
    score = -column.double() if order == "left" else logits.amax(-1).double() - log_norm(logits)
    by_score = score.argsort(descending=True, stable=True)
    ranked = by_score[row[by_score].argsort(stable=True)]  # by row, the best first
    rank = torch.empty_like(row)
    rank[ranked] = torch.arange(len(row), device=row.device) - (masks.cumsum(0) - masks)[row[ranked]]
    return rank < k[row]


def nucleus(logits: Tensor, top_p: float, temperature: float) -> Tensor:
    """Logits with -inf outside of the fewest tokens of each position that have probability `top_p` together."""
    kept = torch.full_like(logits, -torch.inf)
    for part in parts_of(logits):
        probs, tokens = (logits[part].double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        inside = probs.cumsum(-1) - probs < top_p  # the one that crosses it is in
        mine = torch.full_like(logits[part], -torch.inf)
        rows = inside.nonzero()[:, 0]
        mine[rows, tokens[inside]] = logits[part][rows, tokens[inside]]
        kept[part] = mine
    return kept
