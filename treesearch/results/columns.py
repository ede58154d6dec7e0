"""A result as columns, a row a sample: what any library of tables takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treesearch.core.weights import normalise

if TYPE_CHECKING:
    from treesearch.results.result import TaskResult


def columns(tasks: Sequence[TaskResult]) -> dict[str, Any]:
    """Columns of all samples of some tasks; `prompt` is a list, the others are arrays (n,)."""
    each = [_columns(i, task) for i, task in enumerate(tasks)]
    found: dict[str, Any] = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    return {"prompt": [task.prompt for task in tasks for _ in range(len(task.leaves))]} | found


def _columns(number: int, task: TaskResult) -> dict[str, NDArray[Any]]:
    log_weights = task.log_weights.numpy()
    weighs = len(log_weights) and log_weights.max() > -np.inf
    return {
        "task": np.full(len(task.leaves), number),
        "node": task.leaves,
        "reward": task.rewards.numpy(),
        "log_weight": log_weights,
        "weight": normalise(log_weights) if weighs else np.zeros(len(log_weights)),
        "key": task.tree.key[task.leaves],
    }
