"""Loggers by name, for `--log`: into the run folder where they write files, else named after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from treesearch.errors import UsageError, unknown
from treesearch.loggers.base import Logger
from treesearch.loggers.mlflow import MLflow
from treesearch.loggers.tensorboard import TensorBoard
from treesearch.loggers.wandb import Trackio, WandB

_MAKE: dict[str, Callable[[Path, str], Logger]] = {
    "tensorboard": lambda path, name: TensorBoard(path / "tensorboard"),
    "wandb": lambda path, name: WandB(project="treesearch", name=name),
    "mlflow": lambda path, name: MLflow(run_name=name),
    "trackio": lambda path, name: Trackio(name=name),
}
NAMES = tuple(_MAKE)


def named(name: str, path: Path, called: str | None = None) -> Logger:
    """A logger by its name.

    Args:
        path: the run folder.
        called: what the run is called there; by default as its folder.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _MAKE:
        raise UsageError(unknown("logger", name, NAMES))
    return _MAKE[name](path, called or path.name)
