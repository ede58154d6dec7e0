"""Attention, opened: what a network's attention modules hand to scaled-dot-product attention, changed on its way.

    def tap(attend, q, k, v):              # (B, heads, tokens, width); attend(q, k, v) is what the module would do
        return attend(q, k, v)
    with tapped(kernel.network, {"mid_block.attentions.0": tap}):
        law = kernel.transition(x, t, cond)

One tap serves U-Nets and transformers alike, since they all end in the same function of torch. Taps stand for the
length of the context and are gone after it, whatever happens inside; other threads that call the same network meanwhile
do not see them. A kernel that calls a network on some of an evaluation's rows only says which: `on_rows`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from treesearch.backends.base.capture import parts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Tap = Callable[[Attend, Tensor, Tensor, Tensor], Tensor]
"""(attend, q, k, v) -> (B, heads, tokens of q, width); keys and values may be more than the module's, at their end."""


@contextmanager
def tapped(network: nn.Module | Sequence[nn.Module], taps: Mapping[str, Tap]) -> Iterator[None]:
    """Change what attention modules do.

    Args:
        network: of a kernel, as `Kernel.network` has it; parts of the second of several are called "1.mid_block".
        taps: by the name of the attention module, as `named_modules` has it.

    Raises:
        ValueError: a name that the network does not have.
        RuntimeError: later, a module that attends by other means than torch's function.
    """
    watch = _Watch()
    with ExitStack() as hooks:
        for name, part in parts(network, tuple(taps)).items():
            enter = partial(watch.enter, name, taps[name])
            hooks.callback(part.register_forward_pre_hook(enter).remove)
            hooks.callback(part.register_forward_hook(watch.leave, always_call=True).remove)
        hooks.enter_context(watch)
        yield


class _Watch(TorchFunctionMode):
    """Knows which tapped module is running, and hands its attention to the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.running: list[list[Any]] = []  # name, tap, calls

    def enter(self, name: str, tap: Tap, part: nn.Module, given: Any) -> None:
        if threading.get_ident() == self.thread:
            self.running.append([name, tap, 0])

    def leave(self, part: nn.Module, given: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        name, _, calls = self.running.pop()
        if output is not None and not calls:  # None: it ended in an exception
            raise RuntimeError(
                f"{name} attends without torch's scaled_dot_product_attention, where taps are: set a processor that "
                "calls it, such as network.set_default_attn_processor()"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.running:
            return func(*args, **kwargs)
        self.running[-1][2] += 1
        call = dict(zip(_NAMES, args, strict=False)) | kwargs
        q, k, v = (call.pop(name) for name in _NAMES[:3])
        return self.running[-1][1](partial(_attend, call), q, k, v)


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _attend(call: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as the module asked for it; keys beyond those of its mask are seen by all queries."""
    mask = call.get("attn_mask")
    if mask is not None and (more := k.shape[-2] - mask.shape[-1]) > 0:
        call = call | {"attn_mask": F.pad(mask, (0, more), value=mask.dtype.is_floating_point is False)}
    return F.scaled_dot_product_attention(q, k, v, **call)


_ROWS: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def on_rows(rows: Tensor) -> Iterator[None]:
    """Within it a network is called on these rows of an evaluation, bool (n,) or indices."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_called() -> Tensor | None:
    """The rows of an evaluation that a network is called on; None are all."""
    return _ROWS.get()
