"""Callbacks that send a search where everything else is logged: `callbacks=[ts.loggers.WandB(project="digits")]`.

Each needs its library, which is imported when a search begins. `Logger` is the base of one of your own.
"""

from __future__ import annotations

from treesearch.loggers.base import Logger
from treesearch.loggers.mlflow import MLflow
from treesearch.loggers.named import NAMES, named
from treesearch.loggers.tensorboard import TensorBoard
from treesearch.loggers.tqdm import Tqdm
from treesearch.loggers.wandb import Trackio, WandB

__all__ = ["NAMES", "Logger", "MLflow", "TensorBoard", "Tqdm", "Trackio", "WandB", "named"]
