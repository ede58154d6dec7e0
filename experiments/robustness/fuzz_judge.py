"""What becomes of a damaged or forged run folder: looked at, listed, plotted, exported, gone on with; and a verdict.

Outcomes, where none of them is a fault:

    refused             an error of this library says why
    equal               resumed to what the run would have been
    true to itself      forged, and gone on with: numbers are finite or documented, within the budget, and every sample
                        has the reward that it claims when it is scored again
    refused when read again     forged, gone on with, and what is written then has an error that says why
    as the forger says  the same, but for rewards that were recorded before: only the forger knows what they are of
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import random
import shutil
import stat
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

import treesearch as ts
from experiments.robustness import fuzz_mutations as mutations
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli import main as cli
from treesearch.cli import saved
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import RewardError
from treesearch.runs import config as run_json
from treesearch.runs import folder as runs
from treesearch.runs import reading
from treesearch.runs.config import read_config
from treesearch.runs.files import write_json
from treesearch.session.rebuild import read_result

KERNEL, REWARD, SEED, NFE = LinearGaussian(num_steps=6, dim=3), linear(0.7), 3, 360
COMMAND = {"kernel": "gaussian(num_steps=6, dim=3)", "reward": "linear(0.7)"}
METHODS: dict[str, Any] = {
    "best_of_n": ts.BestOfN(),
    "fk": ts.FeynmanKac(num_particles=8),
    "dts": ts.DiffusionTreeSampling(wave=8, widening_c=1, widening_alpha=0.5),
    "tree_sampling": ts.TreeSampling(),
    "tree_search": ts.TreeSearch(wave=8),
    "beam": ts.BeamSearch(),
    "noise": ts.NoiseSearch(),
    "tasks": ts.DiffusionTreeSearch(wave=4, lag=1),
}
# Beside `show` and `ls`, which see every case; pictures take longest.
LOOKS = (
    *(("export", "csv"),) * 9,
    *(("export", "npz"),) * 9,
    *(("export", "graphml"), ("export", "graphml"), ("export", "png"), ("export", "minari")),
    *(("show", "--json"), ("show", "--json"), ("cite",), ("plot",), ("plot", "--what", "tree")),
)
OURS = (ts.TreeSearchError, RewardError)
LONGEST = 2_000  # characters of an error
TELL = cli._tell  # pyright: ignore[reportPrivateUsage] - which type an error has, its text does not tell


class Fault(Exception):
    """A case that did not end well."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A recorded run of half its budget.

    Args:
        path: its folder.
        other: that of another seed.
        wholes: what the whole budget comes to, in two parts, and in one (where waves were lost).
        shown: what the commands say of it, by their arguments.
    """

    path: Path
    other: Path
    wholes: tuple[ts.SearchResult, ...]
    shown: dict[tuple[str, ...], str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a command said."""

    code: int
    out: str
    err: str
    errors: list[BaseException]


