"""Networks of pipelines on the meta device, so that the memory of what runs there can be counted.

Attention counts as fused, as flash and memory-efficient kernels are: no matrix of tokens x tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from treesearch.backends.base import Shared
from treesearch.backends.base.live import on_meta
from treesearch.backends.pipelines.parts import unwrapped

Encoded = dict[str, Any]


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


def shadow(module: nn.Module) -> nn.Module:
    """A copy of a module, adapters and all, whose tensors are on the meta device."""
    other = on_meta(unwrapped(module))
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
