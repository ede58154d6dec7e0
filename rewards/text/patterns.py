"""Black-box rewards of a text's form: its length, a pattern in it.

    text_length(x) = words of x, or minus their distance to a target          matches(x) = 1 where the pattern is found

They have no gradient and need no network.
"""

from __future__ import annotations

import re
from typing import Literal

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.numeric import is_number
from treesearch.rewards.text.texts import TEXTS, by_text


@facts(range="0 to the length of a text, or minus the distance to a target", differentiable=False, limits=TEXTS)
def text_length(target: float | None = None, *, unit: Literal["words", "characters"] = "words") -> Reward:
    """r = words (or characters) of a text, or minus their distance to `target`.

    Args:
        target: how many there should be; None counts.
        unit: words are what white space parts.

    Raises:
        ValueError: a negative target, or another unit.
    """
    if unit not in ("words", "characters"):
        raise ValueError(f"unit is {unit!r}, expected 'words' or 'characters'")
    if target is not None and not is_number(target, 0):
        raise ValueError(f"target is {target!r}, expected a number of {unit}, 0 or more")

    def score(text: str) -> float:
        count = float(len(text.split()) if unit == "words" else len(text))
        return count if target is None else -abs(count - target)

    return by_text(score, f"text_length({unit})" if target is None else f"text_length({target:g} {unit})")


@facts(range="0 or 1", differentiable=False, limits=TEXTS)
def matches(pattern: str, *, whole: bool = False, ignore_case: bool = False) -> Reward:
    """r = 1 where a regular expression is found in a text, else 0; `reward.gate(matches(...), 1)` demands it.

    Args:
        pattern: as Python's `re` reads it.
        whole: the text must be nothing else.
        ignore_case: whether letters of both cases are the same.

    Raises:
        ValueError: no regular expression.
    """
    try:
        found = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    search = found.fullmatch if whole else found.search
    return by_text(lambda text: float(search(text) is not None), f"matches({pattern!r})")
