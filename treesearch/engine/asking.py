"""Asking a kernel: no graph is kept, errors say what was asked, and answers are checked before they are used."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Kernel, Shared, Spec
from treesearch.errors import KernelError


@contextmanager
def without_graph() -> Iterator[None]:
    """Keeps no autograd graph and makes no inference tensors, whatever the caller's mode is.

    Guides that need gradients turn them on around what they differentiate.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class Asking:
    """Has errors of a kernel say what was asked of it; those that would end a loop here become its own.

    Args:
        what: makes the words.

    Raises:
        KernelError: StopIteration or GeneratorExit.
    """

    def __init__(self, what: Callable[[], str]) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (StopIteration, GeneratorExit)):
            raise KernelError(f"{self.what()} raised {type(error).__name__}: {error}") from error
        if isinstance(error, (Exception, SystemExit)):
            error.add_note(f"in {self.what()}")
            if "does not require grad" in str(error):
                error.add_note("a search keeps no graph: put `with torch.enable_grad():` around what is differentiated")


def encode(kernel: Kernel, prompts: Sequence[Any]) -> dict[str, Any]:
    """Conditioning of the prompts, one row each."""
    if not hasattr(kernel, "encode"):
        raise TypeError(f"prompts need kernel.encode, which {type(kernel).__name__} lacks; it may return None")
    with Asking(lambda: f"kernel.encode of {len(prompts)} prompts, {_brief(prompts)}"):
        encoded = kernel.encode(prompts) or {}
    for name, rows in encoded.items():
        if not isinstance(rows, Shared) and len(rows) != len(prompts):
            raise KernelError(
                f"kernel.encode returned {len(rows)} rows of {name!r} for {len(prompts)} prompts: "
                "give one row each, or mark what has no row axis as Shared"
            )
    return encoded


def _brief(prompts: Sequence[Any], most: int = 3) -> str:
    """The first prompts, for messages."""
    shown = ", ".join(textwrap.shorten(repr(p), 80, placeholder="...") for p in prompts[:most])
    return f"[{shown}{', ...' if len(prompts) > most else ''}]"


def decode(kernel: Kernel, x: Tensor, how: str = "decode") -> Any:
    """What a kernel makes of states (n, *state): samples without a graph."""
    with Asking(lambda: f"kernel.{how}"):
        samples = getattr(kernel, how)(x)
    if isinstance(samples, Tensor):
        return samples.detach()
    if isinstance(samples, (list, tuple)):
        return [item.detach() if isinstance(item, Tensor) else item for item in samples]
    return samples


def as_states(x: Any, n: int, spec: Spec, what: str) -> Tensor:
    """States without a graph.

    Raises:
        KernelError: not n states of the kernel's shape and dtype.
    """
    if not isinstance(x, Tensor):
        raise KernelError(f"{what} returned {type(x).__name__}, expected a tensor of states")
    if tuple(x.shape) != (n, *spec.state_shape):
        raise KernelError(f"{what} returned shape {tuple(x.shape)}, expected {(n, *spec.state_shape)}")
    if x.dtype != spec.dtype:
        raise KernelError(f"{what} returned {x.dtype}, expected kernel.dtype = {spec.dtype}")
    return x.detach()


def as_weights(log_w: Tensor, n: int, what: str) -> NDArray[np.float64]:
    """log p/q of n rows.

    Raises:
        KernelError: a wrong shape, NaN or +inf.
    """
    if tuple(log_w.shape) != (n,):
        raise KernelError(f"{what} returned shape {tuple(log_w.shape)}, expected ({n},)")
    out = log_w.detach().double().cpu().numpy()
    if not (out < np.inf).all():  # NaN compares false
        raise KernelError(f"{what} returned NaN or +inf: the proposal q must be positive wherever it draws")
    return out
