"""What commands take: amounts, limits, what is searched, where it computes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from treesearch.backends.base import optional
from treesearch.budget import INFINITE, Budget
from treesearch.cli.base import pick
from treesearch.errors import UsageError
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.registry.recipe import Recipe
from treesearch.rewards.base import Reward, as_reward
from treesearch.session.interfaces import KEEP, Options, Workers

Count = Annotated[str | None, arg(metavar="N|10k|2M")]
Seconds = Annotated[str | None, arg(metavar="S|90s|10m|1.5h")]
HARD = "digit(8) + 10*brightness()"  # a bold eight: best-of-n still rises after 800 samples
GUIDE = "kernel"  # as a reward: the one that guides the kernel
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
    reward: str | None = None
    """an expression over rewards, such as "2*digit(8) + compressibility()", package.module:attr or ./file.py:attr, or
    kernel: the reward that guides the kernel or that its values are of, as in tds(mnist(), digit(8)); by default a bold
    eight, which is none for texts"""
    prompts: tuple[str, ...] = ()
    """one task each; none is one unconditional task"""
    prompts_file: str | None = None
    """a file with a prompt a line; - reads them from the standard input"""
    seed: int = 0
    """of all noise"""
    batch_size: int = 64
    """rows of a forward pass"""

    def scored_by(self) -> str:
        """The reward's expression.

        Raises:
            UsageError: none is named, and the kernel writes texts.
        """
        if self.reward is None and specs.writes(self.kernel):
            raise UsageError(
                f'--reward: name one of texts, such as "text_length(12)" (see `treesearch list rewards`): the default, '
                f"{HARD}, scores pictures of digits"
            )
        return HARD if self.reward is None else self.reward

    def command(self) -> dict[str, str]:
        """The expressions as a run folder keeps them: they mean the same from any folder."""
        return written(self.kernel, self.scored_by())

    def asked(self) -> list[str] | None:
        """The prompts, or None for one unconditional task; the standard input can be asked once.

        Raises:
            UsageError: they are named in two places, or their file cannot be read.
        """
        if self.prompts_file is None:
            return list(self.prompts) or None
        if self.prompts:
            raise UsageError("--prompts and --prompts-file: leave one of them out")
        return lines_of(self.prompts_file)

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


def lines_of(file: str) -> list[str]:
    """The prompts of a file, one a line; blank lines are none.

    Raises:
        UsageError: it cannot be read, is no UTF-8 or holds no prompt.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"--prompts-file {file}: {error.strerror}, expected a file with a prompt a line") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts-file {file}: its byte {error.start} is no UTF-8, save it as UTF-8") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise UsageError(f"--prompts-file {file} holds no prompt, expected one a line")
    return found


def written(kernel: str, reward: str) -> dict[str, str]:
    """Expressions of a kernel and a reward with absolute paths; `kernel` as a reward is the one that guides it."""
    kernel = expressions.absolute(kernel)
    reward = specs.guide(kernel) or GUIDE if reward == GUIDE else expressions.absolute(reward)
    return {"kernel": kernel, "reward": reward}


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where it computes."""

    workers: int = 0
    """processes on Ray that share the work; 0 computes in this one"""
    gpus_per_worker: float = 0.0
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
        from treesearch.distributed import RayWorkers

        with RayWorkers(
            self.workers,
            self.gpus_per_worker,
            reward_workers=self.reward_workers,
            address=self.ray_address,
            on_interrupt=self.on_interrupt,
        ) as workers:
            yield workers


def load(command: Mapping[str, str], workers: Workers | None = None) -> tuple[Any, Any]:
    """A kernel and a reward from their expressions; with workers, how they make them.

    A reward that is written as the kernel's own is that very object: two that a factory makes need not be equal.

    Raises:
        UsageError: the guide of a kernel was asked for as the reward, and it has none.
    """
    if workers is not None and command["reward"] != GUIDE:
        return Recipe(command["kernel"]), Recipe(command["reward"])
    kernel = specs.kernel(command["kernel"])
    own = optional(kernel, "scores")
    if command["reward"] != GUIDE:
        made = specs.reward(command["reward"])
        return kernel, own if own is not None and _is_written_there(command, own, as_reward(made)) else made
    if own is None:
        raise UsageError(
            f"--reward kernel: {command['kernel']} shows no reward that guides it, as tds(mnist(), digit(8)) does: "
            "name the reward"
        )
    return kernel, own


def _is_written_there(command: Mapping[str, str], own: Reward, made: Reward) -> bool:
    """Whether a kernel's own reward and one that was made are of the same words: a factory may change what it gets."""
    shown = specs.guide(command["kernel"])
    alike = all(getattr(own, name) == getattr(made, name) for name in ("name", "input", "settings", "code"))
    return alike and shown is not None and specs.same(shown, command["reward"])
