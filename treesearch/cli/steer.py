"""`steer`: learn which noise to give a frozen policy, so that what it makes of it earns more."""

from __future__ import annotations

import json
import shlex
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

from tyro.conf import OmitArgPrefixes

from treesearch.cli.acting import Acting, Opened, check_seed
from treesearch.cli.arguments import Count, count
from treesearch.cli.run import new_folder, print_estimate
from treesearch.errors import StoreError, UsageError
from treesearch.policies.dsrl import DSRL, Steering
from treesearch.policies.store import INDEX, read_index
from treesearch.report.progress import Terminal
from treesearch.report.tables import DASH
from treesearch.report.terminal import say

LAST = 20  # episodes whose mean return is shown
SHOWN = 0.2  # seconds between two states of the line
PROBE = 4  # chunks that are made to see what one costs


@dataclass(frozen=True, kw_only=True)
class Steer(Acting):
    """Learn which noise to give a frozen diffusion policy, so that the chunks that it makes of it earn more in an
    environment (DSRL); the policy stays as it is, and its steps have no noise (eta 0). `plan --steering` acts with what
    was learnt. The same command goes on where it was, with more chunks where more are asked for."""

    chunks: Count = "10k"
    """to learn from, all told; a multiple of --every"""
    settings: OmitArgPrefixes[Steering] = field(default_factory=Steering)
    bound: float = 1.5
    """b: noise lies in [-b, b]"""
    seed: int = 0
    """of the networks, of exploration and of the environment"""
    store: str | None = None
    """folder; a new one under runs/ by default"""
    dry_run: bool = False
    """predict evaluations, memory and time from a few chunks, and stop; leaves no folder"""
    json: bool = False
    """print the figures as JSON"""

    def run(self) -> int:
        chunks, folder = self._chunks(), Path(self.store or new_folder("steer"))
        check_seed(self.seed)
        _check_folder(folder)
        env, opened = self._env, self._opened
        opened.read(env.reset(seed=self.seed)[0])  # before anything is built: what it shows is what the policy is told
        if self.dry_run:
            return print_estimate(self._estimate(chunks, folder), as_json=self.json)
        dsrl, began = self._learner(self.settings), time.perf_counter()
        try:
            with nullcontext() if self.json else _Line(chunks) as watch:
                dsrl.learn(chunks, folder, watch)
        except KeyboardInterrupt:
            say(f"\ninterrupted; whole segments are kept, go on by the same command with --store {folder}", error=True)
            return 130
        return self._report(dsrl, folder, time.perf_counter() - began)

    def _chunks(self) -> int:
        """How many, all told.

        Raises:
            UsageError: no whole segments, or none after the warm-up.
        """
        chunks, settings = count(self.chunks) or 0, self.settings
        if chunks % settings.every:
            raise UsageError(f"--chunks {chunks}: expected a multiple of --every {settings.every}")
        if chunks <= settings.warmup:
            raise UsageError(f"--chunks {chunks}: nothing is learnt from the first --warmup {settings.warmup}")
        return chunks

    @cached_property
    def _opened(self) -> Opened:
        return self.opened(0.0, self.num_steps)

    @cached_property
    def _env(self) -> Any:
        return self._opened.make()

    def _learner(self, settings: Steering) -> DSRL:
        opened = self._opened
        env = opened.noisy(self._env, opened.executed(self.steps), self.bound)
        return DSRL(env, settings, seed=self.seed)

    def _estimate(self, chunks: int, folder: Path) -> dict[str, Any]:
        """What is left to do, and what that costs."""
        settings, times = self.settings, [0.0]
        done = read_index(folder)["steps"] if (folder / INDEX).exists() else 0
        tried = replace(settings, warmup=PROBE // 2, every=PROBE, replay=PROBE)
        probe = self._learner(tried)
        probe.learn(PROBE, watch=lambda _: times.append(time.perf_counter()))
        made, learnt = times[2] - times[1], times[4] - times[3]
        num_steps, row = probe.frozen.spec.num_steps, 2 * probe.env.seen.size + probe.frozen.size + 3
        learning = max(0, chunks - max(done, settings.warmup))
        left = max(0, chunks - done)
        return {
            "chunks": left,
            "gradient_steps": learning * settings.updates,
            "nfe": settings.nfe(max(done, chunks), num_steps) - settings.nfe(done, num_steps),
            "ms_per_chunk": round(1e3 * made, 3),
            "ms_per_chunk_learnt_from": round(1e3 * learnt, 3),
            "seconds": round((left - learning) * made + learning * learnt, 1),
            "replay_megabytes_at_most": round(4 * row * min(settings.replay, chunks) / 2**20, 1),
        }

    def _report(self, dsrl: DSRL, folder: Path, seconds: float) -> int:
        warm = [value for at, value in dsrl.episodes if at <= self.settings.warmup]
        last = [value for at, value in dsrl.episodes if at > self.settings.warmup][-LAST:]
        found = {
            "chunks": dsrl.steps,
            "episodes": len(dsrl.episodes),
            "return_of_warmup": _mean(warm),
            "return_of_last": _mean(last),
            "nfe": dsrl.frozen.evaluations,
            "seconds": round(seconds, 1),
            "store": str(folder),
        }
        if self.json:
            say(json.dumps(found, indent=2))
            return 0
        say(f"return {_said(warm)} in the {len(warm)} episodes of the warm-up, {_said(last)} in the last {len(last)}")
        if not dsrl.episodes:
            say("no episode has ended: an environment that sets no end to them needs one, gymnasium's TimeLimit")
        for what, more in self._next().items():
            say(f"{what}: {self._plan(folder)} {more}".rstrip())
        return 0

    def _next(self) -> dict[str, str]:
        """What to type then, and what it adds to the words of a plan."""
        reward = "" if self.settings.method == "na" else " --reward env"
        return {"search from it": reward.strip(), "it alone": f"--eta 0 --method 'best_of_n(n=1)'{reward}"}

    def _plan(self, folder: Path) -> str:
        names = ("policy", "env", "env_settings", "device")
        typed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Steer, name, None)}
        words = [word for name, value in typed.items() for word in (f"--{name.replace('_', '-')}", value)]
        return shlex.join(["treesearch", "plan", *words, "--steering", str(folder)])


