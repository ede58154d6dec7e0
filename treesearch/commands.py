"""The commands of the command line: frozen dataclasses with a `run` that returns an exit code."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes, Positional, arg

from rewards.base import Reward, RewardError
from treesearch import __version__, certificate, loop, plots, probe, report, runs, specs
from treesearch.budget import Budget, Cost
from treesearch.citations import bibtex
from treesearch.compiled import kept_in
from treesearch.errors import BudgetError, KernelError, TreeSearchError, choose
from treesearch.methods import METHODS
from treesearch.methods.base import Method
from treesearch.result import SearchResult, TaskResult
from treesearch.session import Options, Session, Workers, read_result
from treesearch.tree import Tree, add_child

Count = Annotated[str | None, arg(metavar="N|10k|2M")]
HARD = "digit(8) + 10*brightness()"  # a bold eight: best-of-n still rises after 800 samples
PICTURED = 32  # samples on a contact sheet


def count(text: str | None) -> int | None:
    """10k -> 10_000, 2M -> 2_000_000.

    Raises:
        ValueError: not a number.
    """
    if text is None:
        return None
    scale = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 1)
    try:
        return round(float(text[:-1] if scale > 1 else text.replace("_", "")) * scale)
    except ValueError as error:
        raise ValueError(f"{text!r} is no number: write 10000, 10k or 2M") from error


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budget of the whole search."""

    nfe: Count = None
    """network evaluations"""
    seconds: float | None = None
    """wall clock, checked between waves"""
    reward_calls: Count = None
    """samples scored"""
    iterations: Count = None
    """units of the method: samples, populations, tree iterations"""

    def budget(self) -> Budget:
        """The limits as a `Budget`."""
        return Budget(
            nfe=count(self.nfe),
            seconds=self.seconds,
            reward_calls=count(self.reward_calls),
            iterations=count(self.iterations),
        )


@dataclass(frozen=True, kw_only=True)
class What:
    """What is searched."""

    kernel: str = "mnist"
    """a name, name(settings), package.module:attr or ./file.py:attr; see `treesearch list`"""
    reward: str = HARD
    """an expression over rewards, such as "2*digit(8) + compressibility()", or package.module:attr"""
    prompts: tuple[str, ...] = ()
    """one task each; none is one unconditional task"""
    seed: int = 0
    """of all noise"""
    batch_size: int = 64
    """rows of a forward pass"""

    def load(self, workers: Workers | None = None) -> tuple[Any, Any]:
        """The kernel and the reward; with workers, how they make them."""
        return load(self.kernel, self.reward, workers)


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

    @contextmanager
    def running(self) -> Iterator[Workers | None]:
        """The workers, while they run; None to compute here."""
        if not self.workers:
            if asked := [
                f"--{name.replace('_', '-')}" for name, v in asdict(self).items() if v != getattr(Where, name)
            ]:
                raise TreeSearchError(f"{', '.join(asked)}: only with --workers N")
            yield None
            return
        from treesearch.distributed import RayWorkers

        with RayWorkers(
            self.workers,
            self.gpus_per_worker,
            reward_workers=self.reward_workers,
            address=self.ray_address,
            on_interrupt=self.on_interrupt,
        ) as workers:
            yield workers


