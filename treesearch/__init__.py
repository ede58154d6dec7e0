"""Inference-time search for diffusion models: sampling is a walk down a tree, and this searches the tree.

import treesearch as ts
result = ts.search(kernel, reward, ts.DiffusionTreeSearch(), budget=ts.Budget(nfe=5_000))
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from treesearch import _names  # noqa: F401 - checks that `backends` and `rewards` are ours, before anything else

if TYPE_CHECKING:
    from treesearch import loggers
    from treesearch.api import resume, search, stream
    from treesearch.budget import Budget, Cost
    from treesearch.comparing import compare
    from treesearch.core.tree import Tree
    from treesearch.core.weights import ZeroWeights
    from treesearch.diagnosis.diagnose import diagnose
    from treesearch.diagnosis.diagnosis import Diagnosis
    from treesearch.distributed import RayWorkers
    from treesearch.errors import BudgetError, KernelError, StoreError, TreeSearchError, WorkerError
    from treesearch.methods import (
        MCTS,
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
_HOMES = {
    "api": "resume search stream",
    "budget": "Budget Cost",
    "comparing": "compare",
    "core.tree": "Tree",
    "core.weights": "ZeroWeights",
    "diagnosis.diagnose": "diagnose",
    "diagnosis.diagnosis": "Diagnosis",
    "errors": "BudgetError KernelError StoreError TreeSearchError WorkerError",
    "planning.planner": "Planner PlanningEnded",
    "registry.recipe": "Recipe",
    "results.comparison": "Comparison",
    "results.result": "SearchResult TaskResult",
    "session.interfaces": "Snapshot",
    "version": "__version__",
    "distributed": "RayWorkers",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """A name is loaded when it is first asked for, so that what needs no torch does not wait for it. A method of the
    table has its name here, and so has every folder."""
    if name in _HOME:
        found = getattr(importlib.import_module(f"treesearch.{_HOME[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"treesearch.{name}"):
        return importlib.import_module(f"treesearch.{name}")
    elif not name.startswith("_") and name in (methods := importlib.import_module("treesearch.methods").METHODS):
        found = methods[name]
    else:
        raise AttributeError(f"module 'treesearch' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "backends", "distributed", "rewards", "testing"]
