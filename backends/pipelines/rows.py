"""What blocks make of prompts, as rows of conditioning, and back as the blocks take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.base import Shared

_LENGTHS = "_lengths"


def as_rows(name: str, value: Any, n: int, *, each: bool) -> dict[str, Any]:
    """Conditioning as rows (n, ...), or shared by all: what stands for no prompt is, unless `each` has its own."""
    shared = name.startswith("negative_") and not each
    if isinstance(value, list) and len(value) == n and all(isinstance(each, Tensor) for each in value):
        lengths = torch.tensor([len(each) for each in value], device=value[0].device)
        padded = torch.nn.utils.rnn.pad_sequence(value, batch_first=True)
        return _shared_if(shared, name, padded) | _shared_if(shared, f"{name}{_LENGTHS}", lengths)
    if isinstance(value, Tensor):
        return _shared_if(shared, name, value)
    raise TypeError(f"{name} is {type(value).__name__}, expected rows of a tensor")


def _shared_if(shared: bool, key: str, value: Tensor) -> dict[str, Any]:
    return {key: Shared(value[:1].clone()) if shared else value}


def as_blocks_take_them(cond: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Rows as the blocks know them: lists where lengths say so, and n of what is shared."""
    rows = {k: v.expand(n, *v.shape[1:]) if k.startswith("negative_") else v for k, v in cond.items()}
    names = [k.removesuffix(_LENGTHS) for k in rows if k.endswith(_LENGTHS)]
    lengths = {k: _numbers(rows[k + _LENGTHS], rows[k].shape[1]) for k in names}
    return {
        k: [row[:m] for row, m in zip(v, lengths[k], strict=True)] if k in lengths else v
        for k, v in rows.items()
        if not k.endswith(_LENGTHS)
    }


def _numbers(lengths: Tensor, longest: int) -> list[int]:
    """Lengths of rows; on the meta device, which has no values, the longest there can be."""
    return [longest] * len(lengths) if lengths.is_meta else lengths.tolist()


def join(parts: list[dict[str, Any]], apart: bool = False) -> dict[str, Any]:
    """Rows of several encodings in one, as long as the longest.

    Args:
        parts: the encodings.
        apart: whether what is shared in each may differ from one to another, and then has a row each.
    """
    return {name: _joined([part[name] for part in parts], parts, apart) for name in parts[0]}


def _joined(values: list[Any], parts: list[dict[str, Any]], apart: bool) -> Any:
    if not isinstance(values[0], Shared):
        return _cat(values)
    first, *others = [each.value for each in values]
    if not apart or first.is_meta or all(each.shape == first.shape and each.equal(first) for each in others):
        return values[0]
    counts = [next(len(each) for each in part.values() if not isinstance(each, Shared)) for part in parts]
    return _cat([each.value.expand(n, *each.value.shape[1:]) for each, n in zip(values, counts, strict=True)])


def _cat(parts: list[Tensor]) -> Tensor:
    """Rows of unequal length are filled up with zeros, which masks and lengths leave out."""
    longest = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    fill = (0, 0) * (parts[0].ndim - 2)
    if not longest:
        return torch.cat(parts)
    return torch.cat([torch.nn.functional.pad(part, (*fill, 0, longest - part.shape[1])) for part in parts])
