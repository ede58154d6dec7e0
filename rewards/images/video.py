"""Image rewards of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from treesearch.rewards.base import Reward, built_from


def frames(reward: Reward, which: Literal["all", "first", "middle", "last"] = "all") -> Reward:
    """The mean of an image reward over frames of videos (n, f, c, h, w), over all of them or one.

    Raises:
        ValueError: an unknown choice of frames.
    """
    picks = {"all": lambda f: range(f), "first": lambda f: (0,), "middle": lambda f: (f // 2,), "last": lambda f: (-1,)}
    if which not in picks:
        raise ValueError(f"which is {which!r}, expected one of {', '.join(picks)}")

    def fn(videos: Any, prompts: Sequence[Any] | None) -> Tensor:
        if not isinstance(videos, Tensor) or videos.ndim != 5:
            got = f"shape {tuple(videos.shape)}" if isinstance(videos, Tensor) else type(videos).__name__
            raise ValueError(f"expected videos (n, f, c, h, w), got {got}")
        chosen = videos[:, list(picks[which](videos.shape[1]))]
        repeated = None if prompts is None else [p for p in prompts for _ in range(chosen.shape[1])]
        return reward.attached(chosen.flatten(0, 1), repeated).view(chosen.shape[:2]).mean(1)

    name, source = f"frames({reward.name}, {which})", built_from("frames", reward, which)
    return replace(reward, fn=fn, name=name, calls=None, source=source)
