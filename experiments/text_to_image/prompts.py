"""Prompts from a CSV file, and whether they are DrawBench's."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = Path(__file__).parents[1] / "prompts" / "own200.csv"
OWN_LABEL = "NOT DrawBench: prompts written for this repository in its eleven categories"
OFFICIAL_LABEL = "DrawBench (Saharia et al., 2022)"
OTHER_LABEL = "NOT DrawBench: prompts of the user's file"
SIZES = {  # of the official file
    "Colors": 25,
    "Conflicting": 10,
    "Counting": 19,
    "DALL-E": 20,
    "Descriptions": 20,
    "Gary Marcus et al.": 10,
    "Misspellings": 10,
    "Positional": 20,
    "Rare Words": 7,
    "Reddit": 38,
    "Text": 21,
}
COLORS_DIGEST = "8f21418225842008e713cd2434adbc2973cd1b1c289044707f8abaa89a9ca6a1"  # of its first category


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file."""

    index: int
    text: str
    category: str


def select(file: Path, limit: int | None) -> tuple[list[Prompt], str, dict[str, Any]]:
    """The prompts of a run, how its outputs name them, and what identifies them."""
    found = read_prompts(file)
    if limit is not None and not 1 <= limit <= len(found):
        raise ValueError(f"limit is {limit}, expected 1 to {len(found)}, the prompts of {file.name}")
    n = len(found) if limit is None else limit
    official = is_official(found)
    label = OFFICIAL_LABEL if official else OWN_LABEL if file == OWN else OTHER_LABEL
    digest = hashlib.sha256("\n".join(p.text for p in found).encode()).hexdigest()
    chosen = [found[i * len(found) // n] for i in range(n)]
    known = {"file": file.name, "sha256": digest, "official": official, "of": len(found), "count": n}
    return chosen, label, known


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts and categories of a CSV file.

    Raises:
        ValueError: no such file, a missing column, an empty prompt, or none at all.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {file}: {error}") from error
    reader = csv.DictReader(text.splitlines())
    columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    if lacking := [name for name in ("Prompts", "Category") if name.lower() not in columns]:
        raise ValueError(f"{file} lacks the column {lacking[0]}: expected Prompts,Category, got {reader.fieldnames}")
    found = []
    for line in reader:
        prompt, category = ((line[columns[name]] or "").strip() for name in ("prompts", "category"))
        if not prompt:
            raise ValueError(f"{file}, line {reader.line_num}: the prompt is empty, remove the line")
        found.append(Prompt(len(found), prompt, category))
    if not found:
        raise ValueError(f"{file} holds no prompts below its header")
    return found


def is_official(prompts: Sequence[Prompt]) -> bool:
    """Whether these are DrawBench's: sizes of its categories, and the text of the first one."""
    texts = sorted(p.text.lower() for p in prompts if p.category == "Colors")
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Counter(p.category for p in prompts) == SIZES and digest == COLORS_DIGEST
