"""What a learner of Stable-Baselines3 tells while it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from stable_baselines3.common.callbacks import BaseCallback


@final
class Returns(BaseCallback):
    """Writes down (steps, return) of every episode that ends.

    Args:
        into: where they are added.
        watch: called after every step.
    """

    def __init__(self, into: list[tuple[int, float]], watch: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.into, self.watch = into, watch

    def _on_step(self) -> bool:
        ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        self.into += [(self.num_timesteps, float(value)) for value in ended]
        if self.watch is not None:
            self.watch()
        return True
