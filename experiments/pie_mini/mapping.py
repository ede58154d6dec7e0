"""Reader of the mapping file of PIE-Bench: prompts, types and masks of its pictures.

    {"000000000000": {"image_path": "0_random_140/000000000000.jpg",
                      "original_prompt": "a cat on a [wooden] chair", "editing_prompt": "a cat on a [metal] chair",
                      "editing_instruction": "...", "editing_type_id": "0", "blended_word": "chair chair",
                      "mask": [start, length, start, length, ...]}, ...}

Brackets are around the words that an edit changes. A mask is runs of pixels, row after row of 512 x 512, that the edit
may change. The benchmark's own scripts count the pixels of the border as edited, against slips of annotation, and so
does `Entry.mask`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE = (512, 512)
TYPES = (
    "random",
    "change object",
    "add object",
    "delete object",
    "change content",
    "change pose",
    "change colour",
    "change material",
    "change background",
    "change style",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture and the edit that is asked for.

    Args:
        name: key in the file.
        image: path of the picture, below the folder of pictures.
        source, target: prompts without brackets.
        changed: words in brackets, of the source and of the target.
        instruction: the edit as a command.
        kind: number of its type, an index of `TYPES`.
        blended: the words whose maps localise the edit, of the source and of the target; None where there are none.
        mask: (512, 512) bool, True where the edit may happen.
    """

    name: str
    image: str
    source: str
    target: str
    changed: tuple[tuple[str, ...], tuple[str, ...]]
    instruction: str
    kind: int
    blended: tuple[str, str] | None
    mask: Tensor


def read_mapping(file: Path, size: tuple[int, int] = SIZE) -> list[Entry]:
    """Entries in the order of the file.

    Args:
        file: mapping_file.json.
        size: of its masks.

    Raises:
        ValueError: no such file, or an entry that is not what it should be.
    """
    try:
        told = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no mapping file: {error}") from error
    if not isinstance(told, dict) or not told:
        raise ValueError(f"{file} is no mapping file: expected an object with a picture for each of its names")
    return [_entry(file, name, each, size) for name, each in told.items()]


def _entry(file: Path, name: str, told: Any, size: tuple[int, int]) -> Entry:
    try:
        kind = int(told["editing_type_id"])
        if kind not in range(len(TYPES)):
            raise ValueError(f"editing_type_id is {kind}, expected 0..{len(TYPES) - 1}")
        prompts = told["original_prompt"], told["editing_prompt"]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts are {prompts}, expected text")
        return Entry(
            name=name,
            image=told["image_path"],
            source=bare(prompts[0]),
            target=bare(prompts[1]),
            changed=(bracketed(prompts[0]), bracketed(prompts[1])),
            instruction=told.get("editing_instruction", ""),
            kind=kind,
            blended=_blended(told.get("blended_word", "")),
            mask=unrolled(told["mask"], size),
        )
    except (KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}, {name}: {why}") from error


def bare(prompt: str) -> str:
    """A prompt without brackets."""
    return prompt.replace("[", "").replace("]", "")


def bracketed(prompt: str) -> tuple[str, ...]:
    """What stands in brackets."""
    return tuple(re.findall(r"\[([^\[\]]*)\]", prompt))


def _blended(words: str) -> tuple[str, str] | None:
    if not words.strip():
        return None
    found = words.split()
    if len(found) != 2:
        raise ValueError(f"blended_word is {words!r}, expected a word of the source and one of the target")
    return found[0], found[1]


def unrolled(runs: list[int], size: tuple[int, int] = SIZE) -> Tensor:
    """The mask (h, w) of runs, with the border; a run that goes beyond the last pixel ends there.

    Raises:
        ValueError: no pairs of a start and a length inside the picture.
    """
    height, width = size
    if len(runs) % 2 or not all(isinstance(n, int) and n >= 0 for n in runs):
        raise ValueError(f"the mask has {len(runs)} numbers, expected pairs of a start and a length, 0 or more")
    mask = torch.zeros(height * width, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if start >= len(mask):
            raise ValueError(f"a run begins at {start}, expected 0..{len(mask) - 1}")
        mask[start : start + length] = True
    mask = mask.reshape(height, width)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask
