"""How much memory a pipeline takes, known before it runs.

    peak = max over operations of Σ bytes of the storages alive

`DiffusersKernel.shadow`, a copy on the meta device, walks through the kernel's own code: one step of a batch, one
decoding, and what a gradient guide does. Operations on that device know shapes and compute nothing. Attention counts as
fused, as flash and memory-efficient kernels are: no matrix of tokens x tokens.

Not counted: workspaces inside an operation (cuDNN, oneDNN), the allocator's rounding and fragments, the CUDA context,
the reward, and what a method keeps between batches (some states a row).
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treesearch.backends.base import Shared
from treesearch.backends.pipelines.parts import unwrapped

if TYPE_CHECKING:
    from treesearch.backends.pipelines.kernel import DiffusersKernel

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


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that a search takes on the kernel's device.

    Args:
        batch_size: rows of a step; under classifier-free guidance the network sees twice as many.
        decode_batch: latents decoded at a time.
        weights: of each component.
        leaving: of those weights, what leaves the device once the prompts are encoded.
        conditioning: of one prompt.
        shared: conditioning that all prompts share.
        num_prompts: whose conditioning is on the device.
        state: one state.
        encode: most that encoding the prompts has alive at once; 0 where they are encoded.
        network: most that one step of the batch has alive at once, its states included.
        decode, decode_tiled: most that decoding the batch, `decode_batch` at a time, has alive at once, as the VAE is
            set and with tiling; nearly the same where it has none, or where the image is one tile.
        backward: most that a gradient guide has alive at once, the reward apart; None without one.
        capacity: what the device has for this process; None for a CPU.
    """

    batch_size: int
    decode_batch: int
    weights: dict[str, int]
    leaving: int
    conditioning: int
    shared: int
    num_prompts: int
    state: int
    encode: int
    network: int
    decode: int
    decode_tiled: int
    backward: int | None
    capacity: int | None

    @property
    def total(self) -> int:
        """Most bytes on the device at once."""
        weights = sum(self.weights.values())
        conditioning = self.num_prompts * self.conditioning + self.shared
        searching = max(self.network, self.decode, self.backward or 0)
        return max(weights + self.encode, weights - self.leaving + conditioning + searching)

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much; None where that is not known."""
        return None if self.capacity is None else self.total <= self.capacity

    def lines(self) -> dict[str, int]:
        """The bytes by what they are for."""
        parts = {f"weights of {name}": size for name, size in self.weights.items()}
        parts |= {"conditioning, a prompt": self.conditioning, "state": self.state}
        if self.encode:
            parts["encoding prompts"] = self.encode
        parts[f"step of {self.batch_size} rows"] = self.network
        parts[f"decoding, {self.decode_batch} at a time"] = self.decode
        if self.decode_tiled < 0.95 * self.decode:
            parts["decoding, tiled"] = self.decode_tiled
        if self.backward is not None:
            parts["step, decoding and gradient"] = self.backward
        return parts | {"device, in all": self.total} | ({} if self.capacity is None else {"device has": self.capacity})


def plan(kernel: DiffusersKernel, batch_size: int, prompts: Sequence[Any], *, backward: bool) -> MemoryPlan:
    """See `DiffusersKernel.memory_plan`."""
    other = kernel.shadow()
    vae, leaves = getattr(other.pipe, "vae", None), kernel.text_encoders != "keep"
    weights = {name: _bytes(module) for name, module in other._modules().items()}
    encoded: Encoded = {}
    encoding = peak(lambda: encoded.update(other.encode(prompts)))
    rows, shared = _conditioning(encoded)
    network, decode = peak(lambda: step(other, encoded, batch_size)), peak(lambda: decoding(other, batch_size))
    guided = peak(lambda: gradient(other, encoded, batch_size)) if backward else None
    untiled = hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    return MemoryPlan(
        batch_size=batch_size,
        decode_batch=kernel.decode_batch,
        weights=weights,
        leaving=sum(size for name, size in weights.items() if leaves and name.startswith("text_encoder")),
        conditioning=rows // max(1, len(prompts)),
        shared=shared,
        num_prompts=len(prompts),
        state=_size(torch.empty(kernel.state_shape, dtype=kernel.dtype, device="meta")),
        encode=encoding,
        network=network,
        decode=decode,
        decode_tiled=_tiled(other, batch_size) if untiled else decode,
        backward=guided,
        capacity=_capacity(kernel.device),
    )


def peak(work: Callable[[], Any]) -> int:
    """Most bytes that `work`, on the meta device, has alive at once."""
    with LiveBytes("meta") as live, _Yes():
        work()
    return live.peak


def step(kernel: DiffusersKernel, encoded: Encoded, n: int) -> Tensor:
    """What a search does n rows at a time, from conditioning to the next states."""
    x, t, cond = _inputs(kernel, encoded, n)
    return kernel.transition(x, t, cond).sample(torch.zeros_like(x))


def decoding(kernel: DiffusersKernel, n: int) -> Tensor:
    """What a search does to score n latents, before the reward."""
    return kernel.decode(torch.zeros(n, *kernel.state_shape, dtype=kernel.dtype, device=kernel.device))


def _tiled(kernel: DiffusersKernel, n: int) -> int:
    """Peak of decoding n latents in tiles: of one micro-batch, beside the images that are done."""
    kernel.pipe.vae.enable_tiling()
    few, images = min(n, kernel.decode_batch), torch.empty(0)

    def work() -> None:
        nonlocal images
        images = decoding(kernel, few)

    return peak(work) + (n - few) * _size(images) // few


def gradient(kernel: DiffusersKernel, encoded: Encoded, n: int) -> Tensor:
    """What a gradient guide does with n rows, for a reward that costs nothing."""
    x, t, cond = _inputs(kernel, encoded, n)
    with torch.enable_grad():
        samples = kernel.decode(kernel.transition(x.requires_grad_(), t, cond).endpoint)
        return torch.autograd.grad(samples.sum(), x)[0]


def _inputs(kernel: DiffusersKernel, encoded: Encoded, n: int) -> tuple[Tensor, Tensor, Encoded]:
    """States, levels and conditioning of n rows of the first prompt."""
    x = torch.zeros(n, *kernel.state_shape, dtype=kernel.dtype, device=kernel.device)
    rows = torch.zeros(n, dtype=torch.int64, device=kernel.device)
    cond = {name: value.value if isinstance(value, Shared) else value[rows] for name, value in encoded.items()}
    return x, rows + kernel.num_steps, cond | {"task": rows}


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


def _conditioning(encoded: Encoded) -> tuple[int, int]:
    """Bytes of the rows of all prompts, and of what they share."""
    rows = sum(_size(value) for value in encoded.values() if isinstance(value, Tensor))
    return rows, sum(_size(value.value) for value in encoded.values() if isinstance(value, Shared))


def _bytes(module: nn.Module) -> int:
    return sum(map(_size, (*module.parameters(), *module.buffers())))


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _capacity(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
