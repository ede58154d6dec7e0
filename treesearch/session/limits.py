"""What a budget must pay for at least, and what one task gets of it."""

from __future__ import annotations

from dataclasses import replace

from treesearch.backends.base import Spec
from treesearch.budget import Budget, Share
from treesearch.errors import BudgetError
from treesearch.methods.base import Method
from treesearch.session.calibrate import Pilot


def check_budget(method: Method, spec: Spec, budget: Budget, tasks: int) -> None:
    """Raises:
    BudgetError: no budget, or one below a unit of the method for each task.
    """
    unit, each_has = method.unit(spec), budget.share(tasks)
    if budget.reward_calls is not None and any(spec.rewards_per_nfe):
        raise BudgetError(
            "a guide calls the reward in its steps, which Budget(reward_calls=...) cannot plan: limit nfe instead"
        )
    sized = getattr(method, "n", None) or getattr(method, "num_particles", None)
    if budget.empty and not sized:
        raise BudgetError("no budget: give budget=ts.Budget(nfe=...), seconds, reward_calls or iterations")
    least = {"nfe": unit.nfe, "reward_calls": unit.reward_calls, "iterations": 1}
    for name, need in least.items():
        if getattr(each_has, name) < need:
            each = f" for each of {tasks} tasks" if tasks > 1 else ""
            raise BudgetError(
                f"Budget({name}={getattr(budget, name)}) is below {unit.name}{each}: the minimum is {need * tasks}"
            )


def share(budget: Budget, pilot: Pilot, tasks: int) -> Share:
    """One task's part of what is left beside the pilot."""
    beside = {name: pilot.cost[name] for name in ("nfe", "reward_calls")}
    limits = {name: getattr(budget, name) for name in beside}
    left = {name: max(1, limit - beside[name]) for name, limit in limits.items() if limit is not None}
    return replace(budget, **left).share(tasks)
