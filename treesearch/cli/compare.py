"""`compare`: several methods at the same NFE."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from treesearch import api as loop
from treesearch.budget import Budget
from treesearch.cli.arguments import What, Where, count, load
from treesearch.cli.base import Command
from treesearch.cli.run import finish
from treesearch.cli.saved import begin
from treesearch.comparing import collect, goes_on, name_methods, new_folder
from treesearch.loggers.named import named
from treesearch.methods.base import Method
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.report import comparison as report
from treesearch.report import tables
from treesearch.report.terminal import say
from treesearch.results.comparison import Comparison
from treesearch.results.result import SearchResult
from treesearch.results.text import alarm_line
from treesearch.rewards.base import as_reward
from treesearch.session.interfaces import Options, Workers
from treesearch.session.session import Session


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Several methods at the same NFE: a progress line each, a table, who reached best-of-N's best first, whom to take;
    pictures and a card."""

    methods: tuple[str, ...] = ("best_of_n", "tree_sampling", "tree_search", "fk", "dts_star")
    """names as in `run`, with its defaults, or with settings, such as "fk(num_particles=16)"; all: every method"""
    also: str | None = None
    """a reward that is not optimised, such as "brightness()": reported beside the one that is"""
    what: OmitArgPrefixes[What] = field(default_factory=What)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    nfe: Annotated[str, arg(metavar="N|10k|2M")] = "10k"
    """budget of each method"""
    store: str = "runs/compare"
    """folder for all of them"""
    log: tuple[str, ...] = ()
    """also send figures and the best samples of each to tensorboard (files in its folder), wandb, mlflow or trackio"""
    json: bool = False
    """print the summaries as JSON"""

    def run(self) -> int:
        methods = name_methods(tuple(specs.METHOD_NAMES) if self.methods == ("all",) else self.methods)
        options, budget, command = self.what.options(), Budget(nfe=count(self.nfe)), self.what.command()
        prompts, folder = self.what.asked(), new_folder(self.store)
        assert folder is not None
        logs = {name: [named(to, folder / name, f"{folder.name}-{name}") for to in self.log] for name in methods}
        with self.where.running() as workers:
            kernel, reward = load(command, workers)
            also = None if self.also is None else as_reward(specs.reward(self.also))
            if not self.json:
                _print_asked(self._asked(), methods)

            def search(name: str, method: Method) -> SearchResult:
                path = folder / name
                session = self._session(path, kernel, reward, method, prompts, options, budget, command, workers)
                return finish(session, path, name, command, quiet=self.json, callbacks=logs[name])

            found = collect(methods, search, also)
            card = report.write(found, folder, self._asked())
        self._print(found, card)
        return 1 if found.refused and self.methods != ("all",) else 0  # of all of them, some are not for every model

    def _asked(self) -> dict[str, Any]:
        asked = {
            "kernel": expressions.public(self.what.kernel),
            "reward": expressions.public(self.what.scored_by()),
            "NFE of each": self.nfe,
            "seed": self.what.seed,
        }
        return asked | ({} if self.also is None else {"not optimised": expressions.public(self.also)})

    def _session(
        self,
        path: Path,
        kernel: Any,
        reward: Any,
        method: Method,
        prompts: list[str] | None,
        options: Options,
        budget: Budget,
        command: dict[str, str],
        workers: Workers | None,
    ) -> Session:
        """A method's run: a new one, or what an interrupted comparison left of it."""
        seed = self.what.seed
        if goes_on(path, method, prompts, seed):
            return loop.open_session(
                path, kernel, reward, budget=budget, batch_size=options.batch_size, workers=workers
            )
        session = loop.make_session(kernel, reward, method, prompts, budget, seed, options, workers)
        begin(session, path, command)
        return session

    def _print(self, found: Comparison, card: Path) -> None:
        tasks = report.summary(found)
        if self.json:
            say(json.dumps(tasks, indent=2))
            return
        tables.print_table(*report.table(found, tasks))
        for name, texts in report.notes(found, tasks).items():
            for text in texts:
                say(f"  {name}: {text}")
        for name, told in tasks.items() if found.also is not None else ():
            for task in told:
                say(f"  {name}: {alarm_line(task['certificate']['alarm'])}")
        say("\n" + "\n".join([*found.headline(), "", *found.advice()]))
        say(f"pictures and card: {card}")


def _print_asked(asked: dict[str, Any], methods: dict[str, Method]) -> None:
    for key, value in asked.items():
        say(f"{key:<12} {value}")
    for name, method in methods.items():
        settings = ", ".join(f"{k}={v}" for k, v in asdict(method).items() if v is not None)
        say(f"{name:<12} {settings}")
    say()
