"""Contact sheets: thumbnails with captions on one image of at most 2,048 pixels a side, whatever the samples' size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treesearch.runs.files import replacing
from treesearch.text import plain

SIDE = 2_048  # pixels of a sheet, at most
COLUMNS = 8
GAP, LINE, SIZE = 4, 16, 13  # pixels between cells, of a line of text, of its letters
SMALL, LARGE = 112, SIDE // COLUMNS - GAP - 1  # sides of thumbnails: small images are enlarged, large ones shrunk
NARROW = 420  # a sheet's smallest width, for the words on it
INK, PALE = (30, 30, 30), (110, 110, 110)


class Cell(NamedTuple):
    """A thumbnail and the lines below it."""

    picture: Any
    lines: tuple[str, ...]


class Block(NamedTuple):
    """Cells under a heading."""

    heading: str
    cells: Sequence[Cell]


def thumbnail(image: Any) -> Any:
    """A Pillow image at the size of a sheet's cell: large ones shrunk, small ones with every pixel as a square."""
    from PIL import Image

    side = max(image.size)
    if side > LARGE:
        small = image.copy()
        small.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
        return small
    times = max(SMALL // side, 1)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def draw_sheet(blocks: Sequence[Block], path: str | Path, title: str = "") -> Path:
    """Write the sheet as a PNG."""
    drawn = sheet(blocks, title)
    with replacing(path) as scratch:
        drawn.save(scratch, format="PNG")
    return Path(path)


def sheet(blocks: Sequence[Block], title: str = "") -> Any:
    """A Pillow image of blocks of cells, as many as there is room for.

    Raises:
        ValueError: there are no cells.
    """
    from PIL import Image, ImageDraw

    cells = [cell for block in blocks for cell in block.cells]
    if not cells:
        raise ValueError("a sheet of nothing: give at least one cell")
    wide, high = (max(cell.picture.size[axis] for cell in cells) + GAP for axis in (0, 1))
    high += LINE * max(len(cell.lines) for cell in cells)
    head = LINE * bool(title) + GAP
    height = head + sum(LINE + GAP + high * -(-len(block.cells) // COLUMNS) for block in blocks)
    width = GAP + wide * min(COLUMNS, max(len(block.cells) for block in blocks))
    page = Image.new("RGB", (max(width, NARROW), min(height, SIDE)), "white")
    pen = _Pen(ImageDraw.Draw(page))
    pen.write((GAP, 2), title, page.width - 2 * GAP, INK)
    top = head
    for block in blocks:
        pen.write((GAP, top), block.heading, page.width - 2 * GAP, PALE)
        top += LINE + GAP
        for i, cell in enumerate(block.cells):
            x, y = GAP + wide * (i % COLUMNS), top + high * (i // COLUMNS)
            page.paste(cell.picture, (x, y))
            for j, line in enumerate(cell.lines):
                pen.write((x, y + cell.picture.height + LINE * j), line, wide - GAP, INK if j == 0 else PALE)
        top += high * -(-len(block.cells) // COLUMNS)
    return page


class _Pen:
    """Writes lines of text in Pillow's own font."""

    def __init__(self, draw: Any) -> None:
        from PIL import ImageFont

        self.draw, self.font = draw, ImageFont.load_default(SIZE)

    def write(self, at: tuple[int, int], text: str, width: int, ink: tuple[int, int, int]) -> None:
        """One line, cut to `width` pixels."""
        shown = plain(text)[: width // 2]
        while shown and self.font.getlength(shown) > width:
            shown = shown[:-2] + "…" if len(shown) > 2 else ""
        self.draw.text(at, shown, fill=ink, font=self.font)
