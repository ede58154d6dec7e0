"""A result in plain numbers, a record a task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treesearch.results.result import SearchResult, TaskResult


def summary(result: SearchResult) -> list[dict[str, Any]]:
    """One record a task: what `show` and tables print and run cards hold."""
    return [_task(task) for task in result.tasks]


def _task(task: TaskResult) -> dict[str, Any]:
    rewards, found = task.rewards, task.diagnostics
    finite = rewards[rewards.isfinite()]
    return {
        "prompt": task.prompt,
        "samples": len(rewards),
        "best": _number(float(rewards.max())) if len(rewards) else None,
        "mean": _number(float(finite.mean())) if len(finite) else None,
        "log_z": _number(task.log_z),
        "log_z_se": _number(task.log_z_se),
        "ess": found["ess"],
        "roots": found["surviving_roots"],
        "kl": _number(found["kl"]),
        "lam": _number(found["lam"]),
        "status": str(task.status.name).lower(),
        "warnings": found["warnings"],
        "certificate": task.certificate().asdict(),
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
