"""Prompts on their way through a kernel: a reward or a value inside it gets those of its rows.

A kernel makes conditioning of prompts in `encode`, once a search; here they travel beside it as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treesearch.backends.base import Cond, Shared, optional

PROMPTS = "guide_prompts"


def encoded(kernel: Any, prompts: Sequence[Any]) -> dict[str, Any]:
    """What a kernel makes of the prompts, and the prompts themselves."""
    encode = optional(kernel, "encode")
    return ((encode(prompts) if encode else None) or {}) | {PROMPTS: Shared(list(prompts))}


def unpack(cond: Cond) -> tuple[Cond, list[Any] | None]:
    """Conditioning of the kernel, and the prompts of the rows, None where there are none."""
    if cond is None or PROMPTS not in cond:
        return cond, None
    inner = {k: v for k, v in cond.items() if k != PROMPTS}
    return inner, [cond[PROMPTS][i] for i in cond["task"].tolist()]
