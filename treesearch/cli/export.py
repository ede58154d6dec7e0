"""`export`: a run as a file of another kind."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from treesearch import api as loop
from treesearch.cli.base import Command, pick
from treesearch.cli.saved import of_folder, told
from treesearch.cli.show import read_result_of, task_number
from treesearch.errors import StoreError, TreeSearchError, UsageError
from treesearch.registry import registry as specs
from treesearch.report import outputs, texts
from treesearch.report.terminal import say
from treesearch.results.result import SearchResult
from treesearch.rewards.base import Reward
from treesearch.runs import files
from treesearch.runs.config import read_config

KINDS = ("graphml", "csv", "npz", "jsonl", "png", "minari", "hf")
DECODED = ("npz", "jsonl", "png", "minari", "hf")

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """A run as graphml, csv (nodes), npz (samples, rewards, weights), jsonl (texts), png (sheet), minari (episodes), hf
    (a dataset of Hugging Face: parquet files and a card; also of what result.save wrote)."""

    path: Positional[str]
    to: Positional[str]
    out: str | None = None
    """file; in the run's folder by default. minari, hf: the dataset's folder, of minari named like plans-v0"""
    task: int | None = None
    """which task; the first by default, for minari and hf all of them"""
    draws: int | None = None
    """minari: this many draws of each task's estimate of π, in place of every leaf"""
    best: int | None = None
    """minari: this many of the best of each task, in place of every leaf"""
    observation: int | None = None
    """minari: channels of an observation, where the kernel does not know"""
    action: int | None = None
    """minari: channels of an action, where the kernel does not know"""
    push: str | None = None
    """hf: also send it to the hub as OWNER/NAME, with the token that `hf auth login` keeps; to be seen by you alone"""
    public: bool = False
    """hf: a dataset that --push makes can be seen by everybody"""
    kernel: str | None = None
    """where samples are decoded: how to make the run's kernel, in place of what its folder says"""
    trust: bool = False
    """where samples are decoded: load the code and weights that a folder names which you did not make here yourself"""

    def run(self) -> int:
        if self.path in KINDS and self.to not in KINDS:
            raise UsageError(f"the run comes first: treesearch export {self.to} {self.path}")
        pick("export", self.to, KINDS)
        self._check()
        if self.to == "hf":
            return self._dataset()
        number = task_number(self.task, len(read_config(self.path)["prompts"] or [None]))
        if self.to == "minari":
            return self._episodes()
        out = Path(self.out or Path(self.path) / f"task{number}.{self.to}")
        if self.to in ("graphml", "csv"):
            from treesearch.export import write_csv, write_graphml

            tree = read_result_of(self.path)[1].tasks[number].tree
            (write_graphml if self.to == "graphml" else write_csv)(tree, out)
        else:
            task = self._result()[1].tasks[number]
            if self.to == "png" and outputs.contact_sheet(task, out) is None:
                raise TreeSearchError("the samples of this run are no images: export npz")
            if self.to == "jsonl":
                texts.write_lines(task, out)
            if self.to == "npz":
                rewards, log_weights = task.rewards.numpy(), task.log_weights.numpy()
                samples = np.asarray(task.samples)
                with files.replacing(out) as scratch, open(scratch, "wb") as file:
                    np.savez_compressed(file, samples=samples, rewards=rewards, log_weights=log_weights)
        say(out)
        return 0

    def _check(self) -> None:
        """Raises:
        UsageError: options that this export does not have, or that exclude one another.
        """
        apart = ("draws", "best", "observation", "action", "kernel", "trust", "push", "public")
        given = {name for name in apart if not any(getattr(self, name) is unset for unset in (None, False))}
        decodes = {"kernel", "trust"} if self.to in DECODED else set()
        own = {"minari": {"draws", "best", "observation", "action"}, "hf": {"push", "public"}}.get(self.to, set())
        if asked := sorted(given - decodes - own):
            raise UsageError(f"{', '.join(f'--{name}' for name in asked)}: not with {self.to}")
        if {"draws", "best"} <= given:
            raise UsageError("--draws and --best are two datasets: ask for one of them")
        if self.public and self.push is None:
            raise UsageError("--public: only with --push OWNER/NAME")
        if self.push is not None and not _HUB_NAME.fullmatch(self.push):
            raise UsageError(f"--push {self.push}: expected OWNER/NAME of letters, digits and . _ -")

    def _episodes(self) -> int:
        from treesearch.export import minari

        kernel, result = self._result()
        name = Path(self.path).resolve().name + ("" if self.task is None else f"-task{self.task}")
        chosen = {what: getattr(self, what) for what in ("task", "draws", "best", "observation", "action")}
        folder = self.out or files.subfolder(Path(self.path) / "minari") / minari.named(name)
        out = minari.write_minari(result, folder, kernel, **chosen)
        say(f"{out}\nload it with MINARI_DATASETS_PATH={out.resolve().parent} and minari.load_dataset({out.name!r})")
        return 0

    def _dataset(self) -> int:
        from treesearch.export import hf

        path = Path(self.path)
        out = Path(self.out or path / "hf")
        if (path / "result.json").is_file() and not (path / "run.json").exists():
            hf.write_hf(path, out, task=self.task)
        else:
            result = self._result()[1]
            if self.task is not None:
                task_number(self.task, len(result.tasks))
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".", ignore_cleanup_errors=True) as scratch:
                hf.write_hf(result.save(scratch), out, task=self.task)
        say(out if self.push is None else f"{out}\n{hf.push(out, self.push, public=self.public)}")
        return 0

    def _result(self) -> tuple[Any, SearchResult]:
        """The kernel and the result, which the kernel decodes; the reward is not needed, and not made."""
        path = Path(self.path)
        config = read_config(path)
        command = told(path, kernel=self.kernel, trust=self.trust, wanted=("kernel",))
        with of_folder(path, typed=self.kernel is not None):
            kernel = specs.kernel(command["kernel"])
        session = loop.open_session(path, kernel, _recorded(config), look=True)
        try:
            return kernel, session.result()
        finally:
            session.close()


def _recorded(config: Mapping[str, Any]) -> Reward:
    """Stands for the reward of a run that is only looked at: its name and settings, for nothing is scored."""

    def refuse(samples: Any, prompts: Any) -> Any:
        raise StoreError("nothing is scored while a run is looked at")

    return Reward(refuse, config["reward"], settings=tuple(config["reward_settings"]))
