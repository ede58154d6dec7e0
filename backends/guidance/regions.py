"""Regions of a picture and where they go: one map for what is moved, resized, dragged or pasted, and its energies.

    source(p) = c + (p - c - d) / r     what place p of the edited picture shows: c the centre of the region m, d how
                                        far it goes, r how much it grows; m' are the places p with source(p) in m

    S(F, p; F*, q) = (1 + cos(F[p], F*[q])) / 2                                              features of a network
    E_edit     = w_edit / (1 + 4 mean_{m'} S(F, p; F*, source(p)))                           what went is there
    E_content  = w_content / (1 + 4 mean_{neither m nor m'} S(F, p; F°, p))                  the rest stays
    E_contrast = w_contrast mean_{m without m'} S(F, p; F°, p)                               what went is not here
    E_inpaint  = w_inpaint / (1 + 4 S(mean_{m without m'} F; mean_{neither} F°))             but what is around it

F are features of the edited x_t, F° those of the picture at that level, F* those of the picture that m is in: the same,
or another from which it is pasted; then nothing is left behind, and E_contrast and E_inpaint are 0. Features are read
at entries of the state, between the cells of their grid. With cos itself in place of S, as the code of the paper has
some terms, an energy has a pole at cos = -1/4.

Source: DragonDiffusion: Enabling Drag-Style Manipulation on Diffusion Models (Mou et al., 2024), section 3.3, whose
energies DiffEditor (Mou et al., 2024) takes over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True, eq=False)
class Region:
    """A region of a picture, and where it goes.

    Args:
        mask: m, (H, W) bool, as high and wide as a state.
        by: d, entries down and to the right.
        size: r > 0, how many times as large it becomes.

    Raises:
        ValueError: no mask, one without an entry, numbers out of range, or a region that leaves the picture.
    """

    mask: Tensor
    by: tuple[float, float] = (0.0, 0.0)
    _: KW_ONLY
    size: float = 1.0

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool or not self.mask.any():
            got = f"{tuple(self.mask.shape)} of {self.mask.dtype}, {int(self.mask.sum())} set"
            raise ValueError(f"the mask of a region is {got}, expected (H, W) bool with an entry")
        if len(self.by) != 2 or not all(is_number(d) and math.isfinite(d) for d in self.by):
            raise ValueError(f"by is {self.by!r}, expected two numbers, entries down and to the right")
        if not (is_number(self.size) and 0 < self.size < math.inf):
            raise ValueError(f"size is {self.size!r}, expected a positive number")
        if not self.target.any():
            raise ValueError(f"a region that goes by {tuple(self.by)} at size {self.size} is no longer in the picture")

    def source(self, places: Tensor) -> Tensor:
        """Which places (k, 2) of the picture that the region is in are shown at places (k, 2)."""
        centre = self.mask.nonzero().double().mean(0).to(places)
        return centre + (places - centre - places.new_tensor(self.by)) / self.size

    @cached_property
    def target(self) -> Tensor:
        """m', (H, W) bool."""
        bounds = torch.tensor(self.mask.shape, device=self.mask.device)
        every = torch.ones_like(self.mask).nonzero()
        at = self.source(every.double()).round().long()
        inside = ((at >= 0) & (at < bounds)).all(1)
        at = at.clamp(min=torch.zeros_like(bounds), max=bounds - 1)
        return (inside & self.mask[at[:, 0], at[:, 1]]).reshape(self.mask.shape)


def moved(mask: Tensor, by: tuple[float, float], size: float = 1.0) -> tuple[Region, ...]:
    """One region that goes elsewhere, or grows, or both."""
    return (Region(mask, by, size=size),)


