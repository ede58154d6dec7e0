"""Which tokens of a source prompt stand for which of a target prompt.

    replace   word by word, of prompts with as many words; a word of other tokens is shared among them in equal parts
    refine    the longest common subsequence of tokens; a token that the source has not stays alone
    either    the first where prompts have as many words, else the second

Marks before the first word go with each other, those after the last (the end, padding) by their place from there. Where
nothing of the source is left, a token of the target stays alone. Published code aligns what follows by its place from
the beginning instead, which is the same for prompts of as many tokens.

Source: Prompt-to-Prompt Image Editing with Cross-Attention Control (Hertz et al., 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["either", "replace", "refine"]


class Words(NamedTuple):
    """A prompt in tokens.

    Args:
        words: its text, split at spaces.
        ids: tokens of each word.
        start: place of the first.
    """

    words: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    start: int

    @property
    def stop(self) -> int:
        """The place after the last."""
        return self.start + sum(map(len, self.ids))

    def places(self) -> list[range]:
        """Places of each word's tokens."""
        found, at = [], self.start
        for each in self.ids:
            found.append(range(at, at + len(each)))
            at += len(each)
        return found


def words_of(tokenizer: Any, prompt: str, length: int) -> Words:
    """A prompt in tokens.

    Args:
        tokenizer: of the text encoder.
        prompt: text.
        length: how many tokens the network is told.

    Raises:
        ValueError: a prompt that is longer, or whose tokens are not those of its words.
    """
    words = tuple(prompt.split())
    ids = tuple(tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in words)
    flat, every = [i for each in ids for i in each], list(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    start = next((s for s in range(len(every) - len(flat) + 1) if every[s : s + len(flat)] == flat), None)
    if start is None:
        raise ValueError(f"tokens of {prompt!r} are not those of its words: separate its words by single spaces")
    if start + len(flat) > length:
        raise ValueError(f"{prompt!r} has {len(flat)} tokens, and the network reads {length - start}: shorten it")
    return Words(words, ids, start)


def alignment(source: Words, target: Words, length: int, how: How) -> Tensor:
    """M (length, length), what of each source token goes to each target token; columns of zeros have no source.

    Raises:
        ValueError: "replace" of prompts of different numbers of words.
    """
    m = torch.zeros(length, length, device="cpu")
    before = min(source.start, target.start)
    _diagonal(m, range(before), range(before))
    _diagonal(m, range(source.stop, length), range(target.stop, length))
    as_many = len(source.words) == len(target.words)
    if how == "refine" or (how == "either" and not as_many):
        _common(m, source, target)
        return m
    if not as_many:
        raise ValueError(
            f"{' '.join(source.words)!r} has {len(source.words)} words and {' '.join(target.words)!r} "
            f"{len(target.words)}: control='replace' exchanges words one by one, use 'refine'"
        )
    for ours, theirs in zip(source.places(), target.places(), strict=True):
        if len(ours) == len(theirs):
            _diagonal(m, ours, theirs)
        else:
            m[ours.start : ours.stop, theirs.start : theirs.stop] = 1 / len(theirs)
    return m


def _diagonal(m: Tensor, source: range, target: range) -> None:
    for i, j in zip(source, target, strict=False):
        m[i, j] = 1


def _common(m: Tensor, source: Words, target: Words) -> None:
    """The longest common subsequence of two prompts' tokens, as early in both as it can be."""
    a, b = ([i for word in each.ids for i in word] for each in (source, target))
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i][j] = best[i + 1][j + 1] + 1 if a[i] == b[j] else max(best[i + 1][j], best[i][j + 1])
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            m[source.start + i, target.start + j] = 1
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1


def emphasis(target: Words, length: int, weights: Mapping[str, float]) -> Tensor:
    """What the columns of a prompt's tokens are multiplied by (length,).

    Raises:
        ValueError: a word that the prompt does not have.
    """
    scale = torch.ones(length, device="cpu")
    for word, weight in weights.items():
        spans = [span for text, span in zip(target.words, target.places(), strict=True) if text == word]
        if not spans:
            raise ValueError(f"{word!r} is no word of {' '.join(target.words)!r}: weights are of words of the target")
        for span in spans:
            scale[span.start : span.stop] = weight
    return scale


def tokenizer_of(family: Any) -> Any:
    """The tokenizer of a pipeline's text, None where it has none."""
    names: Sequence[str] = ("tokenizer", "tokenizer_2")
    return next((found for name in names if (found := getattr(family.pipe, name, None)) is not None), None)
