"""TensorBoard, through torch's writer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treesearch.loggers.base import Logger


class TensorBoard(Logger):
    """Event files of TensorBoard, a step an NFE.

    Args:
        folder: where; by default a new one under runs/, as torch names it.
        images: the best so many samples of each task as pictures.

    Raises:
        ValueError: the folder is a file.
    """

    needs = "tensorboard"

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, images: int = 8) -> None:
        super().__init__(images)
        if folder is not None and os.path.exists(folder) and not os.path.isdir(folder):
            raise ValueError(f"TensorBoard({os.fspath(folder)!r}) is a file: name a folder for its event files")
        self.folder = None if folder is None else os.fspath(folder)
        self._writer: Any = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self.folder)
        lines = "\n".join(f"    {key}: {value}" for key, value in settings.items())  # set as code: nothing is markup
        self._writer.add_text("settings", lines, 0)

    def figures(self, found: Mapping[str, float], nfe: int) -> None:
        for name, value in found.items():
            self._writer.add_scalar(f"search/{name}", value, nfe)

    def outcome(self, found: Mapping[str, float], certificate: str, nfe: int) -> None:
        for name, value in found.items():
            self._writer.add_scalar(f"result/{name}", value, nfe)
        self._writer.add_text("certificate", "\n".join(f"    {line}" for line in certificate.splitlines()), nfe)

    def pictures(self, name: str, images: Sequence[Any], captions: Sequence[str], nfe: int) -> None:
        side = [max(image.size[axis] for image in images) for axis in (1, 0)]
        stack = np.full((len(images), *side, 3), 255, np.uint8)
        for i, image in enumerate(images):
            stack[i, : image.height, : image.width] = np.asarray(image.convert("RGB"))
        self._writer.add_images(f"samples/{name}", stack, nfe, dataformats="NHWC")

    def close(self) -> None:
        self._writer.close()
        self._writer = None