def dragged(
    shape: Sequence[int], points: Sequence[Sequence[Sequence[float]]], radius: float = 2.0
) -> tuple[Region, ...]:
    """Discs around points of a picture, each of which goes to another point.

    Args:
        shape: (H, W).
        points: pairs of a handle and its target, both (row, column).
        radius: of the discs, in entries.

    Raises:
        ValueError: no pairs, or points that are not in the picture.
    """
    rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") for n in shape)
    found = []
    for pair in points:
        if len(pair) != 2 or not all(len(p) == 2 and 0 <= p[0] < shape[0] and 0 <= p[1] < shape[1] for p in pair):
            raise ValueError(f"{pair!r} is no pair of points (row, column) of a picture {tuple(shape)}")
        (y, x), (to_y, to_x) = pair
        disc = (rows[:, None] - y) ** 2 + (columns - x) ** 2 <= radius**2
        found.append(Region(disc, (to_y - y, to_x - x)))
    if not found:
        raise ValueError("points is empty, expected pairs of a handle and its target")
    return tuple(found)


class Strengths(NamedTuple):
    """w of each energy, as published."""

    edit: float = 4.0
    content: float = 6.0
    contrast: float = 0.2
    inpaint: float = 0.8


PUBLISHED = Strengths()


@final
class Places:
    """Where the energies of some regions are read.

    Args:
        regions: of one picture, all of one shape (H, W).
        pasted: whether they are of another picture than the one that is edited.
    """

    def __init__(self, regions: Sequence[Region], pasted: bool) -> None:
        self.shape = tuple(regions[0].mask.shape)
        self.target = torch.stack([region.target for region in regions]).any(0)
        taken = torch.stack([region.mask for region in regions]).any(0) & (not pasted)
        self.pairs = [(at := region.target.nonzero(), region.source(at.double())) for region in regions]
        self.left, self.rest = (taken & ~self.target).nonzero(), (~(taken | self.target)).nonzero()

    def energies(
        self, now: Sequence[Tensor], before: Sequence[Tensor], source: Sequence[Tensor], weights: Strengths
    ) -> tuple[Tensor, Tensor]:
        """E_edit (n,), and the sum of the others (n,), means over parts of a network.

        Args:
            now: F of each part, (n, C, h, w).
            before, source: F° and F*, likewise.
            weights: w of each.
        """
        edits, others = [], []
        for f, own, theirs in zip(now, before, source, strict=True):
            kept = [_near(self._read(f, to), self._read(theirs, of)).mean(1) for to, of in self.pairs]
            edits.append(sum(weights.edit / (1 + 4 * s) for s in kept) / len(kept))
            others.append(self._others(f, own, weights))
        return torch.stack(edits).mean(0), torch.stack(others).mean(0)

    def _others(self, f: Tensor, own: Tensor, weights: Strengths) -> Tensor:
        """E_content + E_contrast + E_inpaint (n,) of one part."""
        rest, left = len(self.rest) > 0, len(self.left) > 0
        here, around = self._read(f, self.left), self._read(own, self.rest)
        found = f.new_zeros(len(f))
        if rest:
            found = found + weights.content / (1 + 4 * _near(self._read(f, self.rest), around).mean(1))
        if left:
            found = found + weights.contrast * _near(here, self._read(own, self.left)).mean(1)
        if rest and left:
            found = found + weights.inpaint / (1 + 4 * _near(here.mean(2), around.mean(2)))
        return found

    def _read(self, features: Tensor, places: Tensor) -> Tensor:
        """Features (n, C, k) at places (k, 2) of the state, from those of cells (n, C, h, w).

        A cell is 2^j entries wide, as in a U-Net; what the cells cover beyond the state was padded, half on each side.
        """
        at = []
        for axis, (cells, entries) in enumerate(zip(features.shape[2:], self.shape, strict=True)):
            wide = 2 ** max(0, math.ceil(math.log2(entries / cells)))
            padded = (cells * wide - entries) / 2
            at.append((2 * (places[:, axis].to(features) + padded) + 1) / (cells * wide) - 1)
        grid = torch.stack([at[1], at[0]], -1).expand(len(features), 1, -1, -1)
        return F.grid_sample(features, grid, padding_mode="border", align_corners=False)[:, :, 0]


def _near(one: Tensor, other: Tensor) -> Tensor:
    """S of features (n, C, ...) along C."""
    return (1 + F.cosine_similarity(one, other, dim=1)) / 2
