"""The commands of the command line: frozen dataclasses with a `run` that returns an exit code."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes, Positional, arg

from treesearch import __version__
from treesearch import api as loop
from treesearch.budget import INFINITE, Budget
from treesearch.citations import bibtex
from treesearch.cli import probe
from treesearch.core.compiled import kept_in
from treesearch.core.tree import Tree, add_child
from treesearch.errors import BudgetError, KernelError, StoreError, TreeSearchError, UsageError, unknown
from treesearch.methods import METHODS
from treesearch.methods.base import Method
from treesearch.registry import registry as specs
from treesearch.registry import trust as trusting
from treesearch.report import best, outputs, plots, trees
from treesearch.report import tables as report
from treesearch.report.card import card, resume_command
from treesearch.report.progress import Progress
from treesearch.report.tables import say
from treesearch.results import certificate
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.redact import STRUCK
from treesearch.runs import files
from treesearch.runs import folder as runs
from treesearch.session.session import KEEP, Options, Session, Workers, read_result
from treesearch.text import file_name

Count = Annotated[str | None, arg(metavar="N|10k|2M")]
Seconds = Annotated[str | None, arg(metavar="S|90s|10m|1.5h")]
HARD = "digit(8) + 10*brightness()"  # a bold eight: best-of-n still rises after 800 samples
GUIDE = "kernel"  # as a reward: the one that guides the kernel
COMMAND = "command.json"
COMMAND_BYTES = 2**20
_NUMBER = re.compile(r"(\d[\d_]*\.?\d*|\.\d+)(e\d{1,2})?([a-z]?)", re.ASCII | re.IGNORECASE)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_CLOCK = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def count(text: str | None) -> int | None:
    """10k -> 10_000, 2M -> 2_000_000.

    Raises:
        UsageError: not a positive whole number.
    """
    if text is None:
        return None
    value = _read(text, _COUNTS, "10000, 10k or 2M")
    if value != int(value) or value > INFINITE:
        raise UsageError(f"{text!r} is no whole number below 2^62: write 10000, 10k or 2M")
    return int(value)


def seconds(text: str | None) -> float | None:
    """90 -> 90, 90s -> 90, 10m -> 600, 1.5h -> 5400.

    Raises:
        UsageError: not a positive duration.
    """
    return None if text is None else float(_read(text, _CLOCK, "90, 90s, 10m or 1.5h"))


def _read(text: str, units: Mapping[str, int], examples: str) -> Decimal:
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[3].lower() not in units:
        raise UsageError(f"{text!r} is no number: write {examples}")
    value = Decimal(found[1].replace("_", "") + (found[2] or "")) * units[found[3].lower()]
    if not value:
        raise UsageError(f"{text!r}: expected more than nothing, such as {examples}")
    return value


def pick(what: str, got: str, known: Iterable[str]) -> str:
    """Return `got` if it is known.

    Raises:
        UsageError: it is not; the message names the nearest.
    """
    if got not in (names := list(known)):
        raise UsageError(unknown(what, got, names))
    return got


@dataclass(frozen=True, kw_only=True)
class Command:
    """What all commands have."""

    debug: bool = False
    """show the traceback of an error"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budget of the whole search."""

    nfe: Count = None
    """network evaluations"""
    seconds: Seconds = None
    """wall clock, checked between waves"""
    reward_calls: Count = None
    """samples scored"""
    iterations: Count = None
    """units of the method: samples, populations, tree iterations"""

    def budget(self) -> Budget:
        """The limits as a `Budget`."""
        return Budget(
            nfe=count(self.nfe),
            seconds=seconds(self.seconds),
            reward_calls=count(self.reward_calls),
            iterations=count(self.iterations),
        )


