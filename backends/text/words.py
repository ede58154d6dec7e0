"""Texts to tokens and back, by a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor


@final
class Words:
    """A tokenizer as a kernel uses it.

    Args:
        tokenizer: of transformers.
        chat: prompts become what a user says, by the tokenizer's chat template, and samples are the answer alone.

    Raises:
        ValueError: a chat without a template.
    """

    def __init__(self, tokenizer: Any, *, chat: bool = False) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("this tokenizer has no chat template: leave chat out")
        self.tokenizer, self.chat = tokenizer, chat
        self._opening = self.plain(self._said("", asked=True).removeprefix(self._said("", asked=False))) if chat else []

    @property
    def mask(self) -> int | None:
        """The mask token, None of a tokenizer that has none."""
        return self.tokenizer.mask_token_id

    @property
    def _continues(self) -> str:
        """What a decoder of word pieces leaves before one that has no beginning in front of it, such as ##."""
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        return getattr(decoder, "prefix", "")

    @property
    def filler(self) -> int | None:
        """What stands behind the end of a text."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return end if pad is None else pad

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, or of what a user says.

        Raises:
            TypeError: no text.
            ValueError: a text that the tokenizer has no tokens for.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt is {type(text).__name__}, expected a text")
        return self.plain(self._said(text, asked=True) if self.chat else text)

    def plain(self, text: str) -> list[int]:
        """Tokens of a text as it stands, without marks around it.

        Raises:
            ValueError: a text that the tokenizer has no tokens for.
        """
        try:
            found = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except (UnicodeError, TypeError) as error:
            raise ValueError(f"the tokenizer cannot encode {text!r}: {error}") from error
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in found:
            raise ValueError(f"the tokenizer knows no tokens for a part of {text!r}: write it otherwise")
        return found

    def texts(self, rows: Tensor) -> list[str]:
        """Texts of tokens (n, L): up to the mark of the end, without other marks."""
        kept = [self._kept(row) for row in rows.tolist()]
        decoded = self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [str(text).removeprefix(self._continues) for text in decoded]

    def behind(self, row: list[int], size: int) -> str:
        """Text of what follows the first tokens of a row (L,), up to the mark of the end, without other marks.

        Args:
            row: tokens.
            size: how many are left out.
        """
        end, tail = self.tokenizer.eos_token_id, row[size:]
        kept = tail[: tail.index(end)] if end in tail else tail
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).removeprefix(self._continues)

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Marks before and after a text, such as [CLS] and [SEP]; none without a mask token to see them by."""
        if self.mask is None or self.chat:
            return (), ()
        whole = list(self.tokenizer(self.tokenizer.mask_token)["input_ids"])
        if whole.count(self.mask) != 1:
            return (), ()
        at = whole.index(self.mask)
        return tuple(whole[:at]), tuple(whole[at + 1 :])

    def refuse_other(self, vocabulary: int) -> None:
        """Raises:
        ValueError: it has tokens that a network of so many does not know.
        """
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        if highest >= vocabulary:
            raise ValueError(
                f"the tokenizer has token {highest}, the network knows {vocabulary}: it is of another model"
            )

    def _said(self, text: str, *, asked: bool) -> str:
        """A conversation that waits for an answer, or does not."""
        said: Sequence[dict[str, str]] = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(said, add_generation_prompt=asked, tokenize=False)

    def _kept(self, row: list[int]) -> list[int]:
        """Tokens of the text: of a chat those after the opening of the answer, up to the first end."""
        size = len(self._opening)
        for at in range(len(row) - size, -1, -1) if size else ():
            if row[at : at + size] == self._opening:
                row = row[at + size :]
                break
        end, begun = self.tokenizer.eos_token_id, False
        for i, token in enumerate(row):
            if token == end and begun:
                return row[:i]
            begun = begun or token != end
        return row
