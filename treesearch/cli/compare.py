"""`compare`: several methods at the same NFE."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import OmitArgPrefixes, arg

from treesearch import api as loop
from treesearch.budget import Budget
from treesearch.cli.arguments import Command, What, Where, count, load, unused
from treesearch.cli.run import finish
from treesearch.cli.saved import begin
from treesearch.errors import BudgetError, KernelError, StoreError, TreeSearchError
from treesearch.methods.base import Method
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.report import outputs
from treesearch.report import tables as report
from treesearch.report.card import card
from treesearch.report.tables import say
from treesearch.results.result import SearchResult, TaskResult
from treesearch.results.text import alarm_line
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.runs import files
from treesearch.runs.files import write_json
from treesearch.session.interfaces import Options, Workers
from treesearch.session.session import Session
from treesearch.text import file_name


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
            methods[unused(file_name(spec.partition("(")[0].replace("-", "_")), methods)] = specs.method(spec)
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
            "kernel": expressions.public(self.what.kernel),
            "reward": expressions.public(self.what.reward),
            "NFE of each": self.nfe,
            "seed": self.what.seed,
        } | ({} if self.also is None else {"not optimised": expressions.public(self.also)})
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
        write_json(folder / "summary.json", found)
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
                say(f"  {name}: {alarm_line(task['certificate']['alarm'])}")
        tops = {
            name: max((t["best"] for t in tasks if t["best"] is not None), default=None)
            for name, tasks in found.items()
        }
        scored = {name: top for name, top in tops.items() if top is not None}
        say(f"\nhighest reward: {max(scored, key=scored.__getitem__) if scored else 'none is finite'}")
        say(f"pictures and card: {folder / 'README.md'}")


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


def _print_asked(asked: dict[str, Any], methods: dict[str, Method]) -> None:
    for key, value in asked.items():
        say(f"{key:<12} {value}")
    for name, method in methods.items():
        settings = ", ".join(f"{k}={v}" for k, v in asdict(method).items() if v is not None)
        say(f"{name:<12} {settings}")
    say()
