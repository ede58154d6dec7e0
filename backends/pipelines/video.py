"""Sizes of videos: sides that the decoder and the patches divide, and 1 + k·stride frames."""

from __future__ import annotations

from typing import Any

from treesearch.backends.pipelines.asked import call_default, sides
from treesearch.backends.pipelines.settings import Settings


def extent(pipe: Any, settings: Settings, stride: int, *multiples: int) -> tuple[int, int, int]:
    """Frames, height and width in pixels.

    Args:
        pipe: its own defaults stand for what the settings leave out.
        settings: the user's choices.
        stride: frames that one latent frame stands for; the first stands for itself alone.
        multiples: pixels that one token stands for, along a side, and what the pipeline checks.

    Raises:
        ValueError: a size that does not fit; the message names the nearest that do.
    """
    default = call_default(pipe, "height", multiples[0]), call_default(pipe, "width", multiples[0])
    return frames(pipe, settings, stride), *sides(pipe, settings, default, *multiples)


def frames(pipe: Any, settings: Settings, stride: int) -> int:
    """Frames of a video.

    Raises:
        ValueError: not 1 + k·stride.
    """
    count = call_default(pipe, "num_frames", 1) if settings.num_frames is None else settings.num_frames
    if count < 1 or (count - 1) % stride:
        below = max(0, (count - 1) // stride) * stride + 1
        near = [below] if count < 1 else [below, below + stride]
        raise ValueError(
            f"num_frames is {count}, expected 1 plus a multiple of {stride} for {type(pipe).__name__}: "
            f"{' or '.join(map(str, near))}"
        )
    return count
