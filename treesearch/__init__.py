"""Inference-time search for diffusion models: sampling is a walk down a tree, and this searches the tree.

import treesearch as ts
result = ts.search(kernel, reward, ts.DiffusionTreeSearch(), budget=ts.Budget(nfe=5_000))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treesearch import (
    _names,  # noqa: F401 - checks that `backends` and `rewards` are ours, before anything else
    loggers,
)
from treesearch.api import resume, search, stream
from treesearch.budget import Budget, Cost
from treesearch.compare import compare
from treesearch.core.tree import Tree
from treesearch.core.weights import ZeroWeights
from treesearch.diagnosis.diagnose import diagnose
from treesearch.diagnosis.diagnosis import Diagnosis
from treesearch.errors import BudgetError, KernelError, StoreError, TreeSearchError, WorkerError
from treesearch.methods import (
    MCTS,
    METHODS,
    SVDD,
    BeamSearch,
    BestOfN,
    DepthFirst,
    DiffusionTreeSampling,
    DiffusionTreeSearch,
    FeynmanKac,
    LookaheadBeam,
    NoiseSearch,
    Rejection,
    RolloverBudget,
    TreeSampling,
    TreeSearch,
)
from treesearch.planning.planner import Planner, PlanningEnded
from treesearch.registry.recipe import Recipe
from treesearch.results.comparison import Comparison
from treesearch.results.result import SearchResult, TaskResult
from treesearch.session.interfaces import Snapshot
from treesearch.version import __version__

if TYPE_CHECKING:
    from treesearch.distributed import RayWorkers

__all__ = [
    "MCTS",
    "SVDD",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "BudgetError",
    "Comparison",
    "Cost",
    "DepthFirst",
    "Diagnosis",
    "DiffusionTreeSampling",
    "DiffusionTreeSearch",
    "FeynmanKac",
    "KernelError",
    "LookaheadBeam",
    "NoiseSearch",
    "Planner",
    "PlanningEnded",
    "RayWorkers",
    "Recipe",
    "Rejection",
    "RolloverBudget",
    "SearchResult",
    "Snapshot",
    "StoreError",
    "TaskResult",
    "Tree",
    "TreeSampling",
    "TreeSearch",
    "TreeSearchError",
    "WorkerError",
    "ZeroWeights",
    "__version__",
    "compare",
    "diagnose",
    "loggers",
    "resume",
    "search",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Ray is imported when its workers are asked for; a method of the table has its name here, too."""
    if name == "RayWorkers":
        from treesearch.distributed import RayWorkers

        return RayWorkers
    if name in METHODS:
        return METHODS[name]
    raise AttributeError(f"module 'treesearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "backends", "distributed", "rewards", "testing"]
