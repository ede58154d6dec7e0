"""How much memory a pipeline takes, known before it runs.

A copy of the kernel on the meta device (`treesearch.backends.pipelines.meta`) walks through the kernel's own code: one
step of a batch, one decoding, and what a gradient guide does.

Not counted: workspaces inside an operation (cuDNN, oneDNN), the allocator's rounding and fragments, the CUDA context,
the reward, and what a method keeps between batches (some states a row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Gaussian, Shared
from treesearch.backends.base.live import capacity, peak
from treesearch.backends.pipelines.meta import Encoded


class Planned(Protocol):
    """What a plan reads of a kernel, and does with its copy on the meta device."""

    pipe: Any
    device: torch.device
    dtype: torch.dtype
    state_shape: tuple[int, ...]
    text_encoders: str
    decode_batch: int

    @property
    def num_steps(self) -> int: ...
    def shadow(self) -> Planned: ...
    def modules(self) -> Mapping[str, nn.Module]: ...
    def encode(self, prompts: Sequence[Any]) -> Encoded: ...
    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian: ...
    def decode(self, x0: Tensor) -> Tensor: ...


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


def plan(kernel: Planned, batch_size: int, prompts: Sequence[Any], *, backward: bool) -> MemoryPlan:
    """See `DiffusersKernel.memory_plan`."""
    other = kernel.shadow()
    vae, leaves = getattr(other.pipe, "vae", None), kernel.text_encoders != "keep"
    weights = {name: _bytes(module) for name, module in other.modules().items()}
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
        capacity=capacity(kernel.device),
    )


def step(kernel: Planned, encoded: Encoded, n: int) -> Tensor:
    """What a search does n rows at a time, from conditioning to the next states."""
    x, t, cond = _inputs(kernel, encoded, n)
    return kernel.transition(x, t, cond).sample(torch.zeros_like(x))


def decoding(kernel: Planned, n: int) -> Tensor:
    """What a search does to score n latents, before the reward."""
    return kernel.decode(torch.zeros(n, *kernel.state_shape, dtype=kernel.dtype, device=kernel.device))


def _tiled(kernel: Planned, n: int) -> int:
    """Peak of decoding n latents in tiles: of one micro-batch, beside the images that are done."""
    kernel.pipe.vae.enable_tiling()
    few, images = min(n, kernel.decode_batch), torch.empty(0)

    def work() -> None:
        nonlocal images
        images = decoding(kernel, few)

    return peak(work) + (n - few) * _size(images) // few


def gradient(kernel: Planned, encoded: Encoded, n: int) -> Tensor:
    """What a gradient guide does with n rows, for a reward that costs nothing."""
    x, t, cond = _inputs(kernel, encoded, n)
    with torch.enable_grad():
        samples = kernel.decode(kernel.transition(x.requires_grad_(), t, cond).endpoint)
        return torch.autograd.grad(samples.sum(), x)[0]


def _inputs(kernel: Planned, encoded: Encoded, n: int) -> tuple[Tensor, Tensor, Encoded]:
    """States, levels and conditioning of n rows of the first prompt."""
    x = torch.zeros(n, *kernel.state_shape, dtype=kernel.dtype, device=kernel.device)
    rows = torch.zeros(n, dtype=torch.int64, device=kernel.device)
    cond = {name: value.value if isinstance(value, Shared) else value[rows] for name, value in encoded.items()}
    return x, rows + kernel.num_steps, cond | {"task": rows}


def _conditioning(encoded: Encoded) -> tuple[int, int]:
    """Bytes of the rows of all prompts, and of what they share."""
    rows = sum(_size(value) for value in encoded.values() if isinstance(value, Tensor))
    return rows, sum(_size(value.value) for value in encoded.values() if isinstance(value, Shared))


def _bytes(module: nn.Module) -> int:
    return sum(map(_size, (*module.parameters(), *module.buffers())))


def _size(value: Any) -> int:
    if (parts := getattr(value, "__tensor_flatten__", None)) is not None:  # of a quantiser's class
        return sum(_size(getattr(value, name)) for name in parts()[0])
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
