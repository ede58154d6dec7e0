"""Find directions in a network's h-space, and write them with a picture of what they do.

    python -m experiments.interventions.directions pca --kernel "mnist(num_steps=25)" --k 3 --out pcs.safetensors
    python -m experiments.interventions.directions supervised --labels slant size --apart --out mine.safetensors
    python -m experiments.interventions.directions jacobian --t 12 --box 0 14 14 28 --out corner.safetensors

The picture, a PNG beside the file, has a line for each direction and strength, and a column for each of some samples
of the same noise. `hspace(KERNEL, 'mine.safetensors')` then makes settings of them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.interventions.attributes import ATTRIBUTES
from experiments.shared.sweep import command_line
from treesearch.backends.base import describe
from treesearch.backends.interventions.base import CHOSEN
from treesearch.backends.interventions.directions import Directions
from treesearch.backends.interventions.hspace import hspace
from treesearch.backends.interventions.jacobian import jacobian
from treesearch.backends.interventions.rollouts import Walks, extremes, pca, rollouts, supervised
from treesearch.registry import registry

SHOWN = 10  # samples of the picture


@dataclass(frozen=True, kw_only=True)
class Find(ABC):
    """Find directions.

    Args:
        out: the file; its picture lies beside it.
    """

    out: Path
    """the file; a picture is written beside it"""
    kernel: str = "mnist(num_steps=25)"
    """as for treesearch run, unconditional"""
    part: str = "mid_block"
    """the end of a part's name"""
    levels: tuple[int, ...] = ()
    """t that they are given at, linear between; all by default"""
    rollouts: int = 1000
    """how many"""
    seed: int = 0
    """of the rollouts, or of the state"""
    alphas: tuple[float, ...] = (-6.0, -3.0, 3.0, 6.0)
    """strengths of the picture"""

    def run(self) -> int:
        torch.set_num_threads(1)
        kernel = registry.kernel(self.kernel)
        found = self.find(kernel)
        found.save(self.out)
        draw(kernel, found, self.alphas, self.out.with_suffix(".png"))
        print(f"{self.out}: {', '.join(found.card.names)} in {found.card.part}, α = 1 is {found.card.unit}")
        return 0

    @abstractmethod
    def find(self, kernel: Any) -> Directions:
        """The directions of a kernel."""

    def walks(self, kernel: Any) -> Walks:
        """Rollouts of it."""
        return rollouts(kernel, self.rollouts, self.seed, self.part, self.levels or None)


@dataclass(frozen=True, kw_only=True)
class Pca(Find):
    """Principal components of h at each level."""

    k: int = 3
    """how many"""

    def find(self, kernel: Any) -> Directions:
        return pca(self.walks(kernel), self.k)


@dataclass(frozen=True, kw_only=True)
class Supervised(Find):
    """From the lowest to the highest of rollouts by attributes of their pixels or by rewards."""

    labels: tuple[str, ...] = tuple(ATTRIBUTES)
    """slant, thickness, size, or rewards as for treesearch run"""
    share: float = 0.25
    """of the rollouts that are each end"""
    apart: bool = False
    """each without its share in the others"""

    def find(self, kernel: Any) -> Directions:
        walks = self.walks(kernel)
        samples = kernel.decode(walks.x0)
        scores = {label: ATTRIBUTES.get(label) or registry.reward(label) for label in self.labels}
        groups = {label: extremes(score(samples), self.share) for label, score in scores.items()}
        return supervised(walks, groups, apart=self.apart)


@dataclass(frozen=True, kw_only=True)
class Jacobian(Find):
    """Singular vectors of the noise estimate's Jacobian at one state of a rollout."""

    t: int
    """its level"""
    k: int = 3
    """how many"""
    box: tuple[int, int, int, int] | None = None
    """of the state: top, left, bottom, right; what counts, all by default"""
    alphas: tuple[float, ...] = (-60.0, -30.0, 30.0, 60.0)
    """strengths of the picture, in unit length"""

    def find(self, kernel: Any) -> Directions:
        x = state_at(kernel, self.t, 1, self.seed)
        mask = None if self.box is None else boxed(x.shape[1:], self.box)
        return jacobian(kernel, x, self.t, self.k, mask, part=self.part)


def boxed(shape: Sequence[int], box: tuple[int, int, int, int]) -> Tensor:
    """Ones in a box (top, left, bottom, right) of states of this shape.

    Raises:
        ValueError: an empty one.
    """
    top, left, bottom, right = box
    mask = torch.zeros(tuple(shape))
    mask[..., top:bottom, left:right] = 1.0
    if not mask.any():
        raise ValueError(f"the box {box} is empty, expected top < bottom and left < right within {tuple(shape)}")
    return mask


@torch.no_grad()
def state_at(kernel: Any, t: int, n: int, seed: int) -> Tensor:
    """x_t (n, *state) of rollouts.

    Raises:
        ValueError: no such level.
    """
    steps, shape = int(kernel.num_steps), describe(kernel, identify=False).noise_shape
    if not 1 <= t <= steps:
        raise ValueError(f"t is {t}, expected 1..T = {steps}")
    rng = torch.Generator().manual_seed(seed)
    x = kernel.prior(torch.randn(n, *shape, generator=rng))
    for level in range(steps, t, -1):
        x = kernel.transition(x, torch.full((n,), level)).sample(torch.randn(n, *shape, generator=rng))
    return x


@torch.no_grad()
def carried(kernel: Any, x: Tensor, t: int, noise: Tensor, setting: Tensor | int) -> Tensor:
    """x_0 (n, *state) from x_t (n, *state) by the noise (T + 1, n, ...) of each level, under settings (n,)."""
    rows = torch.as_tensor(setting).expand(len(x))[:, None]
    for level in range(t, 0, -1):
        law = kernel.transition(x, torch.full((len(x),), level), {CHOSEN: rows})
        x = law.sample(noise[level - 1])
    return x


def noises(kernel: Any, n: int, seed: int) -> Tensor:
    """Noise of each level (T + 1, n, ...)."""
    shape = describe(kernel, identify=False).noise_shape
    return torch.randn(int(kernel.num_steps) + 1, n, *shape, generator=torch.Generator().manual_seed(seed))


def draw(kernel: Any, found: Directions, alphas: tuple[float, ...], path: Path) -> None:
    """The picture: a line a setting, a column a sample."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    moved, steps = hspace(kernel, found, alphas), int(kernel.num_steps)
    noise = noises(kernel, SHOWN, 1)
    x = kernel.prior(noise[steps])
    names = ["none", *moved.intervention.settings]
    lines = [kernel.decode(carried(moved, x, steps, noise, setting)) for setting in range(len(names))]
    figure, axes = plt.subplots(len(names), 1, figsize=(0.5 * SHOWN + 1.4, 0.5 * len(names)), squeeze=False)
    for (axis,), name, images in zip(axes, names, lines, strict=True):
        axis.imshow(torch.cat(list(images[:, 0]), 1).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.subplots_adjust(1.4 / (0.5 * SHOWN + 1.4), 0.01, 0.99, 0.99, hspace=0.05)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    commands = {"pca": Pca, "supervised": Supervised, "jacobian": Jacobian}
    return command_line("directions", commands, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
