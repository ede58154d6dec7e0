"""The only place that knows Ray: workers, the pool, bundles and how they are shared out.

What decides and what travels needs no Ray and is importable without it: `bundles`, `bundling`, `sharing`, `station`,
`settings`, `stats`. Imports run one way:

    workers -> engine -> lending -> rewards, landing, loads -> pool -> leases, cluster, worker, scorer -> process
                         lending -> bundling, sharing, stats -> bundles <- station <- worker
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treesearch.errors import WorkerError, missing

if TYPE_CHECKING:
    from treesearch.distributed.workers import RayWorkers

__all__ = ["RayWorkers", "WorkerError"]


def __getattr__(name: str) -> Any:
    """Ray is imported when its workers are asked for."""
    if name == "RayWorkers":
        try:
            from treesearch.distributed.workers import RayWorkers
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise missing("Ray", "ray") from error
        return RayWorkers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
