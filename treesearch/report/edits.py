"""What an edit leaves beside the outputs of its search: a sheet and figures of what was kept.

outputs/edit.png      the picture, the kernel's own reconstruction of it without noise, and the best edits
outputs/edit.json     for each of these: reward, and PSNR and SSIM to the picture where the mask keeps it
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from treesearch.pictures import media
from treesearch.pictures.sheets import Block, Cell, draw_sheet, thumbnail
from treesearch.results.result import TaskResult
from treesearch.rewards.images.fidelity import psnr, ssim
from treesearch.runs.files import subfolder, write_json

SHOWN = 6


class Kept(NamedTuple):
    """How much of a picture is left where it is kept.

    Args:
        reward: of the edit, None of a picture that no search scored.
        psnr: in dB, None where nothing changed.
        ssim: 1 where nothing changed.
    """

    reward: float | None
    psnr: float | None
    ssim: float


def write_edit(
    task: TaskResult, folder: Path, *, picture: Any, again: Any | None, mask: Tensor | None, best: int = SHOWN
) -> dict[str, Any]:
    """Write the sheet and the figures of an edit.

    Args:
        task: of its search.
        folder: of its run.
        picture: that was edited, as samples are.
        again: its reconstruction; None where the chain began at fresh noise.
        mask: (h, w) bool, what was kept; None compares all of it.
        best: edits that are shown.

    Returns:
        The figures, as in edit.json.
    """
    source = _pixels(picture)
    shown = [("source", picture, None)] + ([] if again is None else [("reconstruction", again, None)])
    rows = np.argsort(-task.rewards.numpy(), kind="stable")[:best].tolist()
    edits = [(f"edit {i}", task.pick(np.array([row]))[0], float(task.rewards[row])) for i, row in enumerate(rows, 1)]
    every = [(name, image, _kept(source, _pixels(image), mask, reward)) for name, image, reward in shown + edits]
    outputs = subfolder(folder / "outputs")
    draw_sheet(
        [Block("source and edits, PSNR of what is kept", [_cell(*each) for each in every])], outputs / "edit.png"
    )
    found = {name: kept._asdict() for name, _, kept in every[1:]}
    write_json(outputs / "edit.json", found)
    return found


def _cell(name: str, image: Any, kept: Kept) -> Cell:
    reward = () if kept.reward is None else (f"{kept.reward:.4g}",)
    decibels = "same" if kept.psnr is None else f"{kept.psnr:.1f} dB"
    lines = () if name == "source" else (*reward, decibels)
    return Cell(thumbnail(media.image_of(image)), (name, *lines))


def _kept(source: Tensor, image: Tensor, mask: Tensor | None, reward: float | None) -> Kept:
    decibels = float(psnr(image[None], source, mask))
    return Kept(reward, decibels if math.isfinite(decibels) else None, float(ssim(image[None], source, mask)))


def _pixels(image: Any) -> Tensor:
    """A picture as (c, h, w) float64 in [0, 1]."""
    pixels = np.atleast_3d(np.asarray(media.image_of(image).convert("RGB"), dtype=np.float64)) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)