def make_bases(scratch: Path) -> dict[str, Base]:
    """A base a method, the same bytes each time; judged whole, they must be equal to themselves."""
    found = {}
    with _no_chance():
        for name, method in METHODS.items():
            how: dict[str, Any] = {"prompts": ["a", "b"] if name == "tasks" else None}
            for folder, seed in ((f"{name}-0", SEED), (f"{name}-1", SEED + 1)):
                path, half = scratch / folder, ts.Budget(nfe=NFE // 2)
                ts.search(KERNEL, REWARD, method, budget=half, seed=seed, store=path, **how)
                write_json(path / saved.COMMAND, saved.kept(COMMAND))
            shutil.copytree(scratch / f"{name}-0", scratch / f"{name}-whole")
            whole = ts.resume(scratch / f"{name}-whole", KERNEL, REWARD, budget=ts.Budget(nfe=NFE))
            straight = ts.search(KERNEL, REWARD, method, budget=ts.Budget(nfe=NFE), seed=SEED, **how)
            base = Base(path=scratch / f"{name}-0", other=scratch / f"{name}-1", wholes=(whole, straight))
            for look in {("show",), *LOOKS}:
                base.shown[look] = _look(look, base.path, scratch / "out").out
            found[name] = base
    call(
        "resume", str(scratch / f"{next(iter(METHODS))}-whole"), "--json"
    )  # loads what processes need before they begin
    _list(_furnish(scratch / "room", next(iter(found.values()))))
    return found


@contextlib.contextmanager
def _no_chance() -> Iterator[None]:
    """Runs without clock and chance: files of the same length, so that a case is the same on every machine."""
    made, day = random.Random(0), "2026-01-01T00:00:00+00:00"
    chance = SimpleNamespace(token_hex=lambda n: made.randbytes(n).hex())
    with (
        mock.patch.multiple(run_json, now=lambda: day, secrets=chance),
        mock.patch.multiple(runs, now=lambda: day, secrets=chance),
        mock.patch("time.perf_counter", return_value=0.0),
    ):
        yield


def planned(seed: int, number: int) -> tuple[random.Random, str, mutations.Mutation]:
    """What a case draws from, its base, its mutation: odd ones are natural."""
    rng = random.Random(seed * 1_000_003 + number)
    name = rng.choice(list(METHODS))
    return rng, name, rng.choice(mutations.NATURAL if number % 2 else mutations.FORGED)


def case(room: Path, bases: dict[str, Base], seed: int, number: int) -> tuple[str, str]:
    """Outcome of a case, and what there is to say of it.

    Args:
        room: a folder of its own: runs/case, a healthy neighbour beside it, the working folder and a precious file.
    """
    rng, name, mutation = planned(seed, number)
    path, base = _furnish(room, bases[name]), bases[name]
    mutation(rng, path, base.other)
    around, here = _content(room, but=path), os.getcwd()
    os.chdir(room / "here")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            outcome = judge(rng, path, base, natural=bool(number % 2))
        if _content(room, but=path) != around:
            raise Fault("a file elsewhere was written to")
    except Fault as fault:
        return f"FAULT: {fault}", ""
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAULT: {type(error).__name__} at {Path(at.filename).name}:{at.lineno}", str(error)[:300]
    finally:
        os.chdir(here)
    return outcome, ""


def _furnish(room: Path, base: Base) -> Path:
    """The room of a case, new; the folder of the case."""
    shutil.rmtree(room, ignore_errors=True)
    for folder in ("runs", "here", "out"):
        (room / folder).mkdir(parents=True)
    (room / mutations.PRECIOUS).write_text("precious " * 100, "utf-8")
    shutil.copytree(base.other, room / "runs" / "neighbour")
    shutil.copytree(base.path, room / "runs" / "case")
    return room / "runs" / "case"


def judge(rng: random.Random, path: Path, base: Base, *, natural: bool) -> str:
    """Look at a folder with the command line, then go on with it."""
    look, inside = rng.choice(LOOKS), rng.random() < 0.2
    before = _content(path)
    for words in (("show",), look):
        found = _look(words, path, path.parents[1] / "out" / "made", inside=inside and words == look)
        if natural and found.code == 0 and not found.err and not inside and found.out != base.shown[words]:
            raise Fault(f"`{words[0]}` says something else, and no word of damage")
    _list(path)
    after = _content(path)
    if inside:
        made = ("reward.png", "tree.png", "minari", *(f"task0.{kind}" for kind in ("csv", "npz", "graphml")))
        before, after = ({k: v for k, v in found.items() if k not in made} for found in (before, after))
    if after != before:
        raise Fault("looking changed the folder")
    recorded = _recorded(path)
    meant = _bytes(path / saved.COMMAND) != _bytes(base.path / saved.COMMAND)  # for the command line
    resumed = _by_command if rng.random() < (0.7 if meant else 0.08) else _by_library
    try:
        result = resumed(path)
        if result is None:
            return "refused"
        samples = [task.samples for task in result.tasks]
    except OURS:
        return "refused"
    outcome = compare(result, samples, base.wholes) if natural else scrutinise(result, samples, recorded)
    for copy in path.glob("tree-cut-*.bin"):
        kept = len(mutations.whole_in((path / "tree.bin").read_bytes()[: int(copy.name.split("-")[2])]))
        if any(wave >= kept for wave in mutations.whole_in(copy.read_bytes())):
            raise Fault("whole waves were cut off")
    try:
        _read_again(path, result)
    except ts.TreeSearchError as error:
        if natural:
            raise Fault(f"what was written cannot be read: {error}") from error
        return "refused when read again"
    return outcome


def call(*argv: str) -> Told:
    """A command of the command line, in this process.

    Raises:
        Fault: it does not end as commands do.
    """
    out, err, errors = io.StringIO(), io.StringIO(), []
    log, warned = logging.getLogger("treesearch"), logging.StreamHandler(err)

    def tell(error: BaseException, text: str, *, debug: bool) -> None:
        errors.append(error)
        TELL(error, text, debug=debug)

    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(cli, "_tell", tell),
        mock.patch.object(log, "handlers", [warned]),
    ):
        code = cli.main(argv)
    told, what = Told(code=code, out=out.getvalue(), err=err.getvalue(), errors=errors), f"`{argv[0]}`"
    lines = [line for line in told.err.splitlines() if line.startswith("treesearch: ")]
    for error in errors:
        if not isinstance(error, OURS) and not _meant(error):
            raise Fault(f"{what} failed with {type(error).__name__}: {str(error)[:300]}") from error
    if code not in (0, 1):
        raise Fault(f"{what} ended with exit code {code}: {told.err[:300]}")
    if "Traceback" in told.err or "Warning:" in told.err:
        raise Fault(f"{what} spilled {told.err[:300]!r}")
    if code == 1 and len(lines) != 1:
        raise Fault(f"{what} ended with {len(lines)} lines of error: {told.err[:300]!r}")
    if max(map(len, told.err.splitlines()), default=0) > LONGEST:
        raise Fault(f"{what} says {len(told.err)} characters")
    return told


