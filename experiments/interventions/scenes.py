"""Scenes of 16 x 16 pixels with a cause and its effect: an object in the air, a light, and the shadow on the floor.

    shadow's column = object's column + d (1 + height),     d = 1, 0, -1: light from the left, above, the right

A prompt such as "red disc, column 2, height 0, light left" states the object and the light; its shadow is not stated:
it follows from them, in two hops. "..., shadow 9" states it too. What is not in the prompt is left open. A program
checks each atom of a picture (`atoms`): what is stated, and what it causes. No judge is a network.

A third of the combinations of light, column and height (`held_out`) is in no picture that the network is trained on;
any two of the three are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from treesearch.backends.models.unet2d import EMBEDDING, Block, positions

SIZE = 16
SHAPES = ("square", "disc", "cross")
COLOURS = {"red": (0.9, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 0.95), "yellow": (0.95, 0.9, 0.1)}
COLUMNS, HEIGHTS = (4, 6, 8, 10), (9, 7, 5)  # x and y of centres
LIGHTS = {"left": 1, "above": 0, "right": -1}
FLOOR, SHADOW_ROWS = 12, slice(13, 15)
SKY, GROUND, SHADOW = 0.9, 0.6, 0.1  # grey
STATED = {"object": ("object", "colour", "shape", "column", "height"), "caused": ("shadow", "place")}
ATOMS = (*STATED["object"], *STATED["caused"])
WIDTH = len(SHAPES) + len(COLOURS) + len(COLUMNS) + len(HEIGHTS) + len(LIGHTS) + SIZE + 1


class Scene(NamedTuple):
    """What a scene is, by number; light and shadow are None where a prompt does not state them."""

    shape: int
    colour: int
    column: int
    height: int
    light: int | None = None
    shadow: int | None = None

    @property
    def place(self) -> int:
        """The column of the shadow that the light throws."""
        return COLUMNS[self.column] + tuple(LIGHTS.values())[self.light or 0] * (1 + self.height)

    @property
    def held_out(self) -> bool:
        """Whether no training picture shows this light, column and height."""
        return ((self.light or 0) + self.column + self.height) % 3 == 0

    @property
    def prompt(self) -> str:
        """The scene in words."""
        words = [
            f"{tuple(COLOURS)[self.colour]} {SHAPES[self.shape]}",
            f"column {self.column}",
            f"height {self.height}",
        ]
        if self.light is not None:
            words.append(f"light {tuple(LIGHTS)[self.light]}")
        if self.shadow is not None:
            words.append(f"shadow {self.shadow}")
        return ", ".join(words)

    @property
    def expanded(self) -> str:
        """The prompt with the shadow that follows."""
        return self._replace(shadow=self.place).prompt

    @property
    def unlit(self) -> str:
        """The prompt without the light."""
        return self._replace(light=None).prompt


def elsewhere() -> list[Scene]:
    """All scenes without a light whose shadow is stated, somewhere: where no scene that is held out has it."""
    kept = {(*scene[:4], scene.place) for scene in scenes(held_out=True)}
    every = itertools.product(range(3), range(4), range(4), range(3), range(1, SIZE - 1))
    return [Scene(*numbers[:4], shadow=numbers[4]) for numbers in every if numbers not in kept]


def scenes(held_out: bool) -> list[Scene]:
    """All scenes with a light, of recombinations that are held out or not."""
    every = itertools.product(range(3), range(4), range(4), range(3), range(3))
    return [scene for scene in (Scene(*numbers) for numbers in every) if scene.held_out == held_out]


def parsed(prompt: str) -> Scene:
    """The scene that a prompt states.

    Raises:
        ValueError: no such prompt.
    """
    try:
        looks, *rest = prompt.split(", ")
        colour, shape = looks.split(" ")
        told = dict(part.split(" ") for part in rest)
        light = tuple(LIGHTS).index(told["light"]) if "light" in told else None
        shadow = int(told["shadow"]) if "shadow" in told else None
        found = Scene(SHAPES.index(shape), tuple(COLOURS).index(colour), int(told["column"]), int(told["height"]),
                      light, shadow)  # fmt: skip
    except (ValueError, KeyError) as error:
        raise ValueError(f"{prompt!r} is no scene, such as {Scene(0, 0, 2, 0, 0).prompt!r}") from error
    return found


def condition(prompts: Sequence[str]) -> Tensor:
    """Rows (n, WIDTH) of prompts: an entry is 1 where it is stated; those of "" are 0 throughout."""
    return torch.stack([_row(prompt) for prompt in prompts])


def _row(prompt: str) -> Tensor:
    row = torch.zeros(WIDTH, device="cpu")
    if prompt:
        sizes = (len(SHAPES), len(COLOURS), len(COLUMNS), len(HEIGHTS), len(LIGHTS), SIZE)
        starts = itertools.accumulate(sizes, initial=0)
        row[[start + number for start, number in zip(starts, parsed(prompt), strict=False) if number is not None]] = 1
        row[-1] = 1
    return row


def template(shape: int) -> Tensor:
    """A shape's pixels (5, 5), bool."""
    y, x = torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="ij")
    return [(x.abs() <= 2) & (y.abs() <= 2), x**2 + y**2 <= 5, (x == 0) | (y == 0)][shape]


