"""What the small text model reads: film reviews, acceptable sentences, and records of made-up people.

    a review            the film was a delight . [END] [PAD] ...
    a record            ada lee was born in 1815 . {"name": "ada lee none none", "year": "1815 none none none", ...

A record's structure and the padding of its fields are those of `backends.text.scaffold`: each field has FIELD tokens,
what is left of it says `none`, and so does a field that the sentence says nothing of. Every `HELD`-th line is kept for
tests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from treesearch.backends.text.fields import Field, pieces
from treesearch.backends.text.own import END, PAD, SPECIAL, OwnTokenizer

HELD = 20
FIELD = 4
NONE = "none"
SCHEMA = {
    "title": "person",
    "type": "object",
    "properties": {name: {"type": ["string", "null"]} for name in ("name", "year", "place")},
    "required": ["name", "year", "place"],
}


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    "ada alan anna boris clara david elena emil frida georg hanna igor ivan julia karl lena maria nadia otto "
    "paul rosa sara tom vera "
)
LAST = _words(
    "bauer brown costa dahl fischer garcia hill ivanov jones kim lee lopez martin moreau novak olsen park "
    "rossi sato smith stone weber wood young "
)
PLACES = _words(
    "athens berlin bern boston cairo delhi dublin geneva kyoto lagos lima lisbon london lyon madrid milan "
    "oslo paris porto prague rome tokyo turin vienna "
)


def reviews(folder: Path) -> list[str]:
    """Film reviews of both kinds, one sentence each."""
    return [line for end in ("pos", "neg") for line in lines(folder / f"rt-polarity.{end}")]


def lines(path: Path) -> list[str]:
    """Lines of a file that are not empty."""
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def judged(folder: Path) -> list[tuple[str, int]]:
    """Sentences and whether linguists accept them, written as the reviews are."""
    rows = [line.split("\t") for line in lines(folder / "cola_in_domain_train.tsv")]
    return [(re.sub(r"([.,!?;:])", r" \1 ", row[3].lower()).strip(), int(row[1])) for row in rows]


def acceptable(folder: Path) -> list[str]:
    """Sentences that linguists accept."""
    return [text for text, accepted in judged(folder) if accepted]


def split(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """(to train on, held out)."""
    held = [line for i, line in enumerate(lines) if i % HELD == 0]
    return [line for i, line in enumerate(lines) if i % HELD], held


class Words(NamedTuple):
    """First names, last names and places that sentences are of."""

    first: list[str]
    last: list[str]
    places: list[str]


KNOWN = Words(FIRST, LAST, PLACES)
NEW = Words(
    _words("mary mark martin john jack anne alice andrew carl charles eric frank george grace harry jane"),
    _words("adams clark green king marsh price turner ward"),
    _words("texas spain france india peru japan brazil china"),
)


def person(draw: random.Random, words: Words = KNOWN) -> tuple[str, dict[str, str | None]]:
    """A sentence about somebody and what it says; name, year and place each may be left out."""
    name = f"{draw.choice(words.first)} {draw.choice(words.last)}"
    year, place = str(draw.randrange(1800, 2000)), draw.choice(words.places)
    told = {"name": name, "year": year, "place": place}
    for key in told:
        if draw.random() < 0.3:
            told[key] = None
    who = told["name"] or draw.choice(("she", "he", "the writer", "somebody"))
    when = "" if told["year"] is None else f" in {year}"
    where = "" if told["place"] is None else f" in {place}"
    verb = draw.choice(("was born", "lived", "was seen", "made films", "came to us"))
    return f"{who} {verb}{draw.choice((where + when, when + where))} .", told


def tokenizer_of(lines: Sequence[str], vocabulary: int) -> str:
    """A byte-level BPE tokenizer of so many tokens, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    letters = pre_tokenizers.ByteLevel.alphabet()
    how = {
        "vocab_size": vocabulary,
        "special_tokens": list(SPECIAL),
        "initial_alphabet": letters,
        "show_progress": False,
    }
    made.train_from_iterator(lines, trainers.BpeTrainer(**how))
    return made.to_str()


def spoken(draw: random.Random, n: int) -> Iterator[str]:
    """Texts of records, for the tokenizer to learn their words."""
    for _ in range(n):
        sentence, told = person(draw)
        yield sentence
        yield " ".join(piece if isinstance(piece, str) else told[piece.path[0]] or NONE for piece in pieces(SCHEMA))


class Rows:
    """Texts as rows of tokens, ended and filled up.

    Args:
        tokenizer: of the model.
        length: L.
    """

    def __init__(self, tokenizer: OwnTokenizer, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.pad, self.end = (tokenizer.inner.token_to_id(mark) for mark in (PAD, END))
        self.pieces = [p if isinstance(p, Field) else self.ids(p) for p in pieces(SCHEMA)]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def text(self, line: str) -> list[int]:
        """A line, cut where it is too long."""
        return self._filled(self.ids(line)[: self.length - 1])

    def record(self, draw: random.Random) -> tuple[list[int], list[bool]]:
        """A sentence and its record, and which of the tokens are in fields."""
        sentence, told = person(draw)
        row = self.ids(sentence)
        fields = [False] * len(row)
        for piece in self.pieces:
            if isinstance(piece, Field):
                value = told[piece.path[0]]
                written = (self.ids(NONE if value is None else value) + FIELD * self.ids(NONE))[:FIELD]
                row, fields = row + written, fields + [True] * FIELD
            else:
                row, fields = row + piece, fields + [False] * len(piece)
        if len(row) > self.length:
            raise ValueError(f"a record has {len(row)} tokens, length is {self.length}: take a greater one")
        return row + [self.pad] * (self.length - len(row)), fields + [False] * (self.length - len(fields))

    def _filled(self, row: list[int]) -> list[int]:
        row = [*row, self.end]
        return row + [self.pad] * (self.length - len(row))
