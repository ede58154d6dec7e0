"""Plain callables as the functions of rewards: what they take, and what they are written as."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Plain:
    """A plain callable as a reward's function; of one callable they are equal, and so are the rewards."""

    function: Callable[..., Any]
    takes_prompts: bool

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Any:
        return self.function(samples, prompts=prompts) if self.takes_prompts else self.function(samples)


def takes_prompts(function: Callable[..., Any]) -> bool:
    function = getattr(function, "forward", function) if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "prompts" or p.kind is p.VAR_KEYWORD for p in parameters)


def code_of(function: Any) -> str | None:
    """Hash of the source of a function and of what a partial one fixes; None where there is none."""
    if isinstance(function, functools.partial):
        inner, fixed = code_of(function.func), repr((function.args, sorted(function.keywords.items())))
        return None if inner is None else hashlib.blake2b(f"{inner}{fixed}".encode(), digest_size=8).hexdigest()
    if not hasattr(function, "__code__"):
        function = type(function).forward if isinstance(function, torch.nn.Module) else type(function).__call__
    try:
        return hashlib.blake2b(inspect.getsource(function).encode(), digest_size=8).hexdigest()
    except (OSError, TypeError):
        return None