@dataclass(frozen=True, kw_only=True)
class What:
    """What is searched."""

    kernel: str = "mnist"
    """a name, name(settings), package.module:attr or ./file.py:attr; see `treesearch list`"""
    reward: str = HARD
    """an expression over rewards, such as "2*digit(8) + compressibility()", package.module:attr or ./file.py:attr, or
    kernel: the reward that guides the kernel, as in tds(mnist(), digit(8))"""
    prompts: tuple[str, ...] = ()
    """one task each; none is one unconditional task"""
    seed: int = 0
    """of all noise"""
    batch_size: int = 64
    """rows of a forward pass"""

    def command(self) -> dict[str, str]:
        """The expressions as a run folder keeps them: they mean the same from any folder."""
        return written(self.kernel, self.reward)

    def options(self, keep_states: str = "all") -> Options:
        """How the search runs.

        Raises:
            UsageError: a setting out of range.
        """
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: expected 0..2^64-1")
        return Options(rows(self.batch_size), pick("keep_states", keep_states, KEEP))


def rows(batch_size: int) -> int:
    """Rows of a forward pass.

    Raises:
        UsageError: less than one.
    """
    if batch_size < 1:
        raise UsageError(f"{batch_size} rows of a forward pass: expected at least 1")
    return batch_size


def written(kernel: str, reward: str) -> dict[str, str]:
    """Expressions of a kernel and a reward with absolute paths; `kernel` as a reward is the one that guides it."""
    kernel = specs.absolute(kernel)
    reward = specs.guide(kernel) or GUIDE if reward == GUIDE else specs.absolute(reward)
    return {"kernel": kernel, "reward": reward}


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where it computes."""

    workers: int = 0
    """processes on Ray that share the work; 0 computes in this one"""
    gpus_per_worker: float = 0
    """GPUs of each worker; fractions share one"""
    reward_workers: int = 0
    """processes that only score; 0 scores where samples are made"""
    ray_address: str | None = None
    """a Ray cluster, "auto" or host:port; by default one is started on this machine"""
    on_interrupt: str = "drop"
    """what Ctrl-C does to the waves under way: drop, or drain (finish and record them)"""

    def asked(self) -> list[str]:
        """The options that were given."""
        return [f"--{name.replace('_', '-')}" for name, v in asdict(self).items() if v != getattr(Where, name)]

    @contextmanager
    def running(self) -> Iterator[Workers | None]:
        """The workers, while they run; None to compute here."""
        if not self.workers:
            if asked := self.asked():
                raise UsageError(f"{', '.join(asked)}: only with --workers N")
            yield None
            return
        from treesearch.distributed.engine import RayWorkers

        with RayWorkers(
            self.workers,
            self.gpus_per_worker,
            reward_workers=self.reward_workers,
            address=self.ray_address,
            on_interrupt=self.on_interrupt,
        ) as workers:
            yield workers


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Search with one method, into a run folder."""

    method: Any
    what: OmitArgPrefixes[What] = field(default_factory=What)
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    keep_states: str = "all"
    """all, frontier or none"""
    store: str | None = None
    """run folder; a new one under runs/ by default"""
    dry_run: bool = False
    """predict NFE, memory and the time of one process from one probe batch, and stop; leaves no folder"""
    json: bool = False
    """print the summary as JSON"""

    def run(self) -> int:
        options, budget, command = self.what.options(self.keep_states), self.limits.budget(), self.what.command()
        if self.dry_run and (asked := self.where.asked()):
            raise UsageError(f"{', '.join(asked)}: --dry-run predicts one process, leave it out")
        with self.where.running() as workers:
            kernel, reward = load(command, workers)
            session = loop.make_session(
                kernel, reward, self.method, list(self.what.prompts) or None, budget, self.what.seed, options, workers
            )
            if self.dry_run:
                return _print_estimate(probe.estimate(session), as_json=self.json)
            path = Path(self.store or _new_folder(type(self.method).__name__))
            begin(session, path, command)
            return drive(session, path, command, as_json=self.json)


