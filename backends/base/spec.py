"""What a search knows of a kernel beside its methods, resolved once; needs no torch to be imported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from treesearch.backends.base.grids import prices, subgrid

if TYPE_CHECKING:
    import torch

STEPS = 2**15 - 2  # T + 1 is the level of the root, and levels have two bytes
NO_CHAIN = "it has no `chain` (backends.chains.diffusion.Chain) whose steps a draft could take several at a time"


class Spec(NamedTuple):
    """A kernel's shapes and optional attributes, resolved once by `describe`."""

    num_steps: int
    state_shape: tuple[int, ...]
    noise_shape: tuple[int, ...]
    stochastic: tuple[bool, ...]  # (T + 1,)
    device: torch.device
    dtype: torch.dtype
    fingerprint: str | None
    rows_per_nfe: tuple[int, ...] = ()  # (T + 1,), [t] for the evaluation of x_t
    backward_per_nfe: tuple[int, ...] = ()  # (T + 1,)
    rewards_per_nfe: tuple[int, ...] = ()  # (T + 1,)
    previews: bool = False  # endpoints are drawn by `preview`
    departs: str | None = None  # why its chain is another law than the model's, without weights that would say so
    base_law: str | None = None  # whose law p is, where that is not the model's own
    valued: bool = False  # states are scored by values that it declares
    sample_range: tuple[float, float] | None = None  # of the entries of samples
    draft_times: tuple[float, ...] = ()  # (T + 1,), by which drafts space levels; () where none can be made
    undrafted: str = NO_CHAIN  # why none can be made; "" where they can
    draft_ratio: float = 1.0  # cost of an evaluation of a draft, in evaluations of the kernel

    @property
    def state_bytes(self) -> int:
        """Bytes of one state."""
        return math.prod(self.state_shape) * self.dtype.itemsize

    @property
    def drafts(self) -> bool:
        """Whether a draft can take steps of the chain several at a time."""
        return bool(self.draft_times)

    def draft_levels(self, evaluations: int) -> tuple[int, ...]:
        """Levels at which a draft of so many evaluations from T evaluates, descending, and 0."""
        return subgrid(self.draft_times, evaluations)

    def draft_prices(self, evaluations: int, *, held: bool = False) -> tuple[int, ...]:
        """NFE that a draft of so many evaluations from T is charged, by the level that it begins at, (T + 1,).

        Args:
            evaluations: from T.
            held: whether it begins with a transition that the node holds, and so with one evaluation less.

        Raises:
            ValueError: a kernel that drafts cannot leap along, fewer than 2 evaluations or more than T.
        """
        if not self.drafts:
            raise ValueError(f"no drafts of this kernel: {self.undrafted}. Leave draft out")
        return prices(self.draft_times, evaluations, self.draft_ratio, held=held)

    def branchable(self, t: int) -> bool:
        """Whether two children of a state x_t can differ: some step below t is stochastic."""
        return any(self.stochastic[1 : t + 1]) if t <= self.num_steps else True
