"""A task's samples, decoded one at a time; thumbnails of those that can be seen are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treesearch.pictures import media
from treesearch.pictures.sheets import Cell, thumbnail

if TYPE_CHECKING:
    from treesearch.results.result import TaskResult


class Samples:
    """Samples of a task.

    Args:
        task: whose they are.
        rate: samples a second where they are audio, else None.
    """

    def __init__(self, task: TaskResult, rate: int | None = None) -> None:
        self.task, self.rate = task, rate
        self._small: dict[int, Any] = {}

    def ranked(self, k: int) -> NDArray[np.int64]:
        """Rows of the k samples of highest reward, best first."""
        return np.argsort(-self.task.rewards.numpy(), kind="stable")[:k]

    def decode(self, row: int) -> tuple[str, Any]:
        """A sample and its kind."""
        sample = self.task.pick(np.array([row]))[0]
        kind = media.kind_of(sample, self.rate)
        if kind in ("image", "video") and row not in self._small:
            self._small[row] = thumbnail(media.image_of(sample))
        return kind, sample

    def thumbnail(self, row: int) -> Any:
        """A small Pillow image of a sample; None where it cannot be seen."""
        if row not in self._small:
            self.decode(row)
        return self._small.get(row)

    def cells(self, rows: NDArray[np.int64], *, prompted: bool = False) -> list[Cell]:
        """Thumbnails of some samples with their rewards; none where they cannot be seen."""
        cells = []
        for row in rows.tolist():
            if (small := self.thumbnail(row)) is None:
                return []
            told = f"{float(self.task.rewards[row]):.4g}"
            cells.append(Cell(small, (told, *([f"{self.task.prompt}"] if prompted else []))))
        return cells