def _meant(error: BaseException) -> bool:
    """Whether a built-in error is one that the command line tells as it is: raised by our own code, or by a file."""
    if isinstance(error, OSError):
        return error.filename is not None
    at = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(f"/{package}/" in at.filename for package in ("treesearch", "backends", "rewards"))
    return isinstance(error, cli.EXPECTED) and ours and (at.line or "").startswith("raise ")


def _look(words: tuple[str, ...], path: Path, out: Path, *, inside: bool = False) -> Told:
    """A look at a folder, what it makes put elsewhere or inside; for a table or a graph that is what was said."""
    name = str(out.with_name(f"{out.name}-v0")) if "minari" in words else str(out)
    aside = () if inside or words[0] in ("show", "cite") else ("--out", name)
    told = call(words[0], str(path), *words[1:], *aside)
    if told.code or not aside:
        return told
    return replace(told, out=out.read_text("utf-8") if words[1:] in (("csv",), ("graphml",)) else "")


def _list(path: Path) -> None:
    """`ls`: the neighbour is there, and so is the case unless it is no run any more."""
    told = call("ls", str(path.parent), "--json")
    found = {Path(line["run"]).name: line for line in json.loads(told.out)}
    if found.get("neighbour", {}).get("status") != "finished":
        raise Fault("`ls` does not list the run beside it")
    if os.path.lexists(path / "run.json") and "case" not in found:
        raise Fault("`ls` leaves the folder out")


def _recorded(path: Path) -> tuple[list[int], int] | None:
    """Nodes of each task that a folder holds, and its NFE; None where it cannot be read."""
    try:
        config = read_config(path)
        blocks = reading.read_log(path, config)[0]
        tasks = len(config["prompts"] or [None])
        nodes = [1 + sum(int((b.nodes["task"] == task).sum()) for b in blocks) for task in range(tasks)]
        return nodes, blocks[-1].meta["cost"]["nfe"] if blocks else 0
    except ts.TreeSearchError:
        return None