@dataclass(frozen=True, kw_only=True)
class Run:
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
    """predict NFE, memory and the time of one process from one probe batch, and stop"""
    json: bool = False
    """print the summary as JSON"""

    def run(self) -> int:
        if self.dry_run:
            return _print_estimate(probe.estimate(self._session(None)), as_json=self.json)
        path = Path(self.store or f"runs/{type(self.method).__name__}-{time.strftime('%Y%m%d-%H%M%S')}")
        with self.where.running() as workers:
            session = self._session(workers)
            session.start(path)
            runs.write_json(path / "command.json", {"kernel": self.what.kernel, "reward": self.what.reward})
            return drive(session, path, as_json=self.json)

    def _session(self, workers: Workers | None) -> Session:
        kernel, reward = self.what.load(workers)
        options, prompts = Options(self.what.batch_size, self.keep_states), list(self.what.prompts) or None
        return loop.make_session(
            kernel, reward, self.method, prompts, self.limits.budget(), self.what.seed, options, workers
        )


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run, interrupted or finished; limits count from its start."""

    path: Positional[str]
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    batch_size: int = 64
    """rows of a forward pass"""
    json: bool = False
    """print the summary as JSON"""

    def run(self) -> int:
        what, budget = read_command(self.path), self.limits.budget()
        with self.where.running() as workers:
            kernel, reward = load(what["kernel"], what["reward"], workers)
            budget = None if budget.empty else budget
            session = loop.open_session(
                self.path, kernel, reward, budget=budget, batch_size=self.batch_size, workers=workers
            )
            return drive(session, Path(self.path), as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Several methods at the same NFE: a progress line each, a table, pictures and a card."""

    methods: tuple[str, ...] = (
        "best_of_n",
        "fk",
        "dts(widening_c=1, widening_alpha=0.5)",
        "dts_star(widening_c=1, widening_alpha=0.5)",
    )
    """names with settings, such as "fk(num_particles=16)", or all: every method by its defaults"""
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
        with self.where.running() as workers:
            return self._run(workers)

    def _run(self, workers: Workers | None) -> int:
        names = tuple(specs.METHOD_NAMES) if self.methods == ("all",) else self.methods
        methods = {spec: specs.method(spec) for spec in names}
        kernel, reward = self.what.load(workers)
        also = None if self.also is None else specs.reward(self.also)
        folder = Path(self.store)
        if (folder / "summary.json").exists():
            raise TreeSearchError(f"{folder} holds a comparison already: name another with --store, or remove it")
        asked = {
            "kernel": self.what.kernel,
            "reward": self.what.reward,
            "NFE of each": self.nfe,
            "seed": self.what.seed,
        } | ({} if self.also is None else {"not optimised": self.also})
        if not self.json:
            _print_asked(asked, methods)
        results: dict[str, SearchResult] = {}
        refused: dict[str, str] = {}
        for spec, method in methods.items():
            name = spec.partition("(")[0].replace("-", "_")
            name = name if name not in results else f"{name}_{len(results)}"
            try:
                session = self._session(folder / name, kernel, reward, method, workers)
                results[name] = finish(session, folder / name, name, quiet=self.json)
            except (BudgetError, RewardError, KernelError) as error:  # not for this model, reward or budget
                if self.methods != ("all",):
                    raise
                refused[name] = f"not run: {error}"
        if not results:
            raise TreeSearchError("no method could run: " + "; ".join(f"{k}, {v}" for k, v in refused.items()))
        return self._report(folder, asked, methods, results, also, refused)

    def _session(self, path: Path, kernel: Any, reward: Any, method: Method, workers: Workers | None) -> Session:
        """A method's run: a new one, or what an interrupted comparison left of it."""
        budget, size = Budget(nfe=count(self.nfe)), self.what.batch_size
        if (path / "run.json").exists():
            session = loop.open_session(path, kernel, reward, budget=budget, batch_size=size, workers=workers)
            if (session.method, session.seed) == (method, self.what.seed):
                return session
            session.close()
            raise TreeSearchError(f"{path} holds another run: name another folder with --store, or remove it")
        prompts = list(self.what.prompts) or None
        session = loop.make_session(kernel, reward, method, prompts, budget, self.what.seed, Options(size), workers)
        session.start(path)
        runs.write_json(path / "command.json", {"kernel": self.what.kernel, "reward": self.what.reward})
        return session

    def _report(
        self,
        folder: Path,
        asked: dict[str, Any],
        methods: dict[str, Method],
        results: dict[str, SearchResult],
        also: Reward | None,
        refused: dict[str, str],
    ) -> int:
        found = {name: report.summary(result) for name, result in results.items()}
        if also is not None:
            for name, result in results.items():
                for task, told in zip(result.tasks, found[name], strict=True):
                    told |= beside(task, also) | {"certificate": task.certificate(also).asdict()}
        runs.write_json(folder / "summary.json", found)
        records = [{"method": name, **task, **results[name].cost.as_dict()} for name in results for task in found[name]]
        (folder / "comparison.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
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
            if (sheet := contact_sheet(result.tasks[0], folder / f"{name}.png")) is not None:
                pictures.append((sheet.name, f"{name}: the best sixteen, then sixteen draws of its read-out"))
        curves = {name: plots.curve(result.history) for name, result in results.items()}
        pictures += _if_plots(lambda: plots.draw_curves(curves, folder / "reward.png"), "best reward against NFE")
        notes = {name: [w for task in tasks for w in task["warnings"]] for name, tasks in found.items()}
        notes |= {name: [why] for name, why in refused.items()}
        settings = {f"method {i + 1}": repr(m) for i, m in enumerate(methods.values())}
        claimed = {k: v for name, tasks in found.items() for k, v in report.certified(name, tasks).items()}
        report.card(folder, "Comparison at equal NFE", asked | settings, lines, notes, pictures, claimed, columns)
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            report.print_table(lines, columns)
            for name, texts in notes.items():
                for text in texts:
                    print(f"  {name}: {text}")
            for name, tasks in found.items():
                for task in tasks if also is not None else ():
                    print(f"  {name}: {certificate.alarm_line(task['certificate']['alarm'])}")
            best = max(found, key=lambda name: max(t["best"] for t in found[name] if t["best"] is not None))
            print(f"\nhighest reward: {best}\npictures and card: {folder / 'README.md'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Ls:
    """List runs."""

    folder: Positional[str] = "runs"
    json: bool = False
    """print JSON"""

    def run(self) -> int:
        found = sorted(p.parent for p in Path(self.folder).rglob("run.json"))
        listed = [self._line(path) for path in found]
        if self.json:
            print(json.dumps(listed, indent=2))
        elif listed:
            rows = [[report.DASH if v is None else str(v) for v in run.values()] for run in listed]
            report.print_table(rows, ("run", "method", "status", "NFE", "best"))
        else:
            print(f"no runs under {self.folder}")
        return 0

    @staticmethod
    def _line(path: Path) -> dict[str, Any]:
        try:
            config = runs.read_config(path)
        except TreeSearchError as error:
            return {"run": str(path), "method": None, "status": str(error), "nfe": None, "best": None}
        last = None
        for block, _ in runs.read_blocks(path):
            last = block.meta["history"]
        best = last["best_reward"] if last else None
        return {
            "run": str(path),
            "method": config["method"]["name"],
            "status": runs.status(path, config),
            "nfe": last["nfe"] if last else 0,
            "best": None if best is None else round(best, 3),
        }


@dataclass(frozen=True, kw_only=True)
class Show:
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
        tasks = report.summary(result)
        file = Path(self.path) / "summary.json"
        found = json.loads(file.read_text("utf-8")) if file.exists() else None
        if self.json:
            told = {"config": config, "summary": found, "last": result.history[-1:], "levels": levels}
            print(json.dumps(told | {"certificates": [task["certificate"] for task in tasks]}, indent=2))
            return 0
        print(f"status   {runs.status(self.path, config)}")
        for key in ("method", "seed", "prompts", "kernel", "reward", "budget", "versions"):
            print(f"{key:<9}{config[key]}")
        if found:
            report.print_table(report.rows(config["method"]["name"], found["tasks"], Cost(**found["cost"])))
            for task in found["tasks"]:
                print("".join(f"  note: {w}\n" for w in task["warnings"]), end="")
        report.print_table([[str(v) for v in row] for row in levels], ("task", "t", "nodes", "visits", "mean value"))
        for name, claimed in report.certified(config["method"]["name"], tasks).items():
            print("\n".join([f"\ncertificate of {name}", *(f"  {line}" for line in claimed)]))
        return 0


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture of one or more runs."""

    paths: Positional[tuple[str, ...]]
    what: str = "reward"
    """reward (best reward against NFE) or tree"""
    out: str | None = None
    """PNG file; in the first run's folder by default"""

    def run(self) -> int:
        choose("plot", self.what, ("reward", "tree"))
        if not self.paths:
            raise TreeSearchError("name at least one run folder")
        out = Path(self.out or Path(self.paths[0]) / f"{self.what}.png")
        read = {path: read_run(path) for path in self.paths}
        if self.what == "reward":
            plots.draw_curves({Path(p).name: plots.curve(history) for p, (_, _, history) in read.items()}, out)
        else:
            plots.draw_tree(plots.layout(read[self.paths[0]][1][0]), out)
        print(out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
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

    def run(self) -> int:
        choose("export", self.to, ("graphml", "csv", "npz", "png", "minari"))
        tasks = len(runs.read_config(self.path)["prompts"] or [None])
        if self.task is not None and not 0 <= self.task < tasks:
            raise TreeSearchError(f"--task {self.task}: this run has tasks 0..{tasks - 1}")
        if self.to == "minari":
            return self._episodes()
        if asked := [f"--{name}" for name in ("draws", "best", "observation", "action") if getattr(self, name)]:
            raise TreeSearchError(f"{', '.join(asked)}: only with minari")
        number = self.task or 0
        out = Path(self.out or Path(self.path) / f"task{number}.{self.to}")
        if self.to in ("graphml", "csv"):
            from treesearch.export import write_csv, write_graphml

            tree = read_run(self.path)[1][number]
            (write_graphml if self.to == "graphml" else write_csv)(tree, out)
        else:
            task = self._result()[1].tasks[number]
            if self.to == "png" and contact_sheet(task, out) is None:
                raise TreeSearchError("the samples of this run are no images: export npz")
            if self.to == "npz":
                rewards, log_weights = task.rewards.numpy(), task.log_weights.numpy()
                np.savez_compressed(out, samples=np.asarray(task.samples), rewards=rewards, log_weights=log_weights)
        print(out)
        return 0

    def _episodes(self) -> int:
        from treesearch.export import minari

        kernel, result = self._result()
        name = Path(self.path).resolve().name + ("" if self.task is None else f"-task{self.task}")
        chosen = {what: getattr(self, what) for what in ("task", "draws", "best", "observation", "action")}
        folder = self.out or Path(self.path) / "minari" / minari.named(name)
        out = minari.write_minari(result, folder, kernel, **chosen)
        print(f"{out}\nload it with MINARI_DATASETS_PATH={out.resolve().parent} and minari.load_dataset({out.name!r})")
        return 0

    def _result(self) -> tuple[Any, SearchResult]:
        """The kernel and the result, which the kernel decodes."""
        what = read_command(self.path)
        kernel = specs.kernel(what["kernel"])
        session = loop.open_session(self.path, kernel, specs.reward(what["reward"]), look=True)
        try:
            return kernel, session.result()
        finally:
            session.close()


@dataclass(frozen=True, kw_only=True)
class Bench:
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
        found = probe.speed(specs.kernel(self.kernel), specs.reward(self.reward), self.batch_sizes)
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            lines = [
                [str(r["batch_size"]), *(f"{r[k]:.0f}" for k in ("bare", "search")), f"{r['ratio']:.3f}"] for r in found
            ]
            report.print_table(lines, ("batch", "bare NFE/s", "search NFE/s", "ratio"))
        return 0


@dataclass(frozen=True, kw_only=True)
class Names:
    """Kernels, rewards, methods and their choices; `list rewards` tells what each reward needs."""

    what: Positional[str | None] = None
    """kernels, rewards, methods, potentials, resampling, selection or backups; all of them by default"""

    def run(self) -> int:
        from rewards.potentials import POTENTIALS
        from treesearch import backup, resampling, selection

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
            choose("list", self.what, tuple(names))
        if self.what == "rewards":
            _print_rewards()
        elif self.what is not None:
            print("\n".join(names[self.what]))
        else:
            print("\n".join(f"{what:<12}{', '.join(found)}" for what, found in names.items()))
        return 0


@dataclass(frozen=True, kw_only=True)
class Env:
    """Versions and devices, for a bug report."""

    def run(self) -> int:
        from importlib.metadata import PackageNotFoundError, version

        print(f"treesearch {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
        names = ("torch", "numpy", "numba", "diffusers", "transformers", "ray", "safetensors", "tyro", "matplotlib")
        for name in names:
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name}: not installed")
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"threads {torch.get_num_threads()}, CUDA {', '.join(devices) or 'none'}")
        print(f"compiled code: {_kept()}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Cite:
    """BibTeX of the papers behind methods (all, or a run's)."""

    path: Positional[str | None] = None

    def run(self) -> int:
        names = list(METHODS) if self.path is None else [runs.read_config(self.path)["method"]["name"]]
        print(bibtex(names))
        return 0


def load(kernel: str, reward: str, workers: Workers | None = None) -> tuple[Any, Any]:
    """A kernel and a reward from their expressions; with workers, how they make them."""
    if workers is not None:
        return specs.Recipe(kernel), specs.Recipe(reward)
    return specs.kernel(kernel), specs.reward(reward)


def drive(session: Session, path: Path, *, as_json: bool) -> int:
    """Run a session to its end and report; Ctrl-C leaves a run that can be resumed."""
    name = session.method.__class__.__name__
    try:
        result = finish(session, path, name, quiet=as_json)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the run is saved, go on with:\n  {report.resume_command(path)}")
        return 130
    found = {"tasks": report.summary(result), "cost": result.cost.as_dict(), "store": str(path)}
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    report.print_table(report.rows(name, found["tasks"], result.cost))
    for task in found["tasks"]:
        print("".join(f"  note: {w}\n" for w in task["warnings"]), end="")
    print(f"{path / 'README.md'}")
    return 0


def finish(session: Session, path: Path, name: str, *, quiet: bool) -> SearchResult:
    """Run with a progress line, then write outputs and the card."""
    with report.Progress(name, quiet=quiet) as progress:
        for snapshot in session.waves():
            progress(snapshot)
        result = session.result()
        found = report.summary(result)
        progress.settle(sum(task["ess"] for task in found))
    runs.write_json(path / "summary.json", {"tasks": found, "cost": result.cost.as_dict()})
    outputs = path / "outputs"
    outputs.mkdir(exist_ok=True)
    pictures = []
    for i, task in enumerate(result.tasks):
        if contact_sheet(task, outputs / f"task{i}.png") is not None:
            pictures.append((f"outputs/task{i}.png", "the best sixteen, then sixteen draws of the read-out"))
    curves = {name: plots.curve(result.history)}
    pictures += _if_plots(
        lambda: plots.draw_curves(curves, outputs / "reward.png"), "best reward against NFE", "outputs/"
    )
    command = read_command(path) | {"method": repr(session.method), "seed": session.seed}
    notes = {name: [w for task in found for w in task["warnings"]]}
    lines, claimed = report.rows(name, found, result.cost), report.certified(name, found)
    report.card(path, f"{name} run", command, lines, notes, pictures, claimed)
    return result


def contact_sheet(task: TaskResult, path: Path) -> Path | None:
    """The best sixteen samples above sixteen draws; None where samples are no images or there are none."""
    if not len(task.leaves):
        return None
    best, _ = task.best(PICTURED // 2)
    if not isinstance(best, torch.Tensor) or best.ndim != 4 or best.shape[1] not in (1, 3):
        return None
    if not np.isfinite(task.readout.log_weights.max()):
        return plots.grid(best, path)
    drawn = task.draw(PICTURED // 2)
    blank = best.new_ones((-len(best) % 8, *best.shape[1:]))
    return plots.grid(torch.cat([best, blank, drawn]), path)


def beside(task: TaskResult, also: Reward) -> dict[str, float | None]:
    """Mean of a reward that was not optimised, over the best sixteen samples and over the read-out's draws."""
    if not len(task.leaves):
        return {"also_best": None, "also_draws": None}

    def mean(samples: Any) -> float | None:
        values = also(samples, None if task.prompt is None else [task.prompt] * len(samples))
        return float(values.mean()) if values.isfinite().all() else None

    drawn = np.isfinite(task.readout.log_weights.max())
    return {"also_best": mean(task.best(PICTURED // 2)[0]), "also_draws": mean(task.draw(PICTURED)) if drawn else None}


def read_command(path: str | Path) -> dict[str, Any]:
    """The kernel and reward expressions of a run made by the command line.

    Raises:
        TreeSearchError: the run was made from Python.
    """
    file = Path(path) / "command.json"
    if not file.exists():
        runs.read_config(path)
        raise TreeSearchError(
            f"{path} was made from Python, where kernel and reward are objects: "
            f"use treesearch.resume({str(path)!r}, kernel, reward)"
        )
    return json.loads(file.read_text("utf-8"))


def read_run(path: str | Path) -> tuple[dict[str, Any], list[Tree], list[dict[str, Any]]]:
    """Configuration, trees (with visits and values as recorded rewards give them) and history of a run folder."""
    config, found = read_result_of(path)
    return config, [task.tree for task in found.tasks], found.history


def read_result_of(path: str | Path) -> tuple[dict[str, Any], SearchResult]:
    """Configuration and result of a run folder, without its kernel: everything but the decoded samples."""
    config = runs.read_config(path)
    return config, read_result(config, [block for block, _ in runs.read_blocks(Path(path))])


def _level(task: int, tree: Tree, t: int) -> list[Any]:
    at = tree.t == t
    shown = np.where(np.isnan(tree.value), tree.reward, tree.value)[at]
    shown = shown[np.isfinite(shown)]
    mean = round(float(shown.mean()), 4) if len(shown) else None
    return [task, int(t), int(at.sum()), int(tree.visits[at].sum()), mean]


def _if_plots(draw: Any, caption: str, prefix: str = "") -> list[tuple[str, str]]:
    """Draw if matplotlib is there; a search must not fail for want of a picture."""
    try:
        return [(prefix + draw().name, caption)]
    except ImportError:
        return []


def _kept() -> str:
    """Where compiled code is kept."""
    if (folder := kept_in(add_child)) is not None:
        return f"kept in {folder}"
    return "compiled in every process, some ten seconds at its first search: NUMBA_CACHE_DIR=FOLDER keeps it"


def _print_rewards() -> None:
    """Two lines a reward: its values, then what it needs and where it comes from."""
    for name, path in specs.REWARDS.items():
        factory = specs.load(path)
        known = getattr(factory, "facts", None)
        if known is None:
            print(f"{name:<22}{(factory.__doc__ or '').strip().splitlines()[0]}")
            continue
        parts = [
            "differentiable" if known.differentiable else "no gradient",
            "needs prompts" if known.prompts else "",
            known.memory,
            f"{known.checkpoint} ({known.licence})" if known.checkpoint else "",
            known.source,
        ]
        print(f"{name:<22}{known.range}\n{'':<22}{'; '.join(part for part in parts if part)}")


def _print_estimate(found: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            if isinstance(value, dict):
                print(key)
                for name, size in value.items():
                    print(f"  {name:<30}{_size(size):>12}")
            else:
                print(f"{key:<22}{value}")
    return 0


def _size(count: int) -> str:
    """Bytes, to read."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{count} B"


def _print_asked(asked: dict[str, Any], methods: dict[str, Method]) -> None:
    for key, value in asked.items():
        print(f"{key:<12} {value}")
    for name, method in methods.items():
        settings = ", ".join(f"{k}={v}" for k, v in asdict(method).items() if v is not None)
        print(f"{name.partition('(')[0]:<12} {settings}")
    print()
