"""A trigram model of tokens, as a reward of fluency and, on other sentences, its judge.

    p(w | u, v) = max(c(u, v, w) - D, 0) / c(u, v) + D n(u, v) / c(u, v) p(w | v),   and so on down to 1/V

with continuation counts below the top: interpolated Kneser-Ney. Perplexity is that of a text and of its end. It
stands in for GPT-2, which needs a hub; it knows film reviews and nothing else.

Source: An Empirical Study of Smoothing Techniques for Language Modeling (Chen and Goodman, 1999), eq. 28.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.text.texts import checked

ORDER = 3
BEGIN, END = -1, -2


class Trigrams:
    """Probabilities of tokens after two others.

    Args:
        rows: sentences as tokens.
        vocabulary: V, tokens that there are.
        discount: D.
    """

    def __init__(self, rows: Iterable[Sequence[int]], vocabulary: int, discount: float = 0.75) -> None:
        self.vocabulary, self.discount = vocabulary + 1, discount  # the end is one more
        seen: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(ORDER + 1)]
        for row in rows:
            padded = [BEGIN] * (ORDER - 1) + [*row, END]
            seen[ORDER].update(tuple(padded[i : i + ORDER]) for i in range(len(row) + 1))
        for n in range(ORDER - 1, 0, -1):
            seen[n].update(gram[1:] for gram in seen[n + 1])  # of how many different tokens before it
        self._seen, self._after = seen, [_after(counts) for counts in seen]

    def log_prob(self, row: Sequence[int]) -> float:
        """log p of tokens and their end, in nats."""
        padded = [BEGIN] * (ORDER - 1) + [*row, END]
        return sum(math.log(self._p(tuple(padded[i : i + ORDER]))) for i in range(len(row) + 1))

    def _p(self, gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / self.vocabulary
        total, kinds = self._after[len(gram)].get(gram[:-1], (0, 0))
        if not total:
            return self._p(gram[1:])
        own = max(self._seen[len(gram)][gram] - self.discount, 0.0)
        return (own + self.discount * kinds * self._p(gram[1:])) / total


def _after(counts: Counter[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Of each context how often something came after it, and how many different things."""
    found: defaultdict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])
    for gram, count in counts.items():
        found[gram[:-1]][0] += count
        found[gram[:-1]][1] += 1
    return {context: (total, kinds) for context, (total, kinds) in found.items()}


def fluency(model: Trigrams, tokenizer: Any, name: str = "fluency") -> Reward:
    """r = 1/n log p(x), in nats a token, -log perplexity."""

    def fn(samples: Any, _: Any) -> Tensor:
        rows = [tokenizer(text)["input_ids"] for text in checked(samples)]
        found = [model.log_prob(row) / (len(row) + 1) for row in rows]
        return torch.tensor(found, dtype=torch.float64)

    return Reward(fn, name)
