"""`run` and `resume`: one search, into a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from treesearch import api as loop
from treesearch.backends.base import Kernel, describe, optional
from treesearch.budget import Budget
from treesearch.cli import config, edits, probe
from treesearch.cli.arguments import Limits, What, Where, load, rows
from treesearch.cli.base import Command, pick
from treesearch.cli.saved import COMMAND, begin, kept, of_folder, told
from treesearch.comparing import unused
from treesearch.errors import UsageError
from treesearch.loggers.base import Logger
from treesearch.loggers.named import named
from treesearch.methods.advice import GOALS, advise
from treesearch.methods.base import Method
from treesearch.registry import expressions
from treesearch.report import best, outputs
from treesearch.report import tables as report
from treesearch.report.card import resume_command
from treesearch.report.progress import Progress
from treesearch.report.terminal import say
from treesearch.results.result import SearchResult
from treesearch.results.summary import summary
from treesearch.runs.files import write_json
from treesearch.session.session import Session

NFE = 10_000  # where neither a method nor a limit is named


@dataclass(frozen=True, kw_only=True)
class Advised:
    """The method that suits the kernel: TreeSampling for draws of π (an unbiased log Z, nothing to tune), TreeSearch
    with --goal best; BestOfN and NoiseSearch where every step of the kernel is deterministic."""


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Search with one method, into a run folder. Without a method it takes TreeSampling, which draws from π and
    estimates log Z without bias, and 10,000 NFE unless there is a limit; with --goal best TreeSearch, which finds the
    best sample for the fewest NFE."""

    method: Any
    goal: str | None = None
    """draws (of π) or best (the best sample), to choose a method where none is named; draws by default"""
    what: OmitArgPrefixes[What] = field(default_factory=What)
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    keep_states: str = "all"
    """all, frontier or none"""
    store: str | None = None
    """run folder; a new one under runs/ by default"""
    dry_run: bool = False
    """predict NFE, memory and the time of one process from one probe batch, and stop; leaves no folder"""
    log: tuple[str, ...] = ()
    """also send figures and the best samples to tensorboard (files in the run's folder), wandb, mlflow or trackio"""
    json: bool = False
    """print the summary as JSON"""
    config: str | None = None
    """a TOML file of these options, as --print-config writes it; what is typed stands over what it says"""
    print_config: bool = False
    """print the command as such a file, and stop"""

    def run(self) -> int:
        if self.print_config:
            say(config.written(self))
            return 0
        options, budget, command = self.what.options(self.keep_states), self.limits.budget(), self.what.command()
        if self.dry_run and (asked := self.where.asked()):
            raise UsageError(f"{', '.join(asked)}: --dry-run predicts one process, leave it out")
        if self.goal is not None and not isinstance(self.method, Advised):
            raise UsageError("--goal: only where no method is named")
        prompts = self.what.asked()
        with self.where.running() as workers:
            kernel, reward = load(command, workers)
            method = self.method
            if isinstance(method, Advised):
                kernel = workers.kernel(kernel) if workers is not None else kernel
                method, budget = self._advised(kernel, budget)
            session = loop.make_session(kernel, reward, method, prompts, budget, self.what.seed, options, workers)
            if self.dry_run:
                return print_estimate(probe.estimate(session), as_json=self.json)
            path = Path(self.store or new_folder(type(method).__name__))
            logs = [named(name, path) for name in self.log]
            begin(session, path, command)
            return drive(session, path, command, as_json=self.json, callbacks=logs)

    def _advised(self, kernel: Kernel, budget: Budget) -> tuple[Method, Budget]:
        """The method for the goal and the budget, and a line that says which."""
        goal = pick("goal", self.goal or GOALS[0], GOALS)
        found = advise(describe(kernel, identify=False), goal)
        budget = Budget(nfe=NFE) if budget.empty else budget
        if not self.json:
            limit = f", {budget.nfe:,} NFE" if budget.nfe else ""
            say(f"no method named, --goal {goal}: {type(found.method).__name__}{limit} ({found.why})")
        return found.method, budget


