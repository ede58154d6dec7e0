"""What experiments share: cells that run once, distances between sets of samples, means with errors, tables.

A cell is one row of a JSONL file: what was asked (bed, method, settings, budget, seed), what came out, what it cost,
and where it ran. A cell that is there is never run again, so an experiment that was stopped goes on where it was.

    MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean k(x_i, y_j)       unbiased: may be negative
    k = Σ_b exp(-|x - y|² / 2 b²) / B,  b in {1/4, 1/2, 1, 2, 4} times the median distance of the reference

Draws with replacement from a few weighted leaves count their repeats: the estimate is of the law that is drawn from.

Source: A Kernel Two-Sample Test (Gretton et al., 2012), lemma 6.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from treesearch.errors import StoreError, TreeSearchError
from treesearch.report.tables import markdown_table

Row = dict[str, Any]
NOT_RUN = "not run"
WIDTHS = (4.0, 2.0, 1.0, 0.5, 0.25)  # of the kernel; each half of the one before
PROJECTIONS = 128
BLOCK = 64
PACKAGES = ("treesearch", "torch", "numpy")


# commands


def command_line(name: str, commands: Mapping[str, Any], argv: Sequence[str] | None, description: str | None) -> int:
    """Run one of a script's commands; returns its exit code."""
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(dict(commands), args=argv, description=description).run()
    except (TreeSearchError, ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on", file=sys.stderr)
        return 130


def check_seeds(seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
    """Nothing is reported on seeds that it was tuned on.

    Raises:
        ValueError: some are in both.
    """
    if set(seeds) & set(tuning_seeds):
        raise ValueError("seeds and tuning_seeds overlap: report on seeds that nothing was tuned on")


# cells


class Cells:
    """Rows of a JSONL file.

    Args:
        file: made where it is absent; part of a line at its end, which a kill leaves, is dropped.
        key: fields that identify a row.

    Raises:
        StoreError: the file is damaged before its end, or is no such file.
    """

    def __init__(self, file: Path, key: Sequence[str]) -> None:
        self.file, self.key = file, tuple(key)
        self.rows = read(file) if file.exists() else []
        self._known = {self._of(row) for row in self.rows}

    def _of(self, row: Mapping[str, Any]) -> str:
        return json.dumps([row.get(name) for name in self.key], sort_keys=True)

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self._of(row) in self._known

    def add(self, row: Row) -> None:
        """Write a row at once."""
        row = {name: rounded(value) for name, value in row.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b") as file:
            kept = _whole(self.file.read_bytes())
            file.truncate(kept)
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._known.add(self._of(row))

    def where(self, **known: Any) -> list[Row]:
        """Rows with the given fields."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in known.items())]


def _whole(data: bytes) -> int:
    """Bytes of whole lines."""
    return data.rfind(b"\n") + 1


def read(file: Path) -> list[Row]:
    """Rows of a file.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        data = file.read_bytes()
        return [json.loads(line) for line in data[: _whole(data)].splitlines()]
    except OSError as error:
        raise StoreError(f"cannot read {file}: run the experiment first") from error
    except ValueError as error:
        raise StoreError(f"{file} is damaged: {error}") from error


def rounded(value: Any) -> Any:
    """Floats with six digits, None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one process.

    Raises:
        StoreError: another one has it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock").acquire(timeout=0):
            yield
    except Timeout as error:
        raise StoreError(f"{folder} is in use by another process: wait for it, or name another folder") from error


def where_it_ran() -> Row:
    """Machine class and versions, for every row."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}"
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"machine": machine, "versions": versions | {"python": platform.python_version()}}


# distances


class Floor(NamedTuple):
    """What samplers of the target itself come out with, half of a reference against the other half."""

    mmd2: float  # root mean square: its mean is 0
    w1: float


class Reference:
    """Independent draws of a target, to compare others with.

    Args:
        draws: (n, D) or (n, ...), features or samples.
    """

    def __init__(self, draws: Tensor) -> None:
        self.draws = draws.double().flatten(1)
        gaps = torch.pdist(self.draws[:2_000])
        self.width = float(gaps[gaps > 0].median()) if (gaps > 0).any() else 1.0
        chance = torch.Generator().manual_seed(0)
        lines = torch.randn(self.draws.shape[1], PROJECTIONS, generator=chance, dtype=torch.float64)
        self.lines = lines / lines.norm(dim=0)

    def kernel_sum(self, x: Tensor, y: Tensor) -> float:
        """Σ_ij k(x_i, y_j); distances in float64, kernels in float32, in blocks that fit the cache."""
        total, of_y = 0.0, (y * y).sum(1)
        for block in x.split(BLOCK):
            square = ((block * block).sum(1)[:, None] + of_y).addmm_(block, y.T, alpha=-2).clamp_min_(0)
            k = square.mul_(-0.5 / (WIDTHS[0] * self.width) ** 2).float().exp_()
            total += float(k.sum(dtype=torch.float64))
            for _ in WIDTHS[1:]:
                k.square_().square_()  # half the width: the fourth power
                total += float(k.sum(dtype=torch.float64))
        return total / len(WIDTHS)

    def _within(self, x: Tensor) -> float:
        """Mean of k over pairs of different rows, of which k(x, x) = 1 is taken off."""
        n = len(x)
        return (self.kernel_sum(x, x) - n) / (n * (n - 1))

    @cached_property
    def _own(self) -> float:
        return self._within(self.draws)

    def mmd2(self, draws: Tensor) -> float:
        """Unbiased MMD² of draws (n, ...) to the reference."""
        x = draws.double().flatten(1)
        return self._within(x) + self._own - 2 * self.kernel_sum(x, self.draws) / (len(x) * len(self.draws))

    def w1(self, draws: Tensor) -> float:
        """Mean over directions of the exact W1 of projections."""
        return sliced_w1(draws.double().flatten(1), self.draws, self.lines)

    def floor(self, splits: int = 20) -> Floor:
        """Distances of random halves, in the same units."""
        chance, n = torch.Generator().manual_seed(1), len(self.draws) // 2
        squares, gaps = [], []
        for _ in range(splits):
            order = torch.randperm(2 * n, generator=chance)
            one, other = self.draws[order[:n]], self.draws[order[n:]]
            cross = self.kernel_sum(one, other) / n**2
            squares.append((self._within(one) + self._within(other) - 2 * cross) ** 2)
            gaps.append(sliced_w1(one, other, self.lines))
        return Floor(math.sqrt(np.mean(squares)), float(np.mean(gaps)))


def sliced_w1(x: Tensor, y: Tensor, lines: Tensor) -> float:
    """Mean over columns of lines (D, L) of ∫ |F_x - F_y| of the projections, exact for any two sizes."""
    a, b = (x @ lines).sort(0).values, (y @ lines).sort(0).values
    steps = torch.cat([torch.arange(1, len(v) + 1, dtype=torch.float64) / len(v) for v in (a, b)]).unique()
    width, middle = steps.diff(prepend=steps.new_zeros(1)), steps - 0.5 * steps.diff(prepend=steps.new_zeros(1))
    at = [v[(middle * len(v)).long().clamp_max(len(v) - 1)] for v in (a, b)]  # quantile functions
    return float((width[:, None] * (at[0] - at[1]).abs()).sum(0).mean())


def total_variation(shares: ArrayLike, masses: ArrayLike) -> float:
    """Σ |shares - masses| / 2."""
    return 0.5 * float(np.abs(np.asarray(shares) - np.asarray(masses)).sum())


# means and tables


class Mean(NamedTuple):
    """A mean over seeds and its standard error, NaN for a single one."""

    mean: float
    se: float

    def text(self, scale: float = 1.0) -> str:
        """Such as 0.123 ± 0.004: two digits of the error."""
        mean, se = self.mean * scale, self.se * scale
        if not se > 0:
            return f"{mean:,.4g}" if abs(mean) < 1e4 else f"{mean:,.0f}"
        digits = max(0, min(6, 1 - math.floor(math.log10(se))))
        return f"{mean:,.{digits}f} ± {se:,.{digits}f}"


def mean_se(values: ArrayLike) -> Mean:
    """Mean and standard error over axis 0.

    Raises:
        ValueError: no values.
    """
    x = np.asarray(values, float)
    if not len(x):
        raise ValueError("a mean needs at least one value")
    return Mean(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan)


def table(
    lines: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str | None], *, corner: str = "method"
) -> str:
    """Markdown table; a cell that is None reads "not run"."""
    body = [[line, *(cell(line, column) or NOT_RUN for column in columns)] for line in lines]
    return markdown_table(body, (corner, *columns))
