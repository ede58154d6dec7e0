"""Pictures to edit: scenes of 16 x 16 pixels before a backdrop that no prompt states; pairs of a source and a target.

A scene is one of `experiments/interventions/scenes.py` with a light ("red disc, column 2, height 0, light left"), or
"nothing". A backdrop has greys of sky and ground, a cloud, a pebble: what an edit should leave as it is, and what no
prompt brings back. The mask of a pair is exact: the boxes of the object and of the shadow, before and after, where
either changes. A program judges a picture (`judged`), blind to the backdrop; no judge is a network.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.interventions.scenes import (
    COLOURS,
    COLUMNS,
    FLOOR,
    HEIGHTS,
    LIGHTS,
    SHADOW_ROWS,
    SHAPES,
    SIZE,
    Scene,
    atoms,
    background,
    drawn,
)

NOTHING = "nothing"
PEBBLE = 0.4  # grey, lighter than what the judge takes for a shadow


class Backdrop(NamedTuple):
    """What no prompt states."""

    sky: float
    ground: float
    cloud: int
    pebble: int

    @property
    def picture(self) -> Tensor:
        """(3, 16, 16) in [0, 1]."""
        picture = torch.full((3, SIZE, SIZE), self.sky)
        picture[:, FLOOR:] = self.ground
        picture[:, :2, self.cloud : self.cloud + 4] = 1.0
        picture[:, SIZE - 1, self.pebble : self.pebble + 3] = PEBBLE
        return picture


def backdrops(n: int, rng: torch.Generator) -> list[Backdrop]:
    """Random ones."""
    greys = torch.rand(n, 2, generator=rng) * 0.2 + torch.tensor([0.7, 0.5])
    places = torch.stack([torch.randint(SIZE - 3, (n,), generator=rng), torch.randint(SIZE - 2, (n,), generator=rng)])
    return [Backdrop(*grey, *place) for grey, place in zip(greys.tolist(), places.T.tolist(), strict=True)]


def every_scene() -> list[Scene]:
    """All scenes with a light."""
    sizes = (SHAPES, COLOURS, COLUMNS, HEIGHTS, LIGHTS)
    return [Scene(*numbers) for numbers in itertools.product(*(range(len(each)) for each in sizes))]


def cover(scene: Scene | None) -> Tensor:
    """Pixels (16, 16) of object and shadow."""
    if scene is None:
        return torch.zeros(SIZE, SIZE, dtype=torch.bool)
    return (drawn(scene) != background()).any(0)


def painted(scene: Scene | None, backdrop: Backdrop) -> Tensor:
    """The picture (3, 16, 16) in [0, 1] of a scene, or of nothing, before a backdrop."""
    return backdrop.picture if scene is None else torch.where(cover(scene), drawn(scene), backdrop.picture)


def prompt_of(scene: Scene | None) -> str:
    """A scene in words."""
    return NOTHING if scene is None else scene.prompt


def judged(pictures: Tensor, scenes: Sequence[Scene | None]) -> Tensor:
    """Whether pictures (n, 3, 16, 16) in [0, 1] show their scenes, every atom: (n,) bool."""
    return torch.tensor([_shows(p, s) for p, s in zip(pictures.cpu(), scenes, strict=True)], dtype=torch.bool)


def _shows(picture: Tensor, scene: Scene | None) -> bool:
    if scene is None:
        looks = atoms(picture[None], [Scene(0, 0, 0, 0, 0).prompt])[0]
        return not looks[0] and not looks[-2]
    return bool(atoms(picture[None], [scene.prompt]).all())


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An edit that is asked for: one picture, what it shows and what it should show."""

    kind: str
    source: Scene | None
    target: Scene | None
    backdrop: Backdrop

    @property
    def picture(self) -> Tensor:
        """The source, (3, 16, 16) in [0, 1]."""
        return painted(self.source, self.backdrop)

    @property
    def truth(self) -> Tensor:
        """The picture that the edit asks for."""
        return painted(self.target, self.backdrop)

    @property
    def prompts(self) -> tuple[str, str]:
        """Of source and target."""
        return prompt_of(self.source), prompt_of(self.target)

    @property
    def mask(self) -> Tensor:
        """(16, 16) bool, True where the edit may happen."""
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        parts = [(self.source, self.target, part) for part in (_object_box, _shadow_box)]
        for before, after, part in parts:
            if before is None or after is None or part(before) != part(after):
                for scene in (before, after):
                    if scene is not None:
                        mask[part(scene)[:2]] = True
        return mask


def _object_box(scene: Scene) -> tuple[slice, slice, int, int]:
    x, y = COLUMNS[scene.column], HEIGHTS[scene.height]
    return slice(y - 2, y + 3), slice(x - 2, x + 3), scene.shape, scene.colour


def _shadow_box(scene: Scene) -> tuple[slice, slice]:
    return SHADOW_ROWS, slice(scene.place - 1, scene.place + 2)


KINDS = {  # kind: id and name of the type in PIE-Bench
    "shape": (1, "change object"),
    "add": (2, "add object"),
    "delete": (3, "delete object"),
    "light": (4, "change content"),
    "move": (5, "change pose"),
    "colour": (6, "change colour"),
}
_FIELDS = {"shape": "shape", "light": "light", "move": "column", "colour": "colour"}
_SIZES = {"shape": len(SHAPES), "light": len(LIGHTS), "column": len(COLUMNS), "colour": len(COLOURS)}


def pairs(n: int, seed: int) -> list[Pair]:
    """n pairs, the kinds in turn, random otherwise."""
    rng = torch.Generator().manual_seed(1_000_003 * seed + 11)
    scenes, behind = every_scene(), backdrops(n, rng)
    order = torch.randint(len(scenes), (n,), generator=rng).tolist()
    kinds = [tuple(KINDS)[i % len(KINDS)] for i in range(n)]
    return [_pair(kind, scenes[i], back, rng) for kind, i, back in zip(kinds, order, behind, strict=True)]


def _pair(kind: str, scene: Scene, backdrop: Backdrop, rng: torch.Generator) -> Pair:
    if kind in _FIELDS:
        name = _FIELDS[kind]
        shift = int(torch.randint(1, _SIZES[name], (), generator=rng))
        target = scene._replace(**{name: (getattr(scene, name) + shift) % _SIZES[name]})
        return Pair(kind=kind, source=scene, target=target, backdrop=backdrop)
    ends = (None, scene) if kind == "add" else (scene, None)
    return Pair(kind=kind, source=ends[0], target=ends[1], backdrop=backdrop)
