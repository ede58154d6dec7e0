"""A record's structure known from the start: what is written in every record of a schema stands, its fields are drawn.

    x_T = prompt {"name": "▢▢▢▢", "place": "▢▢▢▢"} filler          ▢ the mask, `blanks` of them a field

    scaffold(kernel, schema)                              the model's law given the structure, nothing else changed
    scaffold(kernel, schema, reveal="confidence")         S², and with null="<none>" S³ as published: a law of its own
    scaffold(kernel, schema, reveal="left")               one position at a time where there are as many steps as masks

The structure stands in the state, so that no sampler can touch it and no density counts it. What is left of a field
beyond its value is filled with a null token, which is stripped; a field of nulls alone is absent. A sample is the
record as JSON, read by the places of its fields: whatever is drawn in them, it parses.

Source: Unveiling the Potential of Diffusion Large Language Model in Controllable Generation (Xiong et al., 2025), S³.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Transition, Wrapper
from treesearch.backends.text.fields import Field, layout, pieces, record
from treesearch.backends.text.kernel import FREE, KNOWN, PROMPTED, MaskedTextKernel
from treesearch.backends.text.reveals import Order
from treesearch.rewards.numeric import is_whole
from treesearch.rewards.text.records import as_schema, validator_of


def scaffold(
    kernel: MaskedTextKernel,
    schema: Mapping[str, Any] | str,
    *,
    blanks: int = 16,
    null: str | None = None,
    reveal: Order | None = None,
    ask: str = "{prompt}",
) -> Scaffold:
    """A kernel of records of a schema.

    Args:
        kernel: of texts, with `words`.
        schema: a JSON schema, or the file of one.
        blanks: masks of a field.
        null: word that stands for what is not there, and fills what is left of a field; None is the tokenizer's filler.
        reveal: order of reveals, None for the kernel's own, see `text.reveals`.
        ask: what the model is told for a prompt, with {prompt} in it.

    Raises:
        TypeError: no kernel of masked text with words.
        ValueError: a schema without a scaffold, words that the tokenizer does not know, or more tokens than the
            kernel's length.
        FileNotFoundError: no such file.
        ImportError: jsonschema is not installed.
    """
    if not isinstance(kernel, MaskedTextKernel) or not kernel.masked or kernel.words is None:
        raise TypeError("a scaffold is for a MaskedTextKernel of masked diffusion with words: its fields are masks")
    told = kernel if reveal is None else kernel.with_settings(reveal=reveal)
    rules = as_schema(schema)
    validator_of(rules)
    return Scaffold(told, json.dumps(rules), blanks, null, ask)


@final
@dataclass(frozen=True, eq=False)
class Scaffold(Wrapper):
    """See `scaffold`.

    Args:
        kernel: of texts.
        schema: as JSON.
        blanks, null, ask: as of `scaffold`.

    Raises:
        ValueError: as of `scaffold`.
    """

    schema: str
    blanks: int = 16
    null: str | None = None
    ask: str = "{prompt}"

    def __post_init__(self) -> None:
        if not is_whole(self.blanks):
            raise ValueError(f"blanks is {self.blanks!r}, expected at least one mask a field")
        if not isinstance(self.ask, str) or "{prompt}" not in self.ask:
            raise ValueError(f"ask is {self.ask!r}, expected a text with {{prompt}} in it")
        if len(self._template) > self.kernel.length:
            raise ValueError(f"the scaffold has {len(self._template)} tokens, length={self.kernel.length}: take fewer "
                             "blanks, or a greater length")  # fmt: skip
        _ = self._null

    @cached_property
    def _pieces(self) -> list[str | Field]:
        return pieces(json.loads(self.schema))

    @property
    def fields(self) -> list[Field]:
        """What is to be written, in the order of the text."""
        return [piece for piece in self._pieces if isinstance(piece, Field)]

    @cached_property
    def _template(self) -> list[int]:
        """Tokens of the structure, FREE in its fields."""
        found = []
        for piece in self._pieces:
            found += [FREE] * self.blanks if isinstance(piece, Field) else self.kernel.plain(piece)
        return found

    @cached_property
    def _null(self) -> list[int]:
        """Tokens of the null word.

        Raises:
            ValueError: the tokenizer does not know it.
        """
        return [] if self.null is None else self.kernel.plain(self.null)

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Prompt and structure as known tokens.

        Raises:
            TypeError, ValueError: a prompt that is no text, or leaves no room for the scaffold.
        """
        cond = self.kernel.encode([self.ask.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt
                                   for prompt in prompts])  # fmt: skip
        prompted = cond[KNOWN] != FREE
        told = prompted.sum(1).tolist()
        known = torch.stack([self._row(row[:size].tolist()) for row, size in zip(cond[KNOWN], told, strict=True)])
        return {KNOWN: known.to(prompted.device), PROMPTED: prompted}

    def _row(self, prompt: Sequence[int] = ()) -> Tensor:
        """Known tokens (L,) of a prompt, the scaffold and what fills up behind it."""
        left = self.kernel.length - len(prompt) - len(self._template)
        if left < 0:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room for a scaffold of {len(self._template)} "
                             f"in length={self.kernel.length}: shorten it, or take a greater length")  # fmt: skip
        filler = FREE if self.kernel.words.filler is None else self.kernel.words.filler
        return torch.tensor([*prompt, *self._template, *[filler] * left], dtype=torch.int64, device="cpu")

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return self.kernel.prior(noise, self.known(cond, len(noise)))

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        return self.kernel.transition(x, t, self.known(cond, len(x)))

    def known(self, cond: Cond, n: int) -> dict[str, Any]:
        """Conditioning with the structure in it, also where there are no prompts."""
        if cond is not None and KNOWN in cond:
            return cond
        return (cond or {}) | {KNOWN: self._row().to(self.kernel.device).expand(n, -1)}

    def decode(self, x0: Tensor) -> list[str]:
        """Records as JSON."""
        return [json.dumps(found, ensure_ascii=False, allow_nan=False) for found in self.records(x0)]

    def records(self, x0: Tensor) -> list[dict[str, Any]]:
        """Records of states (n, L); a field of nulls alone is None."""
        places = layout(json.loads(self.schema))
        return [record(places, self._texts(row)) for row in x0.tolist()]

    def _texts(self, row: list[int]) -> list[str | None]:
        """What is written in the fields of a row."""
        at, texts = self._begin(row), list[str | None]()
        for piece in self._pieces:
            if isinstance(piece, Field):
                texts.append(self._written(row[at : at + self.blanks]))
                at += self.blanks
            else:
                at += len(self.kernel.plain(piece))
        return texts

    def _begin(self, row: list[int]) -> int:
        """Where the scaffold begins: the last place where its structure stands."""
        fixed = [(i, token) for i, token in enumerate(self._template) if token != FREE]
        for at in range(len(row) - len(self._template), -1, -1):
            if all(row[at + i] == token for i, token in fixed):
                return at
        raise ValueError("a state without its scaffold: decode states of this kernel")

    def _written(self, tokens: list[int]) -> str | None:
        """The text of a field without its nulls; None where nothing else is there."""
        size, kept, i = len(self._null), list[int](), 0
        while i < len(tokens):
            if size and tokens[i : i + size] == self._null:
                i += size
                continue
            kept.append(tokens[i])
            i += 1
        text = self.kernel.words.texts(torch.tensor([kept], dtype=torch.int64, device="cpu"))[0].strip() if kept else ""
        return text or None