def new_folder(name: str) -> str:
    """A folder under runs/ that is not there yet."""
    name = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return unused(name, (str(path) for path in Path("runs").glob("*")))


@dataclass(frozen=True, kw_only=True)
class Resume(Command):
    """Go on with a run, interrupted or finished; limits count from its start."""

    path: Positional[str]
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    kernel: str | None = None
    """how to make the run's kernel, in place of what its folder says; the run must have been made with the same"""
    reward: str | None = None
    """how to make the run's reward, in place of what its folder says; the run must have been made with the same"""
    trust: bool = False
    """load the code, weights and services that a folder names which you did not make here yourself"""
    batch_size: int = 64
    """rows of a forward pass"""
    log: tuple[str, ...] = ()
    """also send figures and the best samples to tensorboard (files in the run's folder), wandb, mlflow or trackio"""
    json: bool = False
    """print the summary as JSON"""

    def run(self) -> int:
        budget, size, path = self.limits.budget(), rows(self.batch_size), Path(self.path)
        logs = [named(name, path) for name in self.log]
        command = told(path, kernel=self.kernel, reward=self.reward, trust=self.trust)
        with self.where.running() as workers:
            with of_folder(path, typed=bool(self.kernel and self.reward)):
                kernel, reward = load(command, workers)
            session = loop.open_session(
                path, kernel, reward, budget=None if budget.empty else budget, batch_size=size, workers=workers
            )
            if self.kernel or self.reward:  # they made the run's own, or `open_session` had refused them
                write_json(path / COMMAND, kept(command))
            return drive(session, path, command, as_json=self.json, callbacks=logs)


def drive(
    session: Session, path: Path, command: Mapping[str, str], *, as_json: bool, callbacks: Sequence[Logger] = ()
) -> int:
    """Run a session to its end and report; Ctrl-C leaves a run that can be resumed."""
    name = session.method.__class__.__name__
    try:
        result = finish(session, path, name, command, quiet=as_json, callbacks=callbacks)
    except KeyboardInterrupt:
        say(f"\ninterrupted; the run is saved, go on with:\n  {resume_command(path)}")
        return 130
    found = {"tasks": summary(result), "cost": result.cost.as_dict(), "store": str(path), "method": name}
    pictured = None if session.lost is not None else edits.report(result, session.kernel, command, path)
    if pictured is not None:
        found["edits"] = pictured
    if as_json:
        say(json.dumps(found, indent=2))
        return 0
    report.print_table(report.rows(name, found["tasks"], result.cost))
    for note in report.notes(found["tasks"], result.cost):
        say(f"  note: {note}")
    if session.lost is not None:
        return 1
    read = [line for line in best.listed(path / "outputs" / "best", best.NAMED) if line["text"]]
    for line in best.lines(read):
        say(f"  best {line}")
    for line in edits.lines(pictured or {}):
        say(line)
    say(path / ("README.md" if pictured is None else "outputs/edit.png"))
    return 0


def finish(
    session: Session,
    path: Path,
    name: str,
    command: Mapping[str, str],
    *,
    quiet: bool,
    callbacks: Sequence[Logger] = (),
) -> SearchResult:
    """Run with a progress line, then write outputs and the card."""
    about = {"weighed": not session.method.claims.greedy, "texts": bool(optional(session.kernel, "writes", False))}
    with Progress(name, quiet=quiet, **about) as progress:
        for snapshot in loop.snapshots(session, callbacks):
            progress(snapshot)
        result = session.result()
        progress.settle(sum(task.diagnostics["ess"] for task in result.tasks))
    if session.lost is None:  # else there is no folder to write to
        asked = {key: expressions.public(command[key]) for key in ("kernel", "reward")}
        outputs.write_outputs(result, path, name=name, asked=asked)
    return result


def print_estimate(found: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        say(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            if isinstance(value, dict):
                say(key)
                for name, size in value.items():
                    say(f"  {name:<30}{_size(size):>12}")
            else:
                say(f"{key:<24} {value}")
    return 0


def _size(count: int) -> str:
    """Bytes, to read."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{count} B"
