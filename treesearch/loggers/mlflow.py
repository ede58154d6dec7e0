"""MLflow."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from treesearch.loggers.base import Logger

_LONGEST = 500  # characters of a parameter


class MLflow(Logger):
    """A run of MLflow, at the tracking address that is set for the process.

    Args:
        images: the best so many samples of each task as pictures.
        start: what `mlflow.start_run` takes: run_name, experiment_id, ...; a run that is active already is used, and
            left active, where nothing is given.
    """

    needs = "mlflow"

    def __init__(self, *, images: int = 8, **start: Any) -> None:
        super().__init__(images)
        self.start = start
        self._of: Any = None
        self._own = True

    def begin(self, settings: Mapping[str, Any]) -> None:
        self._of = importlib.import_module(self.needs)
        self._own = bool(self.start) or self._of.active_run() is None
        if self._own:
            self._of.start_run(**self.start)
        self._of.log_params({name: str(value)[:_LONGEST] for name, value in settings.items()})

    def figures(self, found: Mapping[str, float], nfe: int) -> None:
        self._of.log_metrics(dict(found), step=nfe)

    def outcome(self, found: Mapping[str, float], certificate: str, nfe: int) -> None:
        self._of.log_metrics({f"result/{name}": value for name, value in found.items()}, step=nfe)
        self._of.log_text(certificate, "certificate.txt")

    def pictures(self, name: str, images: Sequence[Any], captions: Sequence[str], nfe: int) -> None:
        for i, image in enumerate(images, 1):
            self._of.log_image(image, f"samples/{name}_{i:02}.png")

    def close(self) -> None:
        if self._own:
            self._of.end_run()