def _by_library(path: Path) -> ts.SearchResult:
    return ts.resume(path, KERNEL, REWARD, budget=ts.Budget(nfe=NFE))


def _by_command(path: Path) -> ts.SearchResult | None:
    """Gone on with by the command line, then read back; None if it refused."""
    return None if call("resume", str(path), "--nfe", str(NFE), "--json").code else _by_library(path)


def compare(result: ts.SearchResult, samples: list[Any], wholes: tuple[ts.SearchResult, ...]) -> str:
    """Whether a resumed run is what the whole one is."""
    for task, x in zip(result.tasks, samples, strict=True):
        if not torch.allclose(0.7 * x.sum(1), task.rewards, atol=1e-9):
            raise Fault("samples without their rewards")
    for one in wholes:
        if len(one.tasks) == len(result.tasks) and all(map(_same, result.tasks, one.tasks)):
            return "equal"
    raise Fault("another result")


def _same(a: Any, b: Any) -> bool:
    """Whether two tasks have the same prompt, rewards and estimate."""
    return a.prompt == b.prompt and a.log_z == b.log_z and torch.equal(a.rewards, b.rewards)


def scrutinise(result: ts.SearchResult, samples: list[Any], recorded: tuple[list[int], int] | None) -> str:
    """Whether a forged run that was gone on with holds what a run may hold, and new samples have their rewards."""
    if recorded is None:
        raise Fault("gone on with what could not be read")
    outcome = "true to itself"
    nodes, nfe = recorded
    for task, x, old in zip(result.tasks, samples, nodes, strict=True):
        rewards, log_w = task.rewards.numpy(), task.log_weights.numpy()
        if not (rewards < np.inf).all() or not (log_w < np.inf).all():
            raise Fault("rewards or weights that are no numbers")
        if task.log_z is not None and not task.log_z < math.inf:
            raise Fault(f"log Z is {task.log_z}")
        if not 0 <= task.diagnostics["ess"] <= len(rewards) * (1 + 1e-9):
            raise Fault(f"ESS {task.diagnostics['ess']} of {len(rewards)} samples")
        if len(task.tree) - old > NFE:
            raise Fault(f"{len(task.tree) - old} new nodes for {NFE} NFE")
        json.dumps(task.certificate().asdict())
        again = 0.7 * x.numpy().sum(1)
        with np.errstate(all="ignore"):
            off = ~((again == rewards) | (np.abs(again - rewards) <= 1e-9 * (1 + np.abs(rewards))))
        if off[task.leaves >= old].any():
            raise Fault("new samples without their rewards")
        outcome = "as the forger says" if off.any() else outcome
    if result.cost.nfe - nfe > NFE:
        raise Fault(f"{result.cost.nfe - nfe} more NFE of a budget of {NFE}")
    return outcome


def _read_again(path: Path, result: ts.SearchResult) -> None:
    """What was gone on with can be read back, and is the same."""
    config = read_config(path)
    again = read_result(config, reading.read_log(path, config)[0])
    for a, b in zip(result.tasks, again.tasks, strict=True):
        if not torch.equal(a.rewards, b.rewards):
            raise Fault("what was written is not what was returned")


def _bytes(file: Path) -> bytes | None:
    """Content of a short regular file, None where there is none."""
    return file.read_bytes() if file.is_file() and file.stat().st_size < 2**22 else None


def _content(path: Path, but: Path | None = None) -> dict[str, Any]:
    """What is in a folder, links and pipes as what they are; `but` and what commands were told to make left out."""
    found: dict[str, Any] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = [f for f in folders if but is None or (Path(folder) / f not in (but, path / "out"))]
        for name in (*names, *folders):
            at = Path(folder) / name
            mode, size = at.lstat().st_mode, at.lstat().st_size
            small = stat.S_ISREG(mode) and size < 2**22
            found[str(at.relative_to(path))] = (stat.S_IFMT(mode), at.read_bytes() if small else size)
    return found
