"""A progress bar of tqdm, for those who have one everywhere else."""

from __future__ import annotations

import inspect
from typing import Any

from treesearch.errors import unknown
from treesearch.session.interfaces import Snapshot


class Tqdm:
    """A callback that shows NFE, best reward and ESS as a bar, in terminals and notebooks.

    Args:
        bar: what `tqdm.auto.tqdm` takes: desc, leave, disable, ...

    Raises:
        TypeError: it takes no such setting.
    """

    def __init__(self, **bar: Any) -> None:
        from tqdm import tqdm

        taken = {"display", *inspect.signature(tqdm.__init__).parameters} - {"self", "iterable", "kwargs"}
        for name in bar:
            if name not in taken:
                raise TypeError(unknown("setting of Tqdm", name, taken))
        self.settings = bar
        self._bar: Any = None

    def __call__(self, snapshot: Snapshot) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                **({"total": snapshot.total, "unit": "NFE", "unit_scale": True, "disable": False} | self.settings)
            )
            seconds = snapshot.record["seconds"]  # the bar comes after the first wave, or with a resumed run
            if not self._bar.disable:
                self._bar.start_t = self._bar.last_print_t = self._bar.start_t - seconds
        record = snapshot.record
        self._bar.set_postfix({"best": record["best_reward"], "ESS": record["ess"]}, refresh=False)
        self._bar.update(record["nfe"] - self._bar.n)

    def finish(self, result: Any) -> None:
        """The search is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
