"""Weights & Biases, and Trackio, which speaks the same words."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from treesearch.loggers.base import Logger


class WandB(Logger):
    """A run of Weights & Biases.

    Args:
        images: the best so many samples of each task as pictures.
        init: what `wandb.init` takes: project, name, mode="offline", ...; a run that is open already is used, and left
            open, where nothing is given.
    """

    needs = "wandb"

    def __init__(self, *, images: int = 8, **init: Any) -> None:
        super().__init__(images)
        self.init = init
        self._of: Any = None
        self._own = True

    def begin(self, settings: Mapping[str, Any]) -> None:
        self._of = importlib.import_module(self.needs)
        self._own = bool(self.init) or self._of.run is None
        if self._own:
            self._of.init(config=dict(settings), **self.init)
        else:
            self._of.config.update(dict(settings), allow_val_change=True)
        self._of.define_metric("nfe")
        self._of.define_metric("*", step_metric="nfe")

    def figures(self, found: Mapping[str, float], nfe: int) -> None:
        self._of.log({**found, "nfe": nfe})

    def outcome(self, found: Mapping[str, float], certificate: str, nfe: int) -> None:
        self._of.run.summary.update(
            {f"result/{name}": value for name, value in found.items()} | {"certificate": certificate}
        )

    def pictures(self, name: str, images: Sequence[Any], captions: Sequence[str], nfe: int) -> None:
        shown = [self._of.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self._of.log({f"samples/{name}": shown, "nfe": nfe})

    def close(self) -> None:
        if self._own:
            self._of.finish()


class Trackio(WandB):
    """A run of Trackio, which keeps it on this machine.

    Args:
        project: its name.
        images: the best so many samples of each task as pictures.
        init: what else `trackio.init` takes.
    """

    needs = "trackio"

    def __init__(self, project: str = "treesearch", *, images: int = 8, **init: Any) -> None:
        super().__init__(images=images, project=project, **init)

    def begin(self, settings: Mapping[str, Any]) -> None:
        self._of = importlib.import_module(self.needs)
        self._of.init(
            config={name: value if value is None else str(value) for name, value in settings.items()}, **self.init
        )

    def figures(self, found: Mapping[str, float], nfe: int) -> None:
        self._of.log(dict(found), step=nfe)

    def outcome(self, found: Mapping[str, float], certificate: str, nfe: int) -> None:
        told = {f"result/{name}": value for name, value in found.items()} | {
            "certificate": self._of.Markdown(_code(certificate))
        }
        self._of.log(told, step=nfe)

    def pictures(self, name: str, images: Sequence[Any], captions: Sequence[str], nfe: int) -> None:
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self._of.log({f"samples/{name}_{i}": self._of.Image(image, caption=caption)}, step=nfe)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
