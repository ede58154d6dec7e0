"""Sizes of videos: sides that the decoder and the patches divide, and 1 + k·stride frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backends.pipelines.family import Settings, call_default, sides


def extent(pipe: Any, settings: Settings, stride: int, multiple: int) -> tuple[int, int, int]:
    """Frames, height and width in pixels.

    Args:
        pipe: its own defaults stand for what the settings leave out.
        settings: the user's choices.
        stride: frames that one latent frame stands for; the first stands for itself alone.
        multiple: pixels that one token stands for, along a side.

    Raises:
        ValueError: a size that does not fit; the message names the nearest that do.
    """
    given = {name: getattr(settings, name) or call_default(pipe, name, multiple) for name in ("height", "width")}
    return frames(pipe, settings, stride), *sides(pipe, replace(settings, **given), multiple, multiple)


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