def _new_folder(name: str) -> str:
    """A folder under runs/ that is not there yet."""
    name = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _unused(name, (str(path) for path in Path("runs").glob("*")))


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
    json: bool = False
    """print the summary as JSON"""

    def run(self) -> int:
        budget, size, path = self.limits.budget(), rows(self.batch_size), Path(self.path)
        command = told(path, kernel=self.kernel, reward=self.reward, trust=self.trust)
        with self.where.running() as workers:
            with of_folder(path, typed=bool(self.kernel and self.reward)):
                kernel, reward = load(command, workers)
            session = loop.open_session(
                path, kernel, reward, budget=None if budget.empty else budget, batch_size=size, workers=workers
            )
            if self.kernel or self.reward:  # they made the run's own, or `open_session` had refused them
                runs.write_json(path / COMMAND, kept(command))
            return drive(session, path, command, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Several methods at the same NFE: a progress line each, a table, pictures and a card."""

    methods: tuple[str, ...] = ("best_of_n", "fk", "dts", "dts_star")
    """names as in `run`, with its defaults, or with settings, such as "fk(num_particles=16)"; all: every method"""
    also: str | None = None
    """a reward that is not optimised, such as "brightness()": reported beside the one that is"""
    what: OmitArgPrefixes[What] = field(default_factory=What)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    nfe: Annotated[str, arg(metavar="N|10k|2M")] = "10k"
    """budget of each method"""
    store: str = "runs/compare"
    """folder for all of them"""
    json: bool = False
    """print the summaries as JSON"""

    def run(self) -> int:
        asked = specs.METHOD_NAMES if self.methods == ("all",) else self.methods
        methods: dict[str, Method] = {}
        for spec in asked:
            methods[_unused(file_name(spec.partition("(")[0].replace("-", "_")), methods)] = specs.method(spec)
        options, budget, command = self.what.options(), Budget(nfe=count(self.nfe)), self.what.command()
        with self.where.running() as workers:
            return self._run(methods, options, budget, command, workers)

    def _run(
        self,
        methods: dict[str, Method],
        options: Options,
        budget: Budget,
        command: dict[str, str],
        workers: Workers | None,
    ) -> int:
        kernel, reward = load(command, workers)
        also = None if self.also is None else as_reward(specs.reward(self.also))
        folder = Path(self.store)
        if (folder / "summary.json").exists():
            raise TreeSearchError(f"{folder} holds a comparison already: name another with --store, or remove it")
        asked = {
            "kernel": specs.public(self.what.kernel),
            "reward": specs.public(self.what.reward),
            "NFE of each": self.nfe,
            "seed": self.what.seed,
        } | ({} if self.also is None else {"not optimised": specs.public(self.also)})
        if not self.json:
            _print_asked(asked, methods)
        results: dict[str, SearchResult] = {}
        refused: dict[str, str] = {}
        for name, method in methods.items():
            path = folder / name
            try:
                session = self._session(path, kernel, reward, method, options, budget, command, workers)
                results[name] = finish(session, path, name, command, quiet=self.json)
            except (BudgetError, RewardError, KernelError, StoreError) as error:  # one must not hide the others
                refused[name] = f"not run: {error}"
        if not results:
            raise TreeSearchError("no method could run: " + "; ".join(f"{k}, {v}" for k, v in refused.items()))
        self._report(folder, asked, methods, results, also, refused)
        return 1 if refused and self.methods != ("all",) else 0  # of all of them, some are not for every model

    def _session(
        self,
        path: Path,
        kernel: Any,
        reward: Any,
        method: Method,
        options: Options,
        budget: Budget,
        command: dict[str, str],
        workers: Workers | None,
    ) -> Session:
        """A method's run: a new one, or what an interrupted comparison left of it."""
        prompts, seed = list(self.what.prompts) or None, self.what.seed
        if (path / "run.json").exists():
            session = loop.open_session(
                path, kernel, reward, budget=budget, batch_size=options.batch_size, workers=workers
            )
            if (session.method, session.seed, session.prompts) == (method, seed, prompts):
                return session
            session.close()
            raise StoreError(f"{path} holds another run: name another folder with --store, or remove it")
        session = loop.make_session(kernel, reward, method, prompts, budget, seed, options, workers)
        begin(session, path, command)
        return session

    def _report(
        self,
        folder: Path,
        asked: dict[str, Any],
        methods: dict[str, Method],
        results: dict[str, SearchResult],
        also: Reward | None,
        refused: dict[str, str],
    ) -> None:
        found = {name: report.summary(result) for name, result in results.items()}
        if also is not None:
            for name, result in results.items():
                for task, told in zip(result.tasks, found[name], strict=True):
                    told |= beside(task, also) | {"certificate": task.certificate(also).asdict()}
        runs.write_json(folder / "summary.json", found)
        records = [{"method": name, **task, **results[name].cost.as_dict()} for name in results for task in found[name]]
        files.write_text(folder / "comparison.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        columns = report.COLUMNS if also is None else (*report.COLUMNS, f"{also.name}, best", "draws")
        lines = [row for name, r in results.items() for row in report.rows(name, found[name], r.cost)]
        if also is not None:
            told = [task for name in results for task in found[name]]
            lines = [
                [*row, *map(report.figure, (t["also_best"], t["also_draws"]))]
                for row, t in zip(lines, told, strict=True)
            ]
        lines += [[name, *[report.DASH] * (len(columns) - 1)] for name in refused]
        pictures = []
        for name, result in results.items():
            if (sheet := outputs.contact_sheet(result.tasks[0], folder / f"{name}.png")) is not None:
                pictures.append((sheet.name, f"{name}: the best sixteen, then sixteen draws of its read-out"))
        pictures += outputs.if_plots(
            lambda: outputs.draw_curves(results, asked, folder / "reward.png"), "best reward against NFE"
        )
        notes = {name: [w for task in tasks for w in task["warnings"]] for name, tasks in found.items()}
        notes |= {name: [why] for name, why in refused.items()}
        settings = {f"settings of {name}": repr(method) for name, method in methods.items()}
        claimed = {k: v for name, tasks in found.items() for k, v in report.certified(name, tasks).items()}
        card(folder, "Comparison at equal NFE", asked | settings, lines, notes, pictures, claimed, columns)
        if self.json:
            say(json.dumps(found, indent=2))
            return
        report.print_table(lines, columns)
        for name, texts in notes.items():
            for text in texts:
                say(f"  {name}: {text}")
        for name, tasks in found.items():
            for task in tasks if also is not None else ():
                say(f"  {name}: {certificate.alarm_line(task['certificate']['alarm'])}")
        tops = {
            name: max((t["best"] for t in tasks if t["best"] is not None), default=None)
            for name, tasks in found.items()
        }
        scored = {name: top for name, top in tops.items() if top is not None}
        say(f"\nhighest reward: {max(scored, key=scored.__getitem__) if scored else 'none is finite'}")
        say(f"pictures and card: {folder / 'README.md'}")


def _unused(name: str, used: Iterable[str]) -> str:
    """The name, with a number behind it if it is taken."""
    taken = set(used)
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)


@dataclass(frozen=True, kw_only=True)
class Ls(Command):
    """List runs."""

    folder: Positional[str] = "runs"
    json: bool = False
    """print JSON"""

    def run(self) -> int:
        found = sorted(p.parent for p in Path(self.folder).rglob("run.json"))
        listed = [self._line(path) for path in found]
        if self.json:
            say(json.dumps(listed, indent=2))
        elif listed:
            rows = [[report.DASH if v is None else str(v) for v in run.values()] for run in listed]
            report.print_table(rows, ("run", "method", "status", "NFE", "best"))
        else:
            say(f"no runs under {self.folder}")
        return 0

    @staticmethod
    def _line(path: Path) -> dict[str, Any]:
        """A run's line; of one that cannot be read its error, so that it hides none of the others."""
        try:
            config = runs.read_config(path)
            blocks, _ = runs.read_log(path, config)
            last = blocks[-1].meta["history"] if blocks else None
            best = last["best_reward"] if last else None
            return {
                "run": str(path),
                "method": config["method"]["name"],
                "status": runs.status(path, config),
                "nfe": last["nfe"] if last else 0,
                "best": None if best is None else round(best, 3),
            }
        except Exception as error:
            return {"run": str(path), "method": None, "status": _brief(error), "nfe": None, "best": None}


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """One run: what was asked, what came out, what it may claim, the tree by level."""

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
        name, tasks = config["method"]["name"], report.summary(result)
        if self.json:
            found = {"tasks": tasks, "cost": result.cost.as_dict()}
            told = {"config": config, "summary": found, "last": result.history[-1:], "levels": levels}
            say(json.dumps(told | {"certificates": [task["certificate"] for task in tasks]}, indent=2))
            return 0
        say(f"status   {runs.status(self.path, config)}")
        for key in ("method", "seed", "prompts", "kernel", "reward", "budget", "versions"):
            say(f"{key:<9}{config[key]}")
        report.print_table(report.rows(name, tasks, result.cost))
        for task in tasks:
            for warning in task["warnings"]:
                say(f"  note: {warning}")
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
        number = _task(self.task, len(result.tasks))
        title = f"{config['method']['name']} on {config['kernel']}, reward {config['reward']}"
        thumbnails = best.pictures(path / "outputs" / "best", number)
        trees.draw_tree(trees.layout(result.tasks[number].tree), out, title=title, pictures=thumbnails)


def _task(asked: int | None, tasks: int) -> int:
    """The number of a task, the first if none is asked for.

    Raises:
        UsageError: there is none of that number.
    """
    if asked is not None and not 0 <= asked < tasks:
        raise UsageError(f"--task {asked}: this run has tasks 0..{tasks - 1}")
    return asked or 0


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """A run as graphml, csv (nodes), npz (samples, rewards, weights), png (contact sheet) or minari (episodes)."""

    path: Positional[str]
    to: Positional[str]
    out: str | None = None
    """file; in the run's folder by default. minari: the dataset's folder, named like plans-v0"""
    task: int | None = None
    """which task; the first by default, for minari all of them"""
    draws: int | None = None
    """minari: this many draws of each task's estimate of π, in place of every leaf"""
    best: int | None = None
    """minari: this many of the best of each task, in place of every leaf"""
    observation: int | None = None
    """minari: channels of an observation, where the kernel does not know"""
    action: int | None = None
    """minari: channels of an action, where the kernel does not know"""
    kernel: str | None = None
    """npz, png, minari: how to make the run's kernel, in place of what its folder says"""
    trust: bool = False
    """npz, png, minari: load the code and weights that a folder names which you did not make here yourself"""

    def run(self) -> int:
        pick("export", self.to, ("graphml", "csv", "npz", "png", "minari"))
        self._check()
        number = _task(self.task, len(runs.read_config(self.path)["prompts"] or [None]))
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
        given = {
            name for name in ("draws", "best", "observation", "action", "kernel") if getattr(self, name) is not None
        }
        given |= {"trust"} if self.trust else set()
        decodes = {"kernel", "trust"} if self.to in ("npz", "png", "minari") else set()
        episodes = {"draws", "best", "observation", "action"} if self.to == "minari" else set()
        if asked := sorted(given - decodes - episodes):
            raise UsageError(f"{', '.join(f'--{name}' for name in asked)}: not with {self.to}")
        if {"draws", "best"} <= given:
            raise UsageError("--draws and --best are two datasets: ask for one of them")

    def _episodes(self) -> int:
        from treesearch.export import minari

        kernel, result = self._result()
        name = Path(self.path).resolve().name + ("" if self.task is None else f"-task{self.task}")
        chosen = {what: getattr(self, what) for what in ("task", "draws", "best", "observation", "action")}
        folder = self.out or files.subfolder(Path(self.path) / "minari") / minari.named(name)
        out = minari.write_minari(result, folder, kernel, **chosen)
        say(f"{out}\nload it with MINARI_DATASETS_PATH={out.resolve().parent} and minari.load_dataset({out.name!r})")
        return 0

    def _result(self) -> tuple[Any, SearchResult]:
        """The kernel and the result, which the kernel decodes; the reward is not needed, and not made."""
        path = Path(self.path)
        config = runs.read_config(path)
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


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """How fast a kernel runs bare at several batch sizes, and how much of that a search keeps."""

    kernel: str = "mnist"
    """as in `run`"""
    reward: str = "constant(0)"
    """as in `run`"""
    batch_sizes: tuple[int, ...] = (1, 16, 32, 64)
    """rows of a forward pass"""
    json: bool = False
    """print JSON"""

    def run(self) -> int:
        sizes = tuple(map(rows, self.batch_sizes))
        found = probe.speed(specs.kernel(self.kernel), as_reward(specs.reward(self.reward)), sizes)
        if self.json:
            say(json.dumps(found, indent=2))
        else:
            lines = [
                [str(r["batch_size"]), *(f"{r[k]:.0f}" for k in ("bare", "search")), f"{r['ratio']:.3f}"] for r in found
            ]
            report.print_table(lines, ("batch", "bare NFE/s", "search NFE/s", "ratio"))
        return 0


@dataclass(frozen=True, kw_only=True)
class Names(Command):
    """Kernels, rewards, methods and their choices; `list rewards` tells what each reward needs."""

    what: Positional[str | None] = None
    """kernels, rewards, methods, potentials, resampling, selection or backups; all of them by default"""

    def run(self) -> int:
        from treesearch.core import backup, resampling, selection
        from treesearch.rewards.potentials import POTENTIALS

        names = {
            "kernels": specs.KERNELS,
            "rewards": specs.REWARDS,
            "methods": specs.METHOD_NAMES,
            "potentials": POTENTIALS,
            "resampling": resampling.SCHEMES,
            "selection": selection.RULES,
            "backups": backup.RULES,
        }
        if self.what is not None:
            pick("list", self.what, names)
        if self.what == "rewards":
            _print_rewards()
        elif self.what is not None:
            say("\n".join(names[self.what]))
        else:
            say("\n".join(f"{what:<12}{', '.join(found)}" for what, found in names.items()))
        return 0


@dataclass(frozen=True, kw_only=True)
class Env(Command):
    """Versions and devices, for a bug report."""

    def run(self) -> int:
        from importlib.metadata import PackageNotFoundError, version

        say(f"treesearch {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
        names = ("torch", "numpy", "numba", "diffusers", "transformers", "ray", "safetensors", "tyro", "matplotlib")
        for name in names:
            try:
                say(f"{name} {version(name)}")
            except PackageNotFoundError:
                say(f"{name}: not installed")
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        say(f"threads {torch.get_num_threads()}, CUDA {', '.join(devices) or 'none'}")
        say(f"compiled code: {_kept()}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Cite(Command):
    """BibTeX of the papers behind methods (all, or a run's)."""

    path: Positional[str | None] = None

    def run(self) -> int:
        names = list(METHODS) if self.path is None else [runs.read_config(self.path)["method"]["name"]]
        say(bibtex(names))
        return 0


def load(command: Mapping[str, str], workers: Workers | None = None) -> tuple[Any, Any]:
    """A kernel and a reward from their expressions; with workers, how they make them.

    Raises:
        UsageError: the guide of a kernel was asked for as the reward, and it has none.
    """
    if workers is not None and command["reward"] != GUIDE:
        return specs.Recipe(command["kernel"]), specs.Recipe(command["reward"])
    kernel = specs.kernel(command["kernel"]) if workers is None else None
    if command["reward"] != GUIDE:
        return kernel, specs.reward(command["reward"])
    if (reward := getattr(kernel, "scores", None)) is None:
        raise UsageError(
            f"--reward kernel: {command['kernel']} shows no reward that guides it, as tds(mnist(), digit(8)) does: "
            "name the reward"
        )
    return kernel, reward


def begin(session: Session, path: Path, command: Mapping[str, str]) -> None:
    """Start a new run in a folder, which keeps how to make its kernel and reward."""
    session.start(path, {COMMAND: kept(command)})


def kept(command: Mapping[str, str]) -> dict[str, Any]:
    """The command as a run folder keeps it: without secrets, with the mark of who made it."""
    return trusting.signed({what: specs.public(command[what]) for what in ("kernel", "reward")})


def drive(session: Session, path: Path, command: Mapping[str, str], *, as_json: bool) -> int:
    """Run a session to its end and report; Ctrl-C leaves a run that can be resumed."""
    name = session.method.__class__.__name__
    try:
        result = finish(session, path, name, command, quiet=as_json)
    except KeyboardInterrupt:
        say(f"\ninterrupted; the run is saved, go on with:\n  {resume_command(path)}")
        return 130
    found = {"tasks": report.summary(result), "cost": result.cost.as_dict(), "store": str(path)}
    if as_json:
        say(json.dumps(found, indent=2))
        return 0
    report.print_table(report.rows(name, found["tasks"], result.cost))
    for task in found["tasks"]:
        for warning in task["warnings"]:
            say(f"  note: {warning}")
    if session.lost is not None:
        return 1
    say(path / "README.md")
    return 0


def finish(session: Session, path: Path, name: str, command: Mapping[str, str], *, quiet: bool) -> SearchResult:
    """Run with a progress line, then write outputs and the card."""
    with Progress(name, quiet=quiet) as progress:
        for snapshot in session.waves():
            progress(snapshot)
        result = session.result()
        progress.settle(sum(task.diagnostics["ess"] for task in result.tasks))
    if session.lost is None:  # else there is no folder to write to
        asked = {key: specs.public(command[key]) for key in ("kernel", "reward")}
        outputs.write_outputs(result, path, name=name, asked=asked)
    return result


def beside(task: TaskResult, also: Reward) -> dict[str, float | None]:
    """Mean of a reward that was not optimised, over the best sixteen samples and over the read-out's draws."""
    if not len(task.leaves):
        return {"also_best": None, "also_draws": None}

    def mean(samples: Any) -> float | None:
        values = also(samples, None if task.prompt is None else [task.prompt] * len(samples))
        return float(values.mean()) if values.isfinite().all() else None

    drawn = np.isfinite(task.readout.log_weights.max())
    return {
        "also_best": mean(task.best(outputs.PICTURED // 2)[0]),
        "also_draws": mean(task.draw(outputs.PICTURED)) if drawn else None,
    }


def told(
    path: Path,
    *,
    kernel: str | None = None,
    reward: str | None = None,
    trust: bool = False,
    wanted: Sequence[str] = ("kernel", "reward"),
) -> dict[str, str]:
    """How to make what is wanted of a run's kernel and reward: as is typed, else as the folder says.

    Raises:
        StoreError: the folder does not say, or says what it takes `--trust` to follow.
    """
    typed = {what: text for what, text in (("kernel", kernel), ("reward", reward)) if text is not None}
    rest = [what for what in wanted if what not in typed]
    saved = read_command(path) if rest else {}
    if struck := [what for what in rest if STRUCK in saved[what]]:
        raise StoreError(
            f"{path} keeps {', '.join(f'its {what} as {saved[what]}' for what in struck)}, without what may be secret: "
            f"say it again with {' and '.join(f'--{what}' for what in struck)}"
        )
    with of_folder(path, typed=not rest):
        if not trust:
            trusting.check(path, saved, rest)
        for name in (name for what in rest for name in trusting.reaches(saved[what])):
            say(f"treesearch: {path} names {name}, loading it", error=True)
    command = saved | typed
    return written(command["kernel"], command.get("reward", ""))


@contextmanager
def of_folder(path: Path, *, typed: bool) -> Iterator[None]:
    """Expressions that cannot be read are wrong usage where they were typed, else a folder that is no good."""
    try:
        yield
    except UsageError as error:
        if typed:
            raise
        raise StoreError(f"{path / COMMAND}: {error}") from error


def read_command(path: Path) -> dict[str, str]:
    """The kernel and reward expressions of a run made by the command line, and the mark of who made it.

    Raises:
        StoreError: the run was made from Python, or the file is no such thing.
    """
    file = path / COMMAND
    if not file.exists():
        runs.read_config(path)
        raise StoreError(
            f"{path} was made from Python, where kernel and reward are objects: say how to make them with "
            f"--kernel and --reward, or use treesearch.resume({str(path)!r}, kernel, reward)"
        )
    try:
        with files.reading(file, COMMAND_BYTES) as opened:
            found = json.loads(opened.read())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(k), str) for k in ("kernel", "reward")):
        raise StoreError(f'{file} is damaged: expected {{"kernel": "...", "reward": "..."}}')
    return {key: value for key, value in found.items() if isinstance(value, str)}


def read_result_of(path: str | Path) -> tuple[dict[str, Any], SearchResult]:
    """Configuration and result of a run folder, without its kernel: everything but the decoded samples."""
    config = runs.read_config(path)
    return config, read_result(config, runs.read_log(Path(path), config)[0])


def _brief(error: Exception) -> str:
    """An error in a table's cell."""
    return str(error) if isinstance(error, TreeSearchError) else f"{type(error).__name__}: {error}"


def _level(task: int, tree: Tree, t: int) -> list[Any]:
    at = tree.t == t
    shown = np.where(np.isnan(tree.value), tree.reward, tree.value)[at]
    shown = shown[np.isfinite(shown)]
    mean = round(float(shown.mean()), 4) if len(shown) else None
    return [task, int(t), int(at.sum()), int(tree.visits[at].sum()), mean]


def _kept() -> str:
    """Where compiled code is kept."""
    if (folder := kept_in(add_child)) is not None:
        return f"kept in {folder}"
    return "compiled in every process, some ten seconds at its first search: NUMBA_CACHE_DIR=FOLDER keeps it"


def _print_rewards() -> None:
    """Three lines a reward: its values, what it takes and leaves unread, what it needs and where it comes from."""
    for name, path in specs.REWARDS.items():
        factory = specs.load(path)
        known = getattr(factory, "facts", None)
        if known is None:
            say(f"{name:<22}{(factory.__doc__ or '').strip().splitlines()[0]}")
            continue
        parts = [
            "differentiable" if known.differentiable else "no gradient",
            "needs prompts" if known.prompts else "",
            known.memory,
            f"{known.checkpoint} ({known.licence})" if known.checkpoint else "",
            known.source,
        ]
        lines = (known.range, known.limits, "; ".join(part for part in parts if part))
        say(f"{name:<22}" + f"\n{'':<22}".join(line for line in lines if line))


def _print_estimate(found: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        say(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            if isinstance(value, dict):
                say(key)
                for name, size in value.items():
                    say(f"  {name:<30}{_size(size):>12}")
            else:
                say(f"{key:<22}{value}")
    return 0


def _size(count: int) -> str:
    """Bytes, to read."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{count} B"


def _print_asked(asked: dict[str, Any], methods: dict[str, Method]) -> None:
    for key, value in asked.items():
        say(f"{key:<12} {value}")
    for name, method in methods.items():
        settings = ", ".join(f"{k}={v}" for k, v in asdict(method).items() if v is not None)
        say(f"{name:<12} {settings}")
    say()
