"""What rewards take and what they give: samples, prompts and numbers, checked at the boundary."""

from __future__ import annotations

import math
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class RewardError(ValueError):
    """A reward broke its contract; `rows` lists the offending rows where they are known."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def as_prompts(prompts: Iterable[Any] | None) -> list[Any] | None:
    """Prompts as a list, in order of iteration: what follows may count on positions.

    Raises:
        TypeError: a string, or something without an order or a length.
    """
    if prompts is None or type(prompts) is list:
        return prompts
    kind = type(prompts).__name__
    if isinstance(prompts, (str, bytes)):
        raise TypeError(f"prompts is the string {prompts!r}, expected a list of prompts: [{prompts!r}]")
    if isinstance(prompts, (Set, Mapping)) and not isinstance(prompts, (KeysView, ItemsView)):
        raise TypeError(f"prompts is a {kind}, which has no positions: give a list of prompts")
    if hasattr(prompts, "columns"):
        raise TypeError(f"prompts is a {kind}, a table: give the column that holds them")
    try:
        found, count = list(prompts), len(prompts)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"prompts is a {kind}, expected a list of prompts") from error
    if len(found) != count:
        raise TypeError(
            f"prompts is a {kind} of length {count} that gives {len(found)} entries: give a list of prompts"
        )
    return [p.item() if hasattr(p, "item") and getattr(p, "ndim", 1) == 0 else p for p in found]


def flat(x: Tensor) -> Tensor:
    """Rows (n, ...) as (n, size); those without an axis of their own as (n, 1)."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def check_rewards(values: Any, n: int, name: str) -> Tensor:
    """Rewards as float64 (n,) on the CPU, in memory of their own.

    Raises:
        RewardError: shape, dtype or a NaN or +inf value; the message says which rows and what to do.
    """
    try:
        values = _tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        got = f"reward {name!r} returned {type(values).__name__}"
        raise RewardError(f"{got}, expected a tensor or a list of {n} numbers: {error}") from error
    if values.is_complex():
        raise RewardError(f"reward {name!r} returned complex values ({values.dtype}), expected real ones")
    if values.shape != (n,):
        hint = ": squeeze the last axis" if values.shape == (n, 1) else ": return one number per sample"
        raise RewardError(f"reward {name!r} returned shape {tuple(values.shape)}, expected ({n},){hint}")
    values = values.to("cpu", torch.float64, copy=True)
    for bad, what in ((values.isnan(), "nan"), (values == math.inf, "+inf")):
        if bad.any():
            rows = bad.nonzero().flatten().tolist()
            more = f"{len(rows)} of {n} rows, first row {rows[0]}"
            raise RewardError(
                f"reward {name!r} returned {what} ({more}): return a finite number, or -inf to forbid", rows
            )
    return values


def _tensor(values: Any) -> Tensor:
    """Numbers of any kind, with their graph where they have one.

    Raises:
        TypeError, ValueError, RuntimeError, OverflowError: no numbers.
    """
    if isinstance(values, Tensor):
        return values.to_dense() if values.layout is not torch.strided else values
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, Tensor) for v in values):
        return torch.stack([v.reshape(()) if v.numel() == 1 else v for v in values])
    if not hasattr(values, "__array__"):
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")  # whatever torch's defaults are
    import numpy as np

    if isinstance(values, np.ma.MaskedArray):
        raise ValueError("a masked array has entries that are no numbers, fill them")
    array = np.asarray(values)  # columns of a table too: by position, whatever their labels
    if array.dtype.kind not in "biufc":
        raise TypeError(f"an array of {array.dtype}")
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))


def content(value: Any) -> list[bytes]:
    """Bytes that tell values apart, with their types and lengths.

    Raises:
        TypeError: an object whose content is not known.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [f"tensor{value.dtype}{tuple(value.shape)}".encode(), data]
    if value is None or isinstance(value, (bool, int, float, str)):
        data = repr(value).encode()
        return [f"{type(value).__name__}{len(data)}:".encode(), data]
    if isinstance(value, bytes):
        return [f"bytes{len(value)}:".encode(), value]
    if isinstance(value, (list, tuple)):
        return [f"{type(value).__name__}{len(value)}:".encode(), *(part for item in value for part in content(item))]
    if isinstance(value, dict):
        return [f"dict{len(value)}:".encode(), *(part for item in value.items() for part in content(item))]
    if hasattr(value, "tobytes"):  # arrays and PIL images
        shape = getattr(value, "shape", getattr(value, "size", ()))
        kind = getattr(value, "dtype", getattr(value, "mode", ""))
        return [f"{type(value).__name__}{kind}{shape}".encode(), value.tobytes()]
    raise TypeError(f"cannot tell {type(value).__name__} samples or prompts apart: give cached(..., key=...)")


_ANEW: ContextVar[bool] = ContextVar("anew", default=False)


@contextmanager
def anew() -> Iterator[None]:
    """Within it caches score what they know once more and remember nothing: what varies is seen to vary."""
    token = _ANEW.set(True)
    try:
        yield
    finally:
        _ANEW.reset(token)


def is_anew() -> bool:
    """Whether remembered values are not wanted."""
    return _ANEW.get()
