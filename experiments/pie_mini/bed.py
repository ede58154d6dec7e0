"""What edits share: pictures, a painter with guidance and one without, paths of the pictures, single shots and figures.

A shot is a search that draws once, `BestOfN(n=1)`, at η = 0: pictures are its tasks. What it costs is counted at the
network, in rows of the U-Net a picture: a guided evaluation has two, the inversion at w = 1 one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import treesearch as ts
from experiments.pie_mini import pictures
from experiments.pie_mini.metrics import metrics
from experiments.pie_mini.painter import WEIGHTS, painter
from experiments.shared.cells import Row
from treesearch.backends.base import Cond
from treesearch.backends.chains.inversion import invert, still
from treesearch.backends.roots import Rooted
from treesearch.rewards import constant

SCALE = 7.5


@dataclass(frozen=True, eq=False, kw_only=True)
class Bed:
    """Pairs, and chains for them.

    Args:
        pairs: what is edited.
        num_steps: T.
        scale: w of the edits; inversions have w = 1.
        eta: η of the guided chain.
        weights: of the painter.
    """

    pairs: Sequence[pictures.Pair]
    num_steps: int
    scale: float = SCALE
    eta: float = 0.0
    weights: Path = WEIGHTS
    counts: dict[str, float] = field(default_factory=lambda: {"rows": 0.0, "backward": 0.0})

    @cached_property
    def plain(self) -> Any:
        """The painter without guidance."""
        return self._counted(painter(self.num_steps, self.weights, guidance_scale=1.0, eta=0.0))

    @cached_property
    def guided(self) -> Any:
        """The painter with guidance."""
        return self._counted(painter(self.num_steps, self.weights, guidance_scale=self.scale, eta=self.eta))

    @cached_property
    def x0(self) -> Tensor:
        """The pictures as states (n, 3, 16, 16)."""
        return 2 * torch.stack([pair.picture for pair in self.pairs]) - 1

    @cached_property
    def masks(self) -> Tensor:
        """(n, 16, 16) bool, True where an edit may happen."""
        return torch.stack([pair.mask for pair in self.pairs])

    @property
    def sources(self) -> tuple[str, ...]:
        """Prompts of the pictures."""
        return tuple(pair.prompts[0] for pair in self.pairs)

    @property
    def targets(self) -> tuple[str, ...]:
        """Prompts of the edits."""
        return tuple(pair.prompts[1] for pair in self.pairs)

    @cached_property
    def path(self) -> Tensor:
        """x_0..x_T (T + 1, n, 3, 16, 16) by DDIM inversion under the source prompts, w = 1."""
        return invert(self.plain, self.x0, cond=told(self.plain, self.sources))

    def _counted(self, kernel: Any) -> Any:
        kernel.network.register_forward_pre_hook(self._count)
        return kernel

    def _count(self, network: Any, args: tuple[Any, ...]) -> None:
        self.counts["rows"] += len(args[0])
        self.counts["backward"] += len(args[0]) * torch.is_grad_enabled()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Evaluations in here are part of others that are counted, or of a check."""
        before = dict(self.counts)
        yield
        self.counts.update(before)

    def shot(self, kernel: Any, seed: int = 0) -> Tensor:
        """One sample a picture, (n, 3, 16, 16) in [0, 1], of a kernel that begins at the pictures."""
        found = ts.search(kernel, constant(0.0), ts.BestOfN(n=1), prompts=list(self.targets), seed=seed, progress=False)
        return torch.stack([task.samples[0] for task in found.tasks])

    def figures(self, edited: Tensor) -> Row:
        """What the judge and the metrics say of edited pictures (n, 3, 16, 16): lists of n values."""
        source = self.guided.decode(self.x0)
        edited = edited.float().cpu()
        measured = {
            name: measure(source, edited, self.masks, self.targets).tolist() for name, measure in metrics().items()
        }
        right = pictures.judged(edited, [pair.target for pair in self.pairs])
        return {"right": right.long().tolist(), **measured}


def told(kernel: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Conditioning of prompts, a row each, without an engine."""
    return {name: getattr(each, "value", each) for name, each in kernel.encode(list(prompts)).items()}


@torch.no_grad()
def walked(kernel: Any, x: Tensor, cond: Cond) -> Tensor:
    """x_0..x_T (T + 1, n, *state) of a kernel's own steps without noise from states x at T."""
    states, rows = [x], len(x)
    for t in range(kernel.num_steps, 0, -1):
        at = torch.full((rows,), t, device=x.device)
        states.append(still(kernel, states[-1], at, {**(cond or {}), "task": torch.arange(rows, device=x.device)}))
    return torch.stack(states[::-1])


def rooted(kernel: Any, path: Tensor, share: float = 1.0, noised: bool = False) -> Rooted:
    """A kernel that begins at the pictures' paths, or at the pictures under fresh noise."""
    return Rooted(kernel, path, level=max(1, round(share * kernel.num_steps)), noised=noised)
