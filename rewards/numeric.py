"""Whether a setting is a number: comparing text with one is Python's own error, which names no setting."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> TypeGuard[float]:
    """Whether a value is an int or a float of low..high: no truth value, no text, no NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and 0 < value < math.inf


def is_whole(value: Any, low: float = 1, high: float = math.inf) -> bool:
    """Whether a value is an int of low..high."""
    return isinstance(value, int) and is_number(value, low, high)
