"""Loggers by name, for `--log`: into the run folder where they write files, else named after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from treesearch.errors import UsageError, unknown
from treesearch.loggers.base import Logger
from treesearch.loggers.mlflow import MLflow
from treesearch.loggers.tensorboard import TensorBoard
from treesearch.loggers.wandb import Trackio, WandB

_MAKE: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": lambda path: TensorBoard(path / "tensorboard"),
    "wandb": lambda path: WandB(project="treesearch", name=path.name),
    "mlflow": lambda path: MLflow(run_name=path.name),
    "trackio": lambda path: Trackio(name=path.name),
}
NAMES = tuple(_MAKE)


def named(name: str, path: Path) -> Logger:
    """A logger by its name.

    Args:
        path: the run folder.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _MAKE:
        raise UsageError(unknown("logger", name, NAMES))
    return _MAKE[name](path)
