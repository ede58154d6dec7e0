"""What a logger is told: settings once, figures after every wave at its NFE, and at the end what came out.

    first wave      begin(settings)
    every wave      figures({best_reward, ess, nodes, reward_calls, seconds, ...}, nfe)
    end             outcome(figures by task, certificates, nfe), pictures(task, images, captions, nfe), close()

A search that raises closes its loggers without an outcome.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from treesearch.errors import missing
from treesearch.report import tables
from treesearch.results.result import SearchResult
from treesearch.results.seen import Samples
from treesearch.results.summary import summary
from treesearch.session.interfaces import Snapshot
from treesearch.text import plain

log = logging.getLogger("treesearch")
TASKS = 8  # of which pictures are logged
FIGURES = ("best", "mean", "log_z", "log_z_se", "ess", "kl", "samples", "roots")  # of a task, at the end


class Logger(ABC):
    """A callback; each search that it is given to is a run of its own.

    Args:
        images: the best so many samples of each task are logged as pictures at the end, of at most eight tasks; 0
            decodes nothing. Samples that cannot be seen are left out.

    Raises:
        ImportError: the library is not installed.
    """

    needs: ClassVar[str] = ""  # the library, and the extra that brings it

    def __init__(self, images: int = 8) -> None:
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise missing(self.needs, self.needs)
        if isinstance(images, bool) or not isinstance(images, int) or images < 0:
            raise ValueError(f"images is {images!r}, expected a whole number, at least 0")
        self.images = images
        self._begun, self._failed, self._nfe = False, False, 0

    def __call__(self, snapshot: Snapshot) -> None:
        if not self._begun:
            self.begin(settings(snapshot.result()))
            self._begun, self._failed = True, False
        self._nfe = snapshot.record["nfe"]
        if not self._failed:
            with self._apart():
                self.figures(flat({name: value for name, value in snapshot.record.items() if name != "nfe"}), self._nfe)

    def finish(self, result: SearchResult | None) -> None:
        """The search is over; None where it raised."""
        if not self._begun:
            return
        self._begun = False
        with self._apart():
            try:
                if result is not None and not self._failed:
                    self._tell(result)
            finally:
                self.close()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """A search of hours does not end because its log cannot be written: that is said, and it goes on without."""
        try:
            yield
        except Exception as error:
            self._failed = True
            log.warning("%s: %s: %s; the search goes on without it", type(self).__name__, type(error).__name__, error)

    def _tell(self, result: SearchResult) -> None:
        told = summary(result)
        found: dict[str, float] = {}
        for i, task in enumerate(told):
            found |= flat({name: task[name] for name in FIGURES}, _place(i, len(told)))
        claimed = "\n\n".join(
            "\n".join([name, *lines]) for name, lines in tables.certified("certificate", told).items()
        )
        self.outcome(found, claimed, self._nfe)
        for i, task in enumerate(result.tasks[: TASKS if self.images else 0]):
            samples = Samples(task)
            seen = [(samples.thumbnail(row), float(task.rewards[row])) for row in samples.ranked(self.images).tolist()]
            shown = [(image, f"{reward:.4g}") for image, reward in seen if image is not None]
            if shown:
                images, captions = zip(*shown, strict=True)
                prompt = "" if task.prompt is None else f" {plain(task.prompt)}"
                self.pictures(
                    f"{_place(i, len(told))}best", images, [caption + prompt for caption in captions], self._nfe
                )

    @abstractmethod
    def begin(self, settings: Mapping[str, Any]) -> None:
        """A run begins: method, kernel, reward, seed, budget, versions as flat plain data."""

    @abstractmethod
    def figures(self, found: Mapping[str, float], nfe: int) -> None:
        """Numbers after a wave; those that are not finite are left out."""

    @abstractmethod
    def outcome(self, found: Mapping[str, float], certificate: str, nfe: int) -> None:
        """Numbers of each task at the end, `task0/best`, of a single one `best`; and what they may claim."""

    @abstractmethod
    def pictures(self, name: str, images: Sequence[Any], captions: Sequence[str], nfe: int) -> None:
        """Small Pillow images of the best samples of a task, best first."""

    @abstractmethod
    def close(self) -> None:
        """The run is over."""


def settings(result: SearchResult) -> dict[str, Any]:
    """What was asked, flat: `method.lam`, `budget.nfe`; prompts as their number and the first."""
    config = result.tasks[0].context.config
    found: dict[str, Any] = {"tasks": len(result.tasks)}
    for name in ("method", "kernel", "reward", "seed", "num_steps", "budget", "options", "versions"):
        value = config[name]
        found |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    found |= {"store": result.store} if result.store else {}
    return found | ({} if config["prompts"] is None else {"prompt": plain(config["prompts"][0])})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers by name, nested ones as `workers/busy`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[f"{prefix}{name}"] = float(value)
    return found


def _place(task: int, tasks: int) -> str:
    return "" if tasks == 1 else f"task{task}/"
