"""`bench`: how fast a kernel is here, alone and in a search."""

from __future__ import annotations

import json
from dataclasses import dataclass

from treesearch.cli import probe
from treesearch.cli.arguments import rows
from treesearch.cli.base import Command
from treesearch.registry import registry as specs
from treesearch.report import tables as report
from treesearch.report.terminal import say
from treesearch.rewards.base import as_reward


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
