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
