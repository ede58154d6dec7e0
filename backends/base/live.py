"""The meta device, where operations know shapes and compute nothing, and the bytes that are alive there.

peak = max over operations of Σ bytes of the storages alive
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that `work`, on the meta device, has alive at once."""
    with LiveBytes("meta") as live, _Yes():
        work()
    return live.peak


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module whose tensors are on the meta device; weights are not copied."""
    memo = dict[int, Any]()
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = value.to("meta")
    return copy.deepcopy(module, memo)


def capacity(device: torch.device) -> int | None:
    """Bytes that a device has for this process; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
