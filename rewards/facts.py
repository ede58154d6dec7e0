"""What to know of a reward before choosing it, and what its factory tells of the settings that made it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from treesearch.rewards.base import Reward, as_text, built_from
from treesearch.rewards.redact import marked_url, redacted


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What to know before choosing a reward; `treesearch list rewards` prints it.

    Args:
        range: values to expect.
        differentiable: whether gradients reach the samples.
        prompts: whether it needs them; None where it takes them and does without.
        checkpoint: default weights, a hub id or a file.
        licence: of those weights.
        memory: of the model, in float32.
        limits: what it takes, and what of it goes unread.
        source: the paper.
    """

    range: str
    differentiable: bool
    prompts: bool | None = False
    checkpoint: str = ""
    licence: str = ""
    memory: str = ""
    limits: str = ""
    source: str = ""


HOW = {"device", "batch_size", "allow_pickle", "concurrency", "timeout", "retries", "backoff", "max_pause"}
HOW |= {"token_env", "token_header", "max_bytes"}
"""Settings of factories that say how to score, not what."""
Factory = TypeVar("Factory", bound=Callable[..., Reward])


def facts(**known: Any) -> Callable[[Factory], Factory]:
    """Attach `Facts` to a factory of rewards, as its attribute `facts`; its rewards keep what they were made with."""

    def attach(factory: Factory) -> Factory:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def made(*args: Any, **kwargs: Any) -> Reward:
            reward = factory(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments.items()
            chosen = [_told(k, v) for k, v in given if k not in HOW and not _usual(v, signature.parameters[k].default)]
            chosen.sort(key=lambda told: not told.startswith("url="))  # it may have come by the name of a variable
            source = built_from(f"{factory.__module__}.{factory.__qualname__}", *_what(signature, args, kwargs))
            settings = (redacted(f"{factory.__name__}({', '.join(chosen)})"),)
            prompted = known.get("prompts", False) is not False
            return replace(reward, settings=settings, source=source, prompted=prompted)

        made.facts = Facts(**known)  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]

    return attach


def _what(signature: inspect.Signature, args: Any, kwargs: Any) -> list[Any]:
    """Settings of a factory that say what to score, in order and with its defaults."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return [value for name, value in bound.arguments.items() if name not in HOW]


def _usual(value: Any, default: Any) -> bool:
    """Whether a setting is its default: tensors and other objects never are, unless they are the same object."""
    return value is default or (as_text(value) is not None and as_text(value) == as_text(default))


def _told(name: str, value: Any) -> str:
    """A setting in words that are the same in another process; a URL without what may be secret in it."""
    if name == "url_env":
        name, value = "url", os.environ.get(value, "")
    if name == "url":
        value = marked_url(str(value))
    return f"{name}={getattr(value, '__qualname__', None) or repr(value)}"
