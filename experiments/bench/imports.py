"""What `import treesearch` and commands that compute nothing cost beside `import torch`: medians of processes run in
turn, so that a machine that is busy now and then is so for all of them.

    python -m experiments.bench.imports --out runs/bench/imports.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

WHAT: Mapping[str, tuple[str, ...]] = {
    "nothing": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import treesearch": ("-c", "import treesearch"),
    "import treesearch, torch": ("-c", "import treesearch, torch"),
    "ts.search": ("-c", "import treesearch; treesearch.search"),
    "treesearch --help": ("-m", "treesearch", "--help"),
    "treesearch ls": ("-m", "treesearch", "ls", "nowhere"),
    "treesearch list": ("-m", "treesearch", "list"),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the benchmark."""

    out: Path = Path("runs/bench/imports.json")
    rounds: int = 15
    """Processes of each kind, after one that is not counted."""


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each process, by what it does."""
    found: dict[str, list[float]] = {name: [] for name in WHAT}
    for turn in range(rounds + 1):
        for name, words in WHAT.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            if turn:
                found[name].append(time.perf_counter() - begun)
    return found


def report(found: Mapping[str, list[float]]) -> dict[str, object]:
    """Medians, and medians of the ratios of a turn to its `import torch`."""
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    torch = found["import torch"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds, torch, strict=True)) for name, seconds in found.items()
    }
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"rounds": len(torch), "cores": os.cpu_count(), "load": load, "seconds": medians, "of import torch": ratios}


def main(args: Args) -> None:
    """Measure, print and write."""
    told = report(measure(args.rounds))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
