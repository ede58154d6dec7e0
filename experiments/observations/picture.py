"""The picture of `make demo-restore`: a row a problem; truth, observation, draws, mean and spread of each sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from experiments.observations.samplers import Sampler

UNSEEN = (0.80, 0.88, 0.97)  # of pixels that an observation says nothing of
PUBLISHED, SEARCHED = 2, 4  # draws that are shown
GAP = 2  # pixels between tiles
CAPTION = (
    "Published rules pull and do not weigh: their draws are a law of their own. Searches weigh theirs for p(x | y) and "
    "know log p(y). PSNR, in dB, is of the mean of all draws; red is the standard deviation of a pixel."
)


def tile(image: Tensor, low: float = 0.0) -> NDArray[np.float64]:
    """Dark ink on white, (28, 28, 3); NaN is unseen."""
    grey = 1 - np.clip((image.double().numpy() - low) / (1 - low), 0, 1)
    return np.where(np.isnan(grey)[..., None], UNSEEN, grey[..., None])


def strip(*groups: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Groups of tiles side by side, a wider gap between groups."""
    gap, parts = np.ones((28, GAP, 3)), []
    for tiles in groups:
        parts += [part for each in tiles for part in (each, gap)] + [gap, gap]
    return np.concatenate(parts[:-3], 1)


def heat(spread: Tensor) -> NDArray[np.float64]:
    """The spread of a posterior, white where it is sure and red where it is not."""
    share = np.clip(spread.double().numpy() / 0.5, 0, 1)[..., None]
    return 1 - share * (1 - np.array([0.75, 0.1, 0.1]))


def draw(
    rows: Sequence[tuple[str, Tensor, Tensor, Mapping[str, Any]]], samplers: Mapping[str, Sampler], path: Path
) -> None:
    """Write the picture.

    Args:
        rows: of each problem its title, truth and observation (28, 28) in [-1, 1], and what each sampler made of it.
        samplers: by name, in order.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    counts = [1, 1] + [SEARCHED + 2 if each.exact else PUBLISHED for each in samplers.values()]
    figure, axes = plt.subplots(
        len(rows), len(counts), figsize=(0.56 * sum(counts) + 0.4, 1.02 * len(rows) + 0.75), squeeze=False,
        gridspec_kw={"width_ratios": counts, "wspace": 0.06, "hspace": 0.42},
    )  # fmt: skip
    figure.subplots_adjust(0.01, 0.085, 0.99, 1 - 0.62 / (1.02 * len(rows) + 0.75))
    for line, (title, truth, seen, found) in zip(axes, rows, strict=True):
        strips = [tile(truth, -1), tile(seen, -1)]
        notes = ["", ""]
        for name, sampler in samplers.items():
            shown = found[name]
            strips.append(_strip(shown, sampler))
            notes.append(_note(shown.row))
        for ax, image, note in zip(line, strips, notes, strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set_xlabel(note, fontsize=7, labelpad=2)
            ax.set_xticks([])
            ax.set_yticks([])
            for side in ax.spines.values():
                side.set_color("0.8")
        line[0].text(0, -2.5, title, fontsize=8.5, fontweight="bold")
    heads = ["truth", "observed", *(_head(each) for each in samplers.values())]
    for ax, head in zip(axes[0], heads, strict=True):
        ax.annotate(head, (0.5, 1.32), xycoords="axes fraction", ha="center", va="bottom", fontsize=8)
    figure.text(0.5, 0.012, CAPTION, ha="center", fontsize=7.5, color="0.35")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(96)
    small.save(path, optimize=True)


def _strip(shown: Any, sampler: Sampler) -> NDArray[np.float64]:
    if not sampler.exact:
        return strip([tile(image) for image in shown.draws[:PUBLISHED]])
    return strip([tile(image) for image in shown.draws[:SEARCHED]], [tile(shown.mean), heat(shown.spread)])


def _head(sampler: Sampler) -> str:
    if not sampler.exact:
        return sampler.title.replace(", ", ",\n")
    return f"{sampler.title.split(',')[0]}, with weights\n{SEARCHED} draws | mean, spread"


def _note(row: Mapping[str, Any]) -> str:
    if "ess" not in row:
        return f"PSNR {row['psnr']:.1f}"
    roots = f"{row['roots']} root{'s' * (row['roots'] > 1)}"
    return f"PSNR {row['psnr']:.1f}, log p(y) = {row['log_evidence']:.0f}, ESS {row['ess']:.0f} of {roots}"
