"""Several methods on the same kernel, reward, prompts, seed and budget.

found = ts.compare(kernel, reward, ["best_of_n", "tree_search", ts.TreeSampling()], budget=ts.Budget(nfe=10_000))
print(found)                # a line a method, who reached best-of-N's best first, whom to take
found["tree_search"].best
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from treesearch import api
from treesearch.backends.base import Kernel
from treesearch.budget import Budget
from treesearch.errors import BudgetError, KernelError, StoreError, TreeSearchError
from treesearch.methods.base import Method, Status
from treesearch.registry import registry as specs
from treesearch.registry.recipe import Recipe
from treesearch.report import comparison as report
from treesearch.results.comparison import Compared, Comparison, beside
from treesearch.results.result import SearchResult
from treesearch.rewards.base import Reward, RewardError, as_prompts, as_reward
from treesearch.runs import folder as runs
from treesearch.session.interfaces import Callback, Workers
from treesearch.session.rebuild import build_method
from treesearch.text import file_name

REFUSALS = (BudgetError, RewardError, KernelError, StoreError)  # of one method, which hide none of the others


def compare(
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    methods: Mapping[str, Method] | Sequence[Method | str],
    *,
    budget: Budget,
    prompts: Sequence[Any] | None = None,
    seed: int = 0,
    also: Reward | Callable[..., Any] | None = None,
    batch_size: int = 64,
    workers: Workers | None = None,
    store: str | os.PathLike[str] | None = None,
    callbacks: Callable[[str], Sequence[Callback]] = lambda name: (),
) -> Comparison:
    """Search with each of several methods at the same budget, one after the other.

    Args:
        kernel, reward, prompts, seed, batch_size, workers: as in `search`.
        methods: by name, or a list: objects, and names as on the command line, such as "fk(num_particles=16)".
        budget: of each method.
        also: a reward that is not optimised: what it says of each method's best samples and draws.
        store: folder for the runs, a table, pictures and a card; a comparison that was interrupted goes on there.
        callbacks: from a method's name those of its search, such as `lambda name: [TensorBoard(f"logs/{name}")]`.

    Returns:
        A `Comparison`; a method that cannot run says why in `refused` and hides none of the others.

    Raises:
        TreeSearchError: no method could run, or the folder holds a comparison already.
        TypeError: callbacks is a list.
    """
    if not callable(callbacks):
        raise TypeError(
            f"callbacks is {callbacks!r}, expected a function of a method's name that makes them: each search is a run "
            "of its own"
        )
    named, folder = name_methods(methods), new_folder(store)
    told = {name: callbacks(name) for name in named}
    with workers or nullcontext():
        model = kernel.kernel() if isinstance(kernel, Recipe) and workers is None else kernel
        scorer = reward.reward() if isinstance(reward, Recipe) and workers is None else reward

        def search(name: str, method: Method) -> SearchResult:
            path = None if folder is None else folder / name
            how: dict[str, Any] = {"budget": budget, "batch_size": batch_size, "workers": workers}
            how["callbacks"] = told[name]
            if path is not None and goes_on(path, method, prompts, seed):
                return api.resume(path, model, scorer, **how)
            return api.search(model, scorer, method, prompts=prompts, seed=seed, store=path, **how)

        found = collect(named, search, None if also is None else as_reward(also))
    if folder is not None:
        report.write(found, folder, _asked(found, budget, seed))
    return found


def name_methods(methods: Mapping[str, Method] | Sequence[Method | str]) -> dict[str, Method]:
    """Methods by name: registered ones, or as they are given; where several have one name, with what they have set.

    Raises:
        UsageError: a name or an expression that cannot be read.
    """
    if isinstance(methods, Mapping):
        return {file_name(name): method for name, method in methods.items()}
    made = [specs.method(given) if isinstance(given, str) else given for given in methods]
    heads = [_head(given) for given in methods]
    found: dict[str, Method] = {}
    for method, head in zip(made, heads, strict=True):
        name = head + _settings(method) if heads.count(head) > 1 else head
        found[unused(file_name(name), found)] = method
    return found


def _head(given: Method | str) -> str:
    """A method's name without its settings."""
    return given.partition("(")[0].replace("-", "_") if isinstance(given, str) else _registered(given)


def _settings(method: Method) -> str:
    """What is not as by default, such as _draft_3."""
    own = [(each.name, getattr(method, each.name), each.default) for each in fields(method)]
    several = [(name, value if isinstance(value, tuple) else (value,)) for name, value, usual in own if value != usual]
    return "".join("_" + "_".join(map(str, (name, *values))) for name, values in several)


def _registered(method: Method) -> str:
    """The name of a method on the command line; of one that has none there its class."""
    long = type(method).__name__
    return next((name for name, known in specs.METHOD_NAMES.items() if known == long), long)


def unused(name: str, used: Iterable[str]) -> str:
    """The name, with a number behind it if it is taken."""
    taken = set(used)
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)


def new_folder(store: str | os.PathLike[str] | None) -> Path | None:
    """The folder of a comparison.

    Raises:
        StoreError: it holds one already.
    """
    if store is not None and (Path(store) / report.SUMMARY).exists():
        raise StoreError(f"{store} holds a comparison already: name another folder, or remove it")
    return None if store is None else Path(store)


def goes_on(path: Path, method: Method, prompts: Sequence[Any] | None, seed: int) -> bool:
    """Whether a folder holds this very search, begun by a comparison that was interrupted.

    Raises:
        StoreError: it holds another one.
    """
    if not (path / "run.json").exists():
        return False
    config = runs.read_config(path)
    if (build_method(config["method"]), config["prompts"], config["seed"]) != (method, as_prompts(prompts), seed):
        raise StoreError(f"{path} holds another run: name another folder for the comparison, or remove it")
    return True


def collect(
    methods: Mapping[str, Method], search: Callable[[str, Method], SearchResult], also: Reward | None = None
) -> Comparison:
    """Run every method and keep what came out, or why it could not run.

    Raises:
        TreeSearchError: no method could run.
    """
    entries: dict[str, Compared] = {}
    stopped = False
    for name, method in methods.items():
        if stopped:
            entries[name] = Compared(name=name, method=method, refused="the comparison was stopped by request")
            continue
        try:
            result = search(name, method)
        except REFUSALS as error:
            entries[name] = Compared(name=name, method=method, refused=f"{error}")
            continue
        told = () if also is None else tuple(beside(task, also) for task in result.tasks)
        entries[name] = Compared(name=name, method=method, result=result, also=told)
        stopped = any(task.status == Status.STOPPED for task in result.tasks)
    found = Comparison(entries=entries, also=None if also is None else also.name)
    if not found.ran:
        raise TreeSearchError("no method could run: " + "; ".join(f"{k}, {v}" for k, v in found.refused.items()))
    return found


def _asked(found: Comparison, budget: Budget, seed: int) -> dict[str, Any]:
    """What was asked, for the card: kernel and reward by what they call themselves."""
    config = next(iter(found.ran.values())).found.tasks[0].context.config
    asked = {"kernel": config["kernel"], "reward": config["reward"], "budget of each": budget, "seed": seed}
    return asked | ({} if found.also is None else {"not optimised": found.also})