def _check_folder(folder: Path) -> None:
    """Refuse a folder of something else; what a crash leaves is none.

    Raises:
        StoreError: it is one.
    """
    if not folder.exists() or (folder / INDEX).exists():
        return
    if folder.is_file():
        raise StoreError(f"{folder} is a file: name a folder with --store")
    if any(not file.name.startswith("state-") for file in folder.iterdir()):
        raise StoreError(f"{folder} is no learner and not empty: name another --store")


@final
class _Line:
    """How far learning is, and what episodes return.

    Args:
        chunks: to learn from.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks, self.text = chunks, ""
        self.began, self.shown = time.perf_counter(), 0.0
        self.done: int | None = None
        self._display: Terminal | None = None  # until a chunk is made

    def __enter__(self) -> _Line:
        return self

    def __call__(self, dsrl: DSRL) -> None:
        now, made = time.perf_counter(), dsrl.steps
        if self.done is None:
            self.done = made - 1
        rate = (made - self.done) / max(now - self.began, 1e-9)
        last = [value for _, value in dsrl.episodes[-LAST:]]
        self.text = (
            f"{'steer':<12} chunks {made:>6}/{self.chunks}  episodes {len(dsrl.episodes):>5}  "
            f"return {_said(last):>8}  {rate:>7.1f} chunks/s"
        )
        self._display = self._display or Terminal()
        if now - self.shown > SHOWN:
            self.shown = now
            self._display.update(self.text)

    def __exit__(self, kind: object, *error: object) -> None:
        if self._display is not None:
            self._display.close(self.text)
        elif kind is None:
            say("nothing is left to learn")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _said(values: list[float]) -> str:
    mean = _mean(values)
    return DASH if mean is None else f"{mean:.3g}"
