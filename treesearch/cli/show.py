"""`show` and `plot`: looking at run folders, which runs no code that they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from treesearch.cli.base import Command, pick
from treesearch.core.tree import Tree
from treesearch.errors import StoreError, TreeSearchError, UsageError
from treesearch.report import best, plots, trees
from treesearch.report import tables as report
from treesearch.report.terminal import say
from treesearch.results.result import SearchResult
from treesearch.results.summary import summary
from treesearch.runs import reading
from treesearch.runs.command import shown
from treesearch.runs.config import read_config
from treesearch.session.rebuild import read_result
from treesearch.text import plain


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """One run: what was asked, what came out, its best samples, what it may claim, the tree by level."""

    path: Positional[str]
    json: bool = False
    """print JSON"""

    def run(self) -> int:
        config, result = read_result_of(self.path)
        levels = [
            _level(i, task.tree, t)
            for i, task in enumerate(result.tasks)
            for t in sorted(set(task.tree.t.tolist()), reverse=True)
        ]
        name, tasks = config["method"]["name"], summary(result)
        kept = _kept_by(Path(self.path))
        found_best = [] if kept is None else best.listed(kept, best.NAMED)
        if self.json:
            found = {"tasks": tasks, "cost": result.cost.as_dict()}
            told = {
                "config": config,
                "summary": found,
                "last": result.history[-1:],
                "levels": levels,
                "best": found_best,
            }
            say(json.dumps(told | {"certificates": [task["certificate"] for task in tasks]}, indent=2))
            return 0
        asked = config | {what: plain(text) for what, text in shown(Path(self.path), config).items()}
        say(f"status   {reading.status(self.path, config)}")
        for key in ("method", "seed", "prompts", "kernel", "reward", "budget", "versions"):
            say(f"{key:<9}{asked[key]}")
        report.print_table(report.rows(name, tasks, result.cost))
        for note in report.notes(tasks, result.cost):
            say(f"  note: {note}")
        for line in best.lines(found_best):
            say(f"  best {line}")
        report.print_table([[str(v) for v in row] for row in levels], ("task", "t", "nodes", "visits", "mean value"))
        for heading, claimed in report.certified(name, tasks).items():
            say("\n".join([f"\ncertificate of {heading}", *(f"  {line}" for line in claimed)]))
        return 0


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """A picture of one or more runs; runs of different searches stand in panels of their own."""

    paths: Positional[tuple[str, ...]]
    what: str = "reward"
    """reward (best reward against NFE) or tree"""
    task: int | None = None
    """tree: which task; the first by default"""
    out: str | None = None
    """PNG file; in the first run's folder by default"""

    def run(self) -> int:
        pick("plot", self.what, ("reward", "tree"))
        if not self.paths:
            raise UsageError("name at least one run folder")
        if self.what == "tree" and len(self.paths) > 1:
            raise UsageError(f"--what tree draws one run, got {len(self.paths)}: name one")
        if self.what == "reward" and self.task is not None:
            raise UsageError("--task: only with --what tree; the reward drawn is the best over all tasks")
        read: dict[str, tuple[dict[str, Any], SearchResult]] = {}
        for path in dict.fromkeys(self.paths):
            try:
                read[path] = read_result_of(path)
            except TreeSearchError as error:  # one must not hide the others
                say(f"treesearch: {error}", error=True)
        if not read:
            return 1
        out = Path(self.out or Path(next(iter(read))) / f"{self.what}.png")
        if self.what == "reward":
            plots.draw_panels(plots.panels({path: (config, run.history) for path, (config, run) in read.items()}), out)
        else:
            path, (config, result) = next(iter(read.items()))
            self._tree(Path(path), config, result, out)
        say(out)
        return 0 if len(read) == len(set(self.paths)) else 1

    def _tree(self, path: Path, config: Mapping[str, Any], result: SearchResult, out: Path) -> None:
        number = task_number(self.task, len(result.tasks))
        asked = shown(path, config)
        title = f"{config['method']['name']} on {asked['kernel']}, reward {asked['reward']}"
        kept = _kept_by(path)
        thumbnails = {} if kept is None else best.pictures(kept, number)
        trees.draw_tree(trees.layout(result.tasks[number].tree), out, title=title, pictures=thumbnails)


def task_number(asked: int | None, tasks: int) -> int:
    """The number of a task, the first if none is asked for.

    Raises:
        UsageError: there is none of that number.
    """
    if asked is not None and not 0 <= asked < tasks:
        raise UsageError(f"--task {asked}: this run has tasks 0..{tasks - 1}")
    return asked or 0


def read_result_of(path: str | Path) -> tuple[dict[str, Any], SearchResult]:
    """Configuration and result of a run folder, without its kernel: everything but the decoded samples."""
    config = read_config(path)
    return config, read_result(config, reading.read_log(Path(path), config)[0])


def _kept_by(path: Path) -> Path | None:
    """Where a run left its best samples; None, and a line that says so, where a link leads to what is not the run's."""
    try:
        return best.folder_of(path)
    except StoreError as error:
        say(f"treesearch: {error}", error=True)
        return None


def _level(task: int, tree: Tree, t: int) -> list[Any]:
    at = tree.t == t
    shown = np.where(np.isnan(tree.value), tree.reward, tree.value)[at]
    shown = shown[np.isfinite(shown)]
    mean = round(float(shown.mean()), 4) if len(shown) else None
    return [task, int(t), int(at.sum()), int(tree.visits[at].sum()), mean]
