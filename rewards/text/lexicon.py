"""Sentiment by a lexicon, which nobody here trained and no network reads.

Source: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text (Hutto and Gilbert, 2014).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.text.texts import TEXTS, by_text


@facts(
    range="-1 to 1, or 0 to 1 of a share",
    differentiable=False,
    checkpoint="the lexicon of vaderSentiment",
    licence="MIT",
    limits=f"{TEXTS}; English",
    source="Hutto and Gilbert 2014, VADER",
)
def lexicon(of: Literal["compound", "positive", "negative", "neutral"] = "compound") -> Reward:
    """r = VADER's compound score of a text, or the share of one tone in it.

    Args:
        of: which of VADER's scores.

    Raises:
        ValueError: another score.
        ImportError: vaderSentiment is not installed.
    """
    names = {"compound": "compound", "positive": "pos", "negative": "neg", "neutral": "neu"}
    if of not in names:
        raise ValueError(f"of is {of!r}, expected one of {', '.join(names)}")
    _analyser()
    return by_text(lambda text: float(_analyser().polarity_scores(text)[names[of]]), f"lexicon({of})")


@functools.cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("lexicon needs vaderSentiment: pip install 'treesearch[text]'") from error
    return SentimentIntensityAnalyzer()