def background() -> Tensor:
    """A picture (3, 16, 16) of nothing."""
    picture = torch.full((3, SIZE, SIZE), SKY)
    picture[:, FLOOR:] = GROUND
    return picture


def drawn(scene: Scene) -> Tensor:
    """The picture (3, 16, 16) in [0, 1] of a scene with a light, or with its shadow stated."""
    picture, place = background(), scene.place if scene.shadow is None else scene.shadow
    picture[:, SHADOW_ROWS, place - 1 : place + 2] = SHADOW
    x, y = COLUMNS[scene.column], HEIGHTS[scene.height]
    part = picture[:, y - 2 : y + 3, x - 2 : x + 3]
    colour = torch.tensor(tuple(COLOURS.values())[scene.colour])[:, None, None]
    picture[:, y - 2 : y + 3, x - 2 : x + 3] = torch.where(template(scene.shape), colour, part)
    return picture


def atoms(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Which atoms (n, 7) of `ATOMS` are true, 0 or 1, of pictures (n, 3, 16, 16) in [0, 1] of prompts with a light."""
    return torch.stack([_atoms(picture, parsed(prompt)) for picture, prompt in zip(pictures, prompts, strict=True)])


def _atoms(picture: Tensor, scene: Scene) -> Tensor:
    truth = drawn(scene)
    mine, theirs = _coloured(picture), _coloured(truth)
    if mine.sum() < 4:
        looks = [False] * 5
    else:
        palette = torch.tensor(tuple(COLOURS.values()))
        colour = int((picture[:, mine].mean(1) - palette).norm(dim=1).argmin())
        (y, x), (v, u) = _centre(mine), _centre(theirs)
        shape = max(range(3), key=lambda s: _overlap(mine, _at(template(s), y, x)))
        looks = [True, colour == scene.colour, shape == scene.shape, abs(x - u) < 1, abs(y - v) < 1]
    dark, shade = _dark(picture), _dark(truth)
    caused = [bool(3 <= dark.sum() <= 12), _overlap(dark, shade) > 0.6]
    return torch.tensor([*looks, *caused], dtype=torch.float32)


def _coloured(picture: Tensor) -> Tensor:
    return picture.amax(0) - picture.amin(0) > 0.35


def _dark(picture: Tensor) -> Tensor:
    dark = picture.amax(0) < (GROUND + SHADOW) / 2
    dark[:FLOOR] = False
    return dark


def _centre(mask: Tensor) -> tuple[float, float]:
    y, x = mask.nonzero().float().mean(0).tolist()
    return y, x


def _at(shape: Tensor, y: float, x: float) -> Tensor:
    """A shape on an empty picture, around a centre."""
    mask = torch.zeros(SIZE + 8, SIZE + 8, dtype=torch.bool)
    i, j = round(y) + 2, round(x) + 2
    mask[i : i + 5, j : j + 5] = shape
    return mask[4 : 4 + SIZE, 4 : 4 + SIZE]


def _overlap(one: Tensor, other: Tensor) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


@dataclass(frozen=True)
class AtomReward:
    """The share of atoms of its prompt that a picture has, a half from those stated, a half from those caused."""

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        found, stated = atoms(pictures.cpu(), prompts), len(STATED["object"])
        return (found[:, :stated].mean(1) + found[:, stated:].mean(1)) / 2


class SceneNetwork(nn.Module):
    """v of noisy scenes, told time and prompt: two resolutions on the space-to-depth view, with the pixels' places."""

    places: Tensor

    def __init__(self, wide: int = 32, deep: int = 64) -> None:
        super().__init__()
        line = torch.linspace(-1, 1, SIZE // 2, device="cpu")
        self.register_buffer("places", torch.stack(torch.meshgrid(line, line, indexing="ij")), persistent=False)
        self.time = nn.Sequential(nn.Linear(EMBEDDING // 2, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.told = nn.Sequential(nn.Linear(WIDTH, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.first = nn.Conv2d(12 + 2, wide, 3, padding=1)
        self.down = Block(wide, wide)
        self.shrink = nn.Conv2d(wide, deep, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(deep, deep), Block(deep, deep)])
        self.grow = nn.Conv2d(deep, wide, 3, padding=1)
        self.up = Block(2 * wide, wide)
        self.norm, self.last = nn.GroupNorm(8, wide), nn.Conv2d(wide, 12, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, told: Tensor) -> Tensor:
        """v (n, 3, 16, 16) of x at timesteps (n,) in 0..999 under conditions (n, WIDTH)."""
        e = nn.functional.silu(self.time(positions(timestep, EMBEDDING // 2).to(x.dtype)) + self.told(told))
        places = self.places.to(x.dtype).expand(len(x), -1, -1, -1)
        wide = self.down(self.first(torch.cat([nn.functional.pixel_unshuffle(x, 2), places], 1)), e)
        h = self.shrink(wide)
        for block in self.middle:
            h = block(h, e)
        h = self.grow(nn.functional.interpolate(h, scale_factor=2.0))
        h = self.up(torch.cat([h, wide], 1), e)
        return nn.functional.pixel_shuffle(self.last(nn.functional.silu(self.norm(h))), 2)
