"""Prompts that are told what a user encoded, long or weighted, in place of their text.

A family encodes prompts by its pipeline's `encode_prompt`. Prompts with encodings of their own are encoded apart, by
the same code; joined, an ∅ that differs has a row a prompt, and one that does not is shared.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from treesearch.backends.pipelines.family import Family
from treesearch.backends.pipelines.proof import FEW
from treesearch.backends.pipelines.rows import join
from treesearch.backends.pipelines.settings import Settings

_AT_ONCE = 16  # prompts encoded at a time


class Told:
    """What each prompt of a kernel is told.

    Args:
        settings: the user's choices.
    """

    def __init__(self, settings: Settings) -> None:
        self.embeds: Mapping[str, Mapping[str, Tensor]] = settings.prompt_embeds or {}

    def refuse(self, family: Family) -> None:
        """Refuse encodings for which the pipeline has no place.

        Raises:
            ValueError: it has none.
        """
        if not self.embeds:
            return
        if not family.tells:
            raise ValueError(f"{family.name} takes no prompt_embeds: give it prompts as text")
        taken = [name for name in inspect.signature(family.pipe.encode_prompt).parameters if name.endswith(_ENCODED)]
        for prompt, given in self.embeds.items():
            for name in given:
                if name not in taken:
                    raise ValueError(f"prompt_embeds of {prompt[:40]!r} has {name!r}, which {family.name} does not "
                                     f"take: choose {', '.join(taken)}")  # fmt: skip

    def encode(self, family: Family, prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning of prompts, see `Family.encode`.

        Raises:
            ValueError: encodings of unlike lengths, for a network that does not see where text ends, or of another
                width than those of text.
        """
        self._warn_of_others(prompts)
        parts = [self._encode(family, group) for group in self._groups(prompts)]
        if self.embeds and family.plain:
            for name in parts[0]:
                if len({tuple(getattr(part[name], "value", part[name]).shape[1:]) for part in parts}) > 1:
                    raise ValueError(f"{name} of the prompts differ in length: give all of them prompt_embeds of one "
                                     f"length, {family.name} does not see where text ends")  # fmt: skip
        return join(parts, apart=bool(self.embeds))

    def _warn_of_others(self, prompts: Sequence[Any]) -> None:
        """Say that prompts are read as text while encodings of others are not used."""
        unused = [prompt for prompt in self.embeds if prompt not in prompts]
        as_text = [prompt for prompt in prompts if prompt and prompt not in self.embeds]
        if unused and as_text:
            warnings.warn(
                f"prompt {as_text[0]!r} is read as text: prompt_embeds are by prompt, and {unused[0]!r}, which has "
                "some, was not asked for",
                stacklevel=2,
            )

    def _groups(self, prompts: Sequence[Any]) -> Iterator[list[Any]]:
        """Prompts, in order, that are encoded at once."""
        for _, found in groupby(enumerate(prompts), key=self._own):
            group = [prompt for _, prompt in found]
            yield from (group[i : i + _AT_ONCE] for i in range(0, len(group), _AT_ONCE))

    def _own(self, numbered: tuple[int, Any]) -> int | None:
        """Equal for neighbours that may be encoded at once."""
        number, prompt = numbered
        return number if isinstance(prompt, str) and prompt in self.embeds else None

    def _encode(self, family: Family, group: list[Any]) -> dict[str, Any]:
        given = self.embeds.get(group[0]) if isinstance(group[0], str) else None
        if given is None:
            return family.encode(group)
        pipe = family.pipe
        family.pipe = _with(pipe, {name: value.to(family.device) for name, value in given.items()})
        try:
            found = _whole(family, group)
        finally:
            family.pipe = pipe
        _refuse_width(group[0], found, family.encode([FEW]))
        return found


def _whole(family: Family, group: list[Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the text, which is not read, is too long
        found = family.encode(group)
    for name, value in found.items():
        if value is None:
            raise ValueError(f"prompt_embeds of {group[0][:40]!r} has nothing for {name}: give that too")
    return found


def _refuse_width(prompt: str, found: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Hold an encoding against that of a text: only the number of tokens may differ."""
    for name, value in text.items():
        ours, theirs = (tuple(getattr(each, "value", each).shape[1:]) for each in (found[name], value))
        tokens = len(theirs) > 1 or not getattr(value, "value", value).is_floating_point()
        if len(ours) != len(theirs) or ours[tokens:] != theirs[tokens:]:
            expected = (1, *(("tokens", *theirs[1:]) if tokens else theirs))
            raise ValueError(f"prompt_embeds of {prompt[:40]!r} makes {name} {(1, *ours)}, expected "
                             f"({', '.join(map(str, expected))}): encode it with this pipeline's encoders")  # fmt: skip


def _with(pipe: Any, given: Mapping[str, Tensor]) -> Any:
    """A copy of a pipeline whose `encode_prompt` has encodings instead of text."""
    own, other = pipe.encode_prompt, copy.copy(pipe)

    @functools.wraps(own)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        asked = dict(inspect.signature(own).bind(*args, **kwargs).arguments)
        texts = {name for name in asked if name == "prompt" or name.removeprefix("prompt_").isdigit()}
        return own(**asked | dict.fromkeys(texts) | given)

    vars(other)["encode_prompt"] = encode_prompt
    return other


_ENCODED = ("embeds", "embeds_2", "mask")  # ends of the names of what stands for text
