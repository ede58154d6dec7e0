"""How much memory a search over texts takes, known before it runs.

The network's own part is counted on the meta device; logits and draws from shapes, as `MaskedTextKernel` and `Tokens`
make them with every position masked. Not counted: workspaces inside an operation, the allocator's rounding, the CUDA
context, the reward, and what a method keeps between batches (`state` bytes a row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from treesearch.backends.base.live import capacity, on_meta, peak
from treesearch.backends.base.tokens import ENTRIES

TABLES, SORTED = 3, 5  # of float64 that a draw has alive, and a nucleus: of ENTRIES at most
STATES = 20  # of the size of one, such as where its open positions are


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Bytes that a search takes on the kernel's device.

    Args:
        batch_size: rows of a step.
        weights: of the network.
        state: one state.
        network: most that one evaluation of the batch has alive at once.
        drawing: logits of the batch, and what drawing from them has alive beside.
        capacity: what the device has for this process; None for a CPU.
    """

    batch_size: int
    weights: int
    state: int
    network: int
    drawing: int
    capacity: int | None

    @property
    def total(self) -> int:
        """Most bytes on the device at once."""
        return self.weights + STATES * self.batch_size * self.state + max(self.network, self.drawing)

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much; None where that is not known."""
        return None if self.capacity is None else self.total <= self.capacity

    def lines(self) -> dict[str, int]:
        """The bytes by what they are for."""
        rows = f"of {self.batch_size} rows"
        found = {"weights": self.weights, "state": self.state, f"evaluation {rows}": self.network}
        found |= {f"logits and draws {rows}": self.drawing, "device, in all": self.total}
        return found | ({} if self.capacity is None else {"device has": self.capacity})


def plan(kernel: Any, batch_size: int) -> TextPlan | None:
    """See `MaskedTextKernel.memory_plan`."""
    network = kernel.network
    if network is None:
        return None
    shadow, told = on_meta(network).eval(), []
    rows = batch_size * kernel.rows_per_nfe

    def work() -> None:
        x = torch.zeros(rows, kernel.length, dtype=torch.int64, device="meta")
        t = torch.full((rows,), kernel.num_steps, device="meta")
        told.append(kernel.asked.logits(shadow, x, t, kernel.corruption))

    with torch.no_grad():
        evaluation, (logits,) = peak(work), told
    entries = batch_size * kernel.length * logits.shape[2]
    open_, some = entries * logits.element_size(), 8 * min(ENTRIES, entries)
    asking = logits.nbytes + open_ * (1 if kernel.rows_per_nfe == 1 else 4)  # both sides of guidance, and between them
    drawing = open_ + TABLES * some if kernel.top_p == 1 else 2 * open_ + SORTED * some
    tensors = [*network.parameters(), *network.buffers()]
    return TextPlan(
        batch_size=batch_size,
        weights=sum(tensor.nbytes for tensor in tensors),
        state=8 * kernel.length,
        network=evaluation,
        drawing=max(asking, drawing),
        capacity=capacity(kernel.device),
    )
