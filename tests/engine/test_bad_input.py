"""Bad input: a clear error (expected, got, do this) before work is lost, and a run folder that goes on after it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import treesearch as ts
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import Reward, RewardError
from treesearch.runs import files
from treesearch.runs import folder as runs
from treesearch.runs.log import read_blocks

T = 5
KERNEL = LinearGaussian(num_steps=T)
REWARD = linear(1.0)
TREE = ts.DiffusionTreeSampling(wave=4)
BUDGET = ts.Budget(nfe=400)


class Bent:
    """LinearGaussian with some attributes replaced; an attribute of None is missing."""

    def __init__(self, **changes: Any) -> None:
        self.changes = {"fingerprint": "bent"} | changes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "changes":
            raise AttributeError(name)
        if name in self.changes:
            if self.changes[name] is None:
                raise AttributeError(name)
            return self.changes[name]
        return getattr(KERNEL, name)


@dataclasses.dataclass(frozen=True)
class Law:
    """A transition with some parts replaced."""

    base: Gaussian
    changes: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.changes.get(name, getattr(self.base, name))

    def take(self, rows: Tensor) -> Law:
        return Law(self.base.take(rows), self.changes)


def bend(**changes: Any) -> Bent:
    """A kernel whose transitions have parts replaced."""
    return Bent(transition=lambda x, t, cond=None: Law(KERNEL.transition(x, t), changes))


def search(kernel: Any = KERNEL, reward: Any = REWARD, method: Any = TREE, **options: Any) -> ts.SearchResult:
    return ts.search(kernel, reward, method, **{"budget": BUDGET} | options)


def spoil(value: Any, after: int = 30, name: str = "spoilt") -> Reward:
    """`linear(1)` until `after` samples are scored; then `value(rewards)` comes back."""
    scored = 0

    def fn(x: Tensor, _: object) -> Any:
        nonlocal scored
        scored += len(x)
        good = x.flatten(1).sum(1)
        return good if scored <= after else value(good)

    return Reward(fn, name)


def put(what: float) -> Callable[[Tensor], Tensor]:
    """Replaces the last reward."""
    return lambda r: torch.cat([r[:-1], torch.tensor([what], dtype=r.dtype)])


def explode(_: Tensor) -> Tensor:
    raise ConnectionError("the scoring server is gone")


# Rewards


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            put(math.nan),
            r"returned nan \(1 of \d+ rows, first row \d+\): .*-inf to forbid \[node \d+ \(t = 0\) of task \d\]",
        ),
        (put(math.inf), r"'spoilt' returned \+inf .* \[node \d+ \(t = 0\) of task \d\]"),
        (lambda r: r[:, None], r"returned shape \((\d+), 1\), expected \(\1,\): squeeze the last axis \[node"),
        (lambda r: r[1:], r"returned shape \(\d+,\), expected \(\d+,\): return one number per sample \[node"),
        (lambda r: r + 1j, r"returned complex values \(torch.complex128\), expected real ones \[node"),
        (lambda r: "high", r"returned str, expected a tensor or a list of \d+ numbers"),
        (explode, r"'spoilt' raised ConnectionError: the scoring server is gone \[node \d+ \(t = 0\) of task \d, node"),
    ],
)
def test_a_bad_reward_names_node_and_task(value: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        search(reward=spoil(value), prompts=["a", "b"])


def test_a_bad_endpoint_reward_names_its_level() -> None:
    with pytest.raises(RewardError, match=r"\[node 1 \(t = 4\) of task 0"):
        search(reward=spoil(lambda r: r * math.nan, after=0), method=ts.FeynmanKac(num_particles=8))


def test_what_is_not_a_reward_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a reward or a function of samples, got float"):
        search(reward=1.0)


# Kernels


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (Bent(transition=None), TypeError, "Bent is not a kernel: it has no `transition`; see backends.base.Kernel"),
        (Bent(decode=None), TypeError, "it has no `decode`"),
        (Bent(sample_range=(1.0, 0.0)), ValueError, r"sample_range is \(1.0, 0.0\), expected \(low, high\)"),
        (Bent(num_steps=0), ValueError, "num_steps is 0, expected at least 1"),
        (Bent(stochastic=[True] * T), ValueError, r"stochastic has 5 entries, expected num_steps \+ 1 = 6"),
        (
            Bent(prior=lambda z, cond: z.double().flatten()),
            ts.KernelError,
            r"prior returned shape \(\d+,\), expected \(\d+, 1\)",
        ),
        (
            Bent(prior=lambda z, cond: z),
            ts.KernelError,
            r"prior returned torch.float32, expected kernel.dtype = torch.float64",
        ),
        (
            bend(endpoint=torch.zeros(1, 1, 1)),
            ts.KernelError,
            r"endpoint of shape \(1, 1, 1\), expected \(\d+, 1\), like its states",
        ),
        (bend(sample=lambda z: z[0]), ts.KernelError, r"sample returned shape \(1,\), expected \(\d+, 1\)"),
        (
            bend(sample=lambda z: z),
            ts.KernelError,
            "sample returned torch.float32, expected kernel.dtype = torch.float64",
        ),
        (bend(log_weight=lambda x: x), ts.KernelError, r"log_weight returned shape \(\d+, 1\), expected \(\d+,\)"),
        (
            bend(log_weight=lambda x: x[:, 0] * math.nan),
            ts.KernelError,
            r"log_weight returned NaN or \+inf: the proposal q must",
        ),
        (bend(log_weight=lambda x: x[:, 0] + math.inf), ts.KernelError, r"log_weight returned NaN or \+inf"),
        (
            Bent(prior_log_weight=lambda x, cond: x),
            ts.KernelError,
            r"prior_log_weight returned shape \(\d+, 1\), expected \(\d+,\)",
        ),
        (
            Bent(transition=lambda x, t, cond: None),
            ts.KernelError,
            "transition returned NoneType, expected a law such as",
        ),
        (
            Bent(decode=lambda x: x[1:]),
            ts.KernelError,
            r"decode returned 3 samples for 4 states, expected one sample each",
        ),
        (Bent(decode=lambda x: None), ts.KernelError, r"decode returned NoneType for 4 states"),
    ],
)
def test_a_kernel_that_breaks_its_contract(kernel: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(kernel)


def test_prompts_need_a_kernel_that_encodes_them() -> None:
    search(Bent(encode=None))
    with pytest.raises(TypeError, match=r"prompts need kernel.encode, which Bent lacks; it may return None"):
        search(Bent(encode=None), prompts=["a"])
    with pytest.raises(
        ts.KernelError, match=r"encode returned 2 rows .* for 1 prompts: give one row each, or .* Shared"
    ):
        search(Bent(encode=lambda prompts: {"text": torch.zeros(2, 3)}), prompts=["a"])


def test_a_kernel_that_raises_says_where() -> None:
    def transition(x, t, cond=None):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        search(Bent(transition=transition))
    assert caught.value.__notes__ == ["in kernel.transition of 4 rows at t = [5]"]


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ts.FeynmanKac(potential="diference"), "unknown potential 'diference'; did you mean 'difference'"),
        (
            lambda: ts.FeynmanKac(resampling="sytematic"),
            "unknown resampling scheme 'sytematic'; did you mean 'systematic'",
        ),
        (
            lambda: ts.DiffusionTreeSampling(selection="bolzmann"),
            "unknown selection 'bolzmann'; did you mean 'boltzmann'",
        ),
        (
            lambda: ts.DiffusionTreeSearch(backup="maximum"),
            r"unknown backup 'maximum'.*\(known: max, mean, soft, visits\)",
        ),
        (lambda: search(keep_states="al"), "unknown keep_states 'al'; did you mean 'all'"),
        (lambda: ts.BestOfN(lam=-1), r"lam is -1, expected 'auto' or a finite number >= 0"),
        (lambda: ts.FeynmanKac(lam=math.inf), "lam is inf, expected 'auto' or a finite number"),
        (lambda: ts.BestOfN(lam=math.nan), "lam is nan, expected"),
        (lambda: ts.BestOfN(lam="automatic"), "lam is 'automatic', expected 'auto' or"),
        (lambda: ts.BestOfN(lam=None), "lam is None, expected 'auto' or a finite number"),
        (lambda: ts.BestOfN(n=2.5), "n is 2.5, expected a positive whole number"),
        (lambda: ts.DiffusionTreeSampling(wave=2.5), "wave is 2.5, expected a positive whole number"),
        (lambda: ts.BestOfN(n=0), "n is 0, expected a positive"),
        (lambda: ts.FeynmanKac(num_particles=-4), "num_particles is -4, expected a positive"),
        (lambda: ts.FeynmanKac(ess_threshold=2), r"ess_threshold is 2, expected 0 \(never\) to 1 \(always\)"),
        (lambda: ts.FeynmanKac(schedule=(4, 2)), r"schedule \[4, 2\] lacks 0: the terminal step"),
        (lambda: ts.BeamSearch(schedule=(4, 2)), r"schedule \[4, 2\] lacks 0"),
        (lambda: ts.BeamSearch(beam_width=0), "beam_width is 0, expected a positive"),
        (lambda: ts.DiffusionTreeSampling(wave=0), "wave is 0, expected a positive"),
        (lambda: ts.DiffusionTreeSampling(widening_alpha=2), r"widening_alpha is 2, expected 0\.\.1"),
        (lambda: search(method=ts.FeynmanKac(schedule=(9, 0))), r"schedule \[9, 0\] has levels outside 0\.\.T = 5"),
        (
            lambda: search(method=ts.DiffusionTreeSampling(branch_at=(-1,))),
            r"branch_at \[-1\] has levels outside 0\.\.T = 5",
        ),
        (lambda: search(seed=-1), r"seed is -1, expected 0\.\.2\^64-1"),
        (lambda: search(seed=2**64), r"seed is 18446744073709551616, expected 0\.\."),
        (lambda: search(batch_size=0), "batch_size is 0, expected at least 1"),
        (lambda: search(prompts=[]), "prompts is empty: give at least one, or None"),
        (lambda: ts.Budget(nfe=-5), r"Budget\(nfe=-5\): expected a positive number"),
        (lambda: ts.Budget(nfe=0), r"Budget\(nfe=0\): expected a positive number"),
        (lambda: ts.Budget(nfe=10.5), r"Budget\(nfe=10.5\): expected a whole number"),
        (lambda: ts.Budget(seconds=math.nan), r"Budget\(seconds=nan\): expected a positive number"),
        (lambda: ts.Budget(nfe="many"), r"Budget\(nfe='many'\): expected a positive number"),
        (lambda: ts.Budget(nfe=math.inf), r"Budget\(nfe=inf\): expected a whole number, or None for no limit"),
    ],
)
def test_settings_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (TREE, {"budget": None}, r"no budget: give budget=ts.Budget\(nfe=...\)"),
        (TREE, {"budget": ts.Budget()}, "no budget"),
        (TREE, {"budget": ts.Budget(nfe=4)}, r"Budget\(nfe=4\) is below one rollout: the minimum is 5"),
        (TREE, {"budget": ts.Budget(nfe=14), "prompts": list("abc")}, "for each of 3 tasks: the minimum is 15"),
        (ts.FeynmanKac(num_particles=8), {"budget": ts.Budget(nfe=39)}, "below one population of 8: the minimum is 40"),
        (ts.FeynmanKac(num_particles=8), {"budget": ts.Budget(reward_calls=39)}, r"reward_calls=39.*the minimum is 40"),
        (ts.BestOfN(lam="auto"), {"budget": ts.Budget(nfe=100)}, "the minimum is nfe=400 and reward_calls=80"),
        (
            TREE,
            {"budget": ts.Budget(iterations=1), "prompts": ["a", "b"]},
            r"iterations=1\) is below .* each of 2 tasks: the minimum is 2",
        ),
    ],
)
def test_budgets_too_small(method: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ts.BudgetError, match=message):
        search(method=method, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "a cat"}, r"prompts is the string 'a cat', expected a list of prompts: \['a cat'\]"),
        ({"prompts": (p for p in "ab")}, "prompts is a generator, expected a list of prompts"),
        ({"method": ts.BestOfN}, r"method is <class .*>, expected an object: ts.BestOfN\(\)"),
        ({"method": "best_of_n"}, r"method is 'best_of_n', expected an object: ts.BestOfN\(\)"),
        ({"budget": 400}, r"budget is 400, expected ts.Budget\(nfe=...\)"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
    ],
)
def test_arguments_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        search(**options)


def test_a_deterministic_kernel_does_not_branch() -> None:
    kernel = Bent(stochastic=[True] + [False] * T)
    for method in (TREE, ts.DiffusionTreeSampling(branch_at=(3,)), ts.FeynmanKac(), ts.FeynmanKac(schedule=(2, 0))):
        with pytest.raises(ValueError, match=r"is deterministic below level.*use BestOfN, a kernel with eta > 0"):
            search(kernel, method=method)


# Run folders


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "run"


def same(a: ts.SearchResult, b: ts.SearchResult) -> None:
    """Bitwise the same trees and rewards, and no evaluation more."""
    for name in ("parent", "t", "key", "reward", "log_w", "visits", "value"):
        np.testing.assert_array_equal(getattr(a.tree, name), getattr(b.tree, name), err_msg=name)
    assert torch.equal(a.samples, b.samples)


def resume(store: Path, kernel: Any = KERNEL, reward: Any = REWARD, **options: Any) -> ts.SearchResult:
    return ts.resume(store, kernel, reward, **options)


def waves(store: Path) -> list[int]:
    """Ends of the whole blocks of tree.bin."""
    return [end for _, end in read_blocks(store)]


@pytest.mark.parametrize("method", [TREE, ts.DiffusionTreeSearch(wave=4, lag=1), ts.FeynmanKac(num_particles=16)])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_log_damaged_in_its_last_block_goes_on_from_the_wave_before(
    store: Path, method: object, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight = search(method=method)
    search(method=method, store=store)
    ends, log = waves(store), store / "tree.bin"
    data, at = bytearray(log.read_bytes()), ends[-2] + 40
    if damage == "flip":
        data[at] ^= 1
    else:
        del data[at:]
    log.write_bytes(data)
    assert waves(store) == ends[:-1]
    again = resume(store)
    same(again, straight)
    assert (again.cost.nfe, again.cost.reward_calls) == (straight.cost.nfe, straight.cost.reward_calls)
    assert len(waves(store)) == len(ends)
    (kept,) = store.glob("tree-cut-*.bin")
    assert kept.read_bytes() == data[ends[-2] :]
    assert f"the {len(data) - ends[-2]} bytes of an interrupted one behind it are cut" in caplog.text
    assert len((store / "events.jsonl").read_text().splitlines()) >= len(ends)


@pytest.mark.parametrize(
    ("spoil_folder", "message"),
    [
        (lambda path: (path / "run.json").unlink(), "holds no run: there is no run.json in it"),
        (lambda path: (path / "run.json").write_text('{"format": 1,'), "run.json cannot be read"),
        (lambda path: (path / "run.json").write_text("[]"), "run.json cannot be read: it is no JSON object"),
        (
            lambda path: edit(path, format=99),
            r"has format 99 \(treesearch .*\), this version reads format 3: use the version that wrote it",
        ),
        (lambda path: edit(path, drop="seed"), "run.json lacks 'seed': it is damaged"),
        (lambda path: edit(path, method={"name": "MagicSearch"}), "unknown method 'MagicSearch'"),
        (
            lambda path: edit(path, method={"name": "BestOfN", "q": 1}),
            "BestOfN has settings this version does not know",
        ),
        (lambda path: (path / "tree.bin").unlink(), "has no readable tree.bin: No such file"),
        (lambda path: (path / "tree.bin").write_bytes(b"not a log"), "tree.bin is no tree log of format 3"),
    ],
)
def test_a_folder_that_is_no_good_run(store: Path, spoil_folder: Callable[[Path], object], message: str) -> None:
    search(store=store)
    spoil_folder(store)
    with pytest.raises(ts.StoreError, match=message):
        resume(store, budget=ts.Budget(nfe=600))


def edit(path: Path, drop: str = "", **changes: Any) -> None:
    """Change run.json, under a checksum of its own."""
    config = json.loads((path / "run.json").read_text()) | changes
    config.pop(drop, None)
    (path / "run.json").write_text(json.dumps(runs.stamped(config)))


@dataclasses.dataclass
class Unmarked:
    """LinearGaussian without a fingerprint."""

    kernel: LinearGaussian = KERNEL

    def __getattr__(self, name: str) -> Any:
        if name in ("fingerprint", "kernel") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.kernel, name)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            KERNEL,
            {"kernel": LinearGaussian(num_steps=T, std=0.5)},
            r"fingerprint differs: the run has LinearGaussian\(.*std=0.8",
        ),
        (KERNEL, {"kernel": LinearGaussian(num_steps=6)}, "num_steps differs: the run has 5, this search 6"),
        (
            KERNEL,
            {"kernel": LinearGaussian(num_steps=T, dim=2)},
            r"state_shape differs: the run has \[1\], this search \[2\]",
        ),
        (KERNEL, {"reward": linear(2.0)}, r"reward differs: the run has linear\(1.0\), this search linear\(2.0\)"),
        (KERNEL, {"kernel": Unmarked()}, "fingerprint differs"),
        (
            Unmarked(),
            {"kernel": Unmarked(LinearGaussian(num_steps=T, std=0.5))},
            "does not reproduce node .* of task 0.*original kernel",
        ),
    ],
)
def test_resume_with_something_else(store: Path, first: Any, then: dict[str, Any], message: str) -> None:
    search(first, store=store)
    before = (store / "tree.bin").read_bytes()
    with pytest.raises(ts.StoreError, match=message):
        resume(store, budget=ts.Budget(nfe=600), **then)
    assert (store / "tree.bin").read_bytes() == before
    same(resume(store, first, budget=ts.Budget(nfe=400)), search())  # the run itself is unharmed


def test_search_does_not_overwrite_a_run(store: Path) -> None:
    search(store=store)
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    with pytest.raises(ts.StoreError, match="holds a run already: resume it, or name another folder"):
        search(store=store)
    with pytest.raises(ts.StoreError, match="holds a run already"):
        search(store=store, method=ts.BestOfN(lam="auto"), reward=spoil(explode, after=0))  # before the pilot
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ts.StoreError, match=r"cannot make the run folder .*file.*: (File exists|Not a directory)"):
        search(store=tmp_path / "file")


def test_what_a_run_cannot_record_is_refused_before_it_starts(store: Path) -> None:
    with pytest.raises(
        ts.StoreError, match=r"cannot hold this search: .*object.*prompts must be strings or plain data"
    ):
        search(prompts=[object()], store=store)
    assert not store.exists()
    with pytest.raises(ts.StoreError, match="store is empty, expected a folder"):
        search(store="")


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_on_one_run(store: Path) -> None:
    search(store=store)
    command = [sys.executable, "-c", HOLD, str(store / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for attempt in (lambda: resume(store), lambda: search(store=store)):
            with pytest.raises(ts.StoreError, match="is in use by another process: wait for it, or stop it"):
                attempt()
        other.communicate("\n")
    same(resume(store), search())


FILES = {
    "states": (files, "write_at"),
    "log": (os, "fdatasync"),
    "events": (runs.Run, "event"),
    "run": (runs, "write_json"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_keeps_the_waves_before_it(store: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    straight = search()
    with monkeypatch.context() as patch:

        def fill(snapshot: ts.Snapshot) -> None:
            """The first write after the third wave fails."""

            def fails(*args: Any) -> Any:
                patch.undo()
                if file == "events":
                    args[0]._events.close()
                    args[0]._events = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed with the run
                    return args[0].event(args[1])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            if snapshot.wave == 2:
                patch.setattr(*FILES[file], fails)

        with pytest.raises(ts.StoreError, match=r"cannot write to .*No space left on device; the waves .* are safe"):
            search(store=store, callbacks=[fill])
    assert len(waves(store)) >= 3
    same(resume(store), straight)


def test_a_real_limit_on_file_size(store: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(snapshot: ts.Snapshot) -> None:
        if snapshot.wave == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))

    try:
        with pytest.raises(ts.StoreError, match=r"cannot write to .*File too large; the waves .* are safe"):
            search(store=store, callbacks=[limit])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(waves(store)) >= 3
    same(resume(store), search())


@pytest.mark.parametrize("value", [explode, put(math.nan), lambda r: r[:, None]])
@pytest.mark.parametrize(("method", "after"), [(TREE, 30), (ts.FeynmanKac(num_particles=16), 200), (ts.BestOfN(), 30)])
def test_a_run_goes_on_after_its_reward_is_repaired(
    store: Path, value: Callable[[Tensor], Any], method: object, after: int
) -> None:
    straight = search(method=method, batch_size=8)
    with pytest.raises(RewardError, match="spoilt"):
        search(reward=spoil(value, after), method=method, batch_size=8, store=store)
    assert len(waves(store)) >= 2
    assert json.loads((store / "run.json").read_text())["status"] == "interrupted"
    calls = 0

    def repaired(x: Tensor, _: object) -> Tensor:
        nonlocal calls
        calls += len(x)
        return x.flatten(1).sum(1)

    recorded = [block.meta["cost"]["reward_calls"] for block, _ in read_blocks(store)]
    again = resume(store, reward=Reward(repaired, "spoilt"), batch_size=8)
    same(again, straight)
    again_scored = min(3, recorded[-1]) if "Feynman" not in type(method).__name__ else 0  # no sample of it is there yet
    assert calls == straight.cost.reward_calls - recorded[-1] + again_scored


def test_a_lone_callback_or_level_is_refused_before_anything_runs():
    with pytest.raises(TypeError, match="list of functions"):
        ts.search(LinearGaussian(), linear(), ts.BestOfN(n=4), callbacks=len)
    for make in (lambda: ts.DiffusionTreeSampling(branch_at=3), lambda: ts.FeynmanKac(schedule="abc")):
        with pytest.raises(ValueError, match="expected levels"):
            make()
