"""The meta device: operations know shapes and compute nothing, so that the memory of what runs there can be counted.

    peak = max over operations of Σ bytes of the storages alive

Attention counts as fused, as flash and memory-efficient kernels are: no matrix of tokens x tokens.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treesearch.backends.base import Shared
from treesearch.backends.pipelines.parts import unwrapped

Encoded = dict[str, Any]


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations under it have made, as long as anything refers to them.

    Storages that were there before (weights, arguments) count nothing, and neither do views.

    Args:
        device: only storages of this type of device count.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once.
    """

    def __init__(self, device: str | torch.device) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = torch.device(device).type
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, made=True)
        return out

    def _meet(self, values: Any, *, made: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.device.type != self._device:
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._known:
                continue
            size = storage.nbytes() if made else 0
            self._known.add(id(storage))
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, id(storage), size).atexit = False

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


class _Yes(TorchDispatchMode):
    """Code that asks for a value on the meta device, such as whether all are finite, gets 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    """Attention on the meta device as one operation; left to itself it would be the formula, scores and all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    otherwise: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    if not query.is_meta:
        return otherwise(query, key, value, attn_mask, dropout_p, is_causal, **more)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that `work`, on the meta device, has alive at once."""
    with LiveBytes("meta") as live, _Yes():
        work()
    return live.peak


def shadow(module: nn.Module) -> nn.Module:
    """A copy of a module, adapters and all, whose tensors are on the meta device."""
    module, memo = unwrapped(module), dict[int, Any]()
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = value.to("meta")
    other = copy.deepcopy(module, memo)
    for name in ("forward", "decode"):
        if hasattr(other, name):
            setattr(other, name, _fused(getattr(other, name)))
    return other


def _fused(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose attention is one operation, also where checkpointing calls it again."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _Fused():
            return method(*args, **kwargs)

    return call


def to_meta(encoded: Encoded) -> Encoded:
    """Conditioning without values."""
    return {k: Shared(_moved(v.value)) if isinstance(v, Shared) else _moved(v) for k, v in encoded.items()}


def _moved(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
