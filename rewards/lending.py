"""Samples lent to a reward: whoever reads them next, another term of a sum or the search itself, finds them unchanged.

Lists, tuples, dicts and PIL images are handed out as copies, tensors and arrays as they are, for a batch may be large:
a reward that writes into one is found out afterwards, by the tensor's own counter of writes. Writes that torch does not
count (through `.data` or `.numpy()`) are looked for at PROBES entries spread over a tensor; arrays are compared whole.
Other objects are handed on unseen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROBES = 1009
Changed = Callable[[], bool]


def lend(value: Any) -> tuple[Any, list[Changed]]:
    """What a reward may be given of a value, and for each tensor and array in it whether it has been written into."""
    marks: list[Changed] = []
    return _lent(value, marks), marks


def _lent(value: Any, marks: list[Changed]) -> Any:
    if isinstance(value, Tensor):
        marks.append(_tensor(value))
        return value.view_as(value) if value.layout is torch.strided else value  # its flags are its own
    if type(value) in (list, tuple):
        return type(value)([_lent(v, marks) for v in value])
    if type(value) is dict:
        return {k: _lent(v, marks) for k, v in value.items()}
    if hasattr(value, "convert") and hasattr(value, "copy"):  # a PIL image
        return value.copy()
    if hasattr(value, "__array_interface__"):
        marks.append(_array(value))
    return value


def _tensor(x: Tensor) -> Changed:
    version = None if x.is_inference() else x._version
    before = _probe(x)

    def changed() -> bool:
        after = _probe(x)
        written = before is not None and after is not None and not torch.equal(before, after)
        return written or (version is not None and x._version != version)

    return changed


def _probe(x: Tensor) -> Tensor | None:
    """Some entries as bytes, for NaN does not equal itself."""
    if x.layout is not torch.strided or x.is_quantized or not x.numel():
        return None
    at = torch.arange(0, x.numel(), max(1, x.numel() // PROBES) | 1, device=x.device)
    return torch.take(x.detach(), at).view(torch.uint8)


def _array(x: Any) -> Changed:
    before = _checksum(x)
    return lambda: _checksum(x) != before


def _checksum(x: Any) -> int:
    whole = x.flags.c_contiguous and x.size and not x.dtype.hasobject if hasattr(x, "flags") else False
    return zlib.crc32(memoryview(x).cast("B") if whole else x.tobytes())
