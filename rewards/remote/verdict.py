"""The mark in a judge's answer: what it says as its verdict, not a number that it mentions.

A verdict is a line of its own ("Score: 8", "**Rating: 8/10**", "I give it 8 out of 10."), a JSON object with one score,
or a bare number on the last line; the last one counts. What is thought aloud, quoted, supposed or out of another scale
is none: guessing would be silent, and asking again costs one request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_LONGEST = 20_000  # characters from the end that are looked at
_SECTION = "think|thinking|thought|thoughts|reasoning|analysis|scratchpad|reflection"
_THOUGHT = re.compile(rf"<({_SECTION})\b[^>]*>.*?(</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"</({_SECTION})\s*>", re.IGNORECASE)
_LEAD = r"[\s*_`#(\[]*(?:[-\u2013\u2022]\s+)?[\s*_`]*"
_NUMBER = r"(?P<number>[-+]?\d+(?:\.\d+)?)(?:\s*(?:/|out of|of)\s*(?P<of>\d+(?:\.\d+)?))?"
_TAIL = r"(?:\s*(?:points?|stars?))?\s*(?:\([^()]*\))?[\s.*_`!)\]\"']*"
_SCALE = r"(?:on a )?scale (?:of |from )?\d+\s*(?:-|to)\s*\d+"
_LABEL = (
    rf"(?:(?:so|thus|therefore|my|the|final|overall|total|image)[\s,]+)*(?:score|rating|mark|grade|verdict|answer|{_SCALE})"
    r"[\s*_`]*(?:is\b|:|=|\u2013|-(?=\s))?[\s*_`:]*"
)
_SAYS = r"(?:(?:so|thus|therefore|overall)[\s,]+)*i (?:give|rate|score|grade|mark)(?: [a-z]+){0,4} "
_LABELLED = re.compile(_LEAD + _LABEL + _NUMBER + _TAIL, re.IGNORECASE)
_SAID = re.compile(_LEAD + _SAYS + _NUMBER + _TAIL, re.IGNORECASE)
_BARE = re.compile(r"[\"']?" + _LEAD + r"[\"']?" + _NUMBER + _TAIL, re.IGNORECASE)
_MENTIONED = re.compile(_LEAD + _LABEL + r".*\d", re.IGNORECASE)
_BEFORE_JSON = re.compile(rf"({_LEAD}|.*\b(?:score|rating|verdict|answer|result|json)[\s*_`:]*)", re.IGNORECASE)


def read_number(answer: str, high: float | None = None) -> float | None:
    """The mark in an answer, None where it has no clear one.

    Args:
        answer: what the judge wrote.
        high: the end of the scale, so that "4/5" is no 4 on a scale to 10; None takes any.
    """
    text = _THOUGHT_ENDS.split(_THOUGHT.sub("", answer))[-1][-_LONGEST:]
    objects = list(_objects(text))
    found = [
        (start, mark) for start, _, value in objects if (mark := _of_object(value, high, text, start)) is not _NONE
    ]
    for start, end, value in objects:
        if _scores(value):
            text = text[:start] + "\x00" * (end - start) + text[end:]  # its lines are no others
    lines = [(m.start(), m[0]) for m in re.finditer(r"[^\n]+", text) if m[0].strip()]
    found += [(start, mark) for start, line in lines if (mark := _of_line(line, high)) is not _NONE]
    if lines and (bare := _BARE.fullmatch(lines[-1][1])):
        found.append((lines[-1][0], _on_scale(bare, high)))
    return max(found, key=lambda f: f[0])[1] if found else None


_NONE: Any = object()
"""No verdict at all, unlike None: a verdict that is not clear."""


def _of_line(line: str, high: float | None) -> float | None:
    if said := _LABELLED.fullmatch(line) or _SAID.fullmatch(line):
        return _on_scale(said, high)
    return None if _MENTIONED.match(line) else _NONE


def _on_scale(found: re.Match[str], high: float | None) -> float | None:
    of = found["of"]
    return None if of is not None and high is not None and float(of) != high else float(found["number"])


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, value) of the JSON objects in a text, the outermost."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield at, end, value
        at = text.find("{", end)


def _of_object(value: dict[str, Any], high: float | None, text: str, start: int) -> float | None:
    """The score of an object that stands at the beginning of a line or after a label."""
    scores = _scores(value)
    if not scores or not _BEFORE_JSON.fullmatch(text[text.rfind("\n", 0, start) + 1 : start]):
        return _NONE
    (score,) = scores if len(scores) == 1 else (None,)
    if isinstance(score, str) and (found := _BARE.fullmatch(score)):
        return _on_scale(found, high)
    return float(score) if isinstance(score, (int, float)) and not isinstance(score, bool) else None


def _scores(value: Any) -> list[Any]:
    """What stands under "score": at the top, or else below."""
    if isinstance(value, dict):
        own = [v for k, v in value.items() if k.lower() == "score"]
        return own or [score for v in value.values() for score in _scores(v)]
    return [score for v in value for score in _scores(v)] if isinstance(value, list) else []
