"""Things in pictures that are to go elsewhere: sixteen cases, the kernels that take them there, and who judges.

    scenes      an object of a scene (`experiments.interventions.scenes`), whose network draws objects anywhere
    digits      a digit of the shipped model, which knows digits in the middle alone

A case has arrived where the centroid of what is coloured, or of the ink, is within one pixel of where it should be. The
judge, which no search asks, looks at the whole: whether what is seen overlaps what should be by more than six tenths of
their union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.interventions.scenes import Scene, SceneNetwork, condition, drawn
from treesearch.backends import mnist
from treesearch.backends.base import Cond
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.inversion import invert
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.guidance.diffeditor import DiffEditor
from treesearch.backends.guidance.regions import dragged, moved
from treesearch.backends.models.mnist import cosine_alphas_cumprod, from_images, to_images
from treesearch.backends.roots import Regional, Rooted

WEIGHTS = Path(__file__).parents[1] / "weights/scenes.safetensors"
BACKGROUND = 10.0  # a unit of squared background change, in pixels of distance
ABSENT = 8.0  # the distance of what is not seen
SCENES = (
    (Scene(0, 1, 0, 0, 1), (0, 3)),
    (Scene(1, 0, 3, 1, 1), (0, -4)),
    (Scene(2, 2, 1, 2, 1), (3, 0)),
    (Scene(0, 3, 2, 0, 1), (-3, 2)),
    (Scene(1, 2, 1, 1, 1), (0, 2)),
    (Scene(2, 0, 3, 2, 1), (2, -3)),
    (Scene(1, 3, 0, 2, 1), (2, 2)),
    (Scene(2, 1, 2, 1, 1), (-2, -3)),
)
STEPS = ((0, 3), (0, -3), (3, 0), (-3, 0), (2, 2), (-2, 2), (2, -2), (-2, -2))  # of digits
PARTS = {"scenes": ("middle.1", "up"), "digits": ("up_blocks.1", "up_blocks.2")}
SCALE = 400.0  # κ, ten times as published: chosen on four other moves of scenes and four other digits
BEDS = ("scenes", "digits")
CASES = range(8)


@cache
def plain(bed: str, steps: int) -> Any:
    """The kernel without noise."""
    if bed == "digits":
        return mnist(num_steps=steps, eta=0.0)
    network = SceneNetwork()
    network.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS).items()})
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(), steps, prediction="v")
    return DiffusionKernel(network.eval().requires_grad_(False), state_shape=(3, 16, 16), schedule=schedule, eta=0.0,
                           clip_sample=1.0, condition=condition, decode=to_images, sample_range=(0.0, 1.0),
                           name="scenes")  # fmt: skip


@cache
def digits() -> Tensor:
    """Eight pictures (8, 1, 28, 28) of the shipped model."""
    kernel = plain("digits", 25)
    x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    for t in range(25, 0, -1):
        x = kernel.transition(x, torch.full((8,), t)).mean
    return to_images(x)


@dataclass(frozen=True)
class Case:
    """One thing of one picture that is to go elsewhere."""

    bed: str
    number: int

    @cached_property
    def picture(self) -> Tensor:
        """(C, H, W) in [0, 1]."""
        return drawn(SCENES[self.number][0]) if self.bed == "scenes" else digits()[self.number]

    @property
    def by(self) -> tuple[int, int]:
        """Rows down and columns to the right."""
        return SCENES[self.number][1] if self.bed == "scenes" else STEPS[self.number]

    @cached_property
    def mask(self) -> Tensor:
        """What is to go (H, W)."""
        return self._seen(self.picture)

    @cached_property
    def region(self) -> Any:
        """Where it goes."""
        return moved(self.mask, self.by)[0]

    @cached_property
    def both(self) -> Tensor:
        """Where it is and where it goes (H, W)."""
        return self.mask | self.region.target

    @property
    def prompts(self) -> list[str] | None:
        """Nothing is said of a scene."""
        return [""] if self.bed == "scenes" else None

    def cond(self, steps: int) -> Cond:
        """Conditioning of one row."""
        return plain(self.bed, steps).encode(self.prompts) if self.prompts else None

    def path(self, steps: int) -> Tensor:
        """The inverted picture (T + 1, 1, C, H, W)."""
        return _path(self, steps)

    def away(self, pictures: Tensor) -> Tensor:
        """Pixels (n,) between where it is and where it should be."""
        return torch.stack([self._away(picture) for picture in pictures])

    def background(self, pictures: Tensor) -> Tensor:
        """Mean squared change (n,) where it neither was nor goes."""
        return (pictures - self.picture)[:, :, ~self.both].square().flatten(1).mean(1)

    def overlap(self, pictures: Tensor) -> Tensor:
        """What is seen and what should be, over their union (n,)."""
        seen = torch.stack([self._seen(picture) for picture in pictures])
        both, either = seen & self.region.target, seen | self.region.target
        return both.flatten(1).sum(1) / either.flatten(1).sum(1)

    def reward(self, pictures: Tensor) -> Tensor:
        """What searches are for."""
        return -self.away(pictures) - BACKGROUND * self.background(pictures)

    def _seen(self, picture: Tensor) -> Tensor:
        return picture.amax(0) - picture.amin(0) > 0.35 if self.bed == "scenes" else picture[0] > 0.3

    def _centre(self, picture: Tensor) -> Tensor:
        weight = self._seen(picture).float() if self.bed == "scenes" else picture[0]
        axes = [torch.arange(n, dtype=torch.float32) for n in weight.shape]
        total = weight.sum()
        return torch.stack([(weight.sum(1) * axes[0]).sum() / total, (weight.sum(0) * axes[1]).sum() / total])

    def _away(self, picture: Tensor) -> Tensor:
        if not self._seen(picture).any():
            return torch.tensor(ABSENT)
        return (self._centre(picture) - self._centre(self.picture) - torch.tensor(self.by)).norm()


@cache
def _path(case: Case, steps: int) -> Tensor:
    return invert(plain(case.bed, steps), from_images(case.picture)[None], cond=case.cond(steps), iterations=3)


def noisy(case: Case, steps: int, published: bool, everywhere: bool = False) -> Rooted:
    """The chain from the picture, with noise as the paper has it (η = .4, a fifth of the steps), or with more."""
    inside = torch.ones_like(case.picture, dtype=torch.bool)
    mask = inside if everywhere else case.both & inside
    levels = (round(0.6 * steps) + 1, round(0.8 * steps) - 1) if published else None
    regional = Regional(plain(case.bed, steps), mask, eta=0.4 if published else 1.0, levels=levels)
    return Rooted(regional, case.path(steps))


def guided(case: Case, steps: int, weights: bool, everywhere: bool = False, **settings: Any) -> DiffEditor:
    """The chain whose steps move it: by the published rule, or as a proposal with exact weights at most levels."""
    window = None if not weights else (steps // 5, steps)
    words: dict[str, Any] = {"parts": PARTS[case.bed], "source": case.prompts, "scale": SCALE, "window": window}
    regions = settings.pop("regions", (case.region,))
    inner = noisy(case, steps, not weights, everywhere)
    return DiffEditor(inner, case.path(steps), regions, weights=weights, **words | settings)


def points(case: Case) -> Sequence[Any]:
    """A disc about its centre that goes where the whole should."""
    y, x = case._centre(case.picture).tolist()
    return dragged(case.mask.shape, [((y, x), (y + case.by[0], x + case.by[1]))], radius=2.5)
