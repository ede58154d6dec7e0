"""`bench`, `env` and `cite`: about this library and the machine it is on."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass

import torch
from tyro.conf import Positional

from treesearch.citations import bibtex
from treesearch.cli import probe
from treesearch.cli.arguments import Command, rows
from treesearch.core.compiled import kept_in
from treesearch.core.tree import add_child
from treesearch.methods import METHODS
from treesearch.registry import registry as specs
from treesearch.report import tables as report
from treesearch.report.terminal import say
from treesearch.rewards.base import as_reward
from treesearch.runs.config import read_config
from treesearch.version import __version__


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


@dataclass(frozen=True, kw_only=True)
class Env(Command):
    """Versions and devices, for a bug report."""

    def run(self) -> int:
        from importlib.metadata import PackageNotFoundError, version

        say(f"treesearch {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
        names = ("torch", "numpy", "numba", "diffusers", "transformers", "ray", "safetensors", "tyro", "matplotlib")
        for name in names:
            try:
                say(f"{name} {version(name)}")
            except PackageNotFoundError:
                say(f"{name}: not installed")
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        say(f"threads {torch.get_num_threads()}, CUDA {', '.join(devices) or 'none'}")
        say(f"compiled code: {_kept()}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Cite(Command):
    """BibTeX of the papers behind methods (all, or a run's)."""

    path: Positional[str | None] = None

    def run(self) -> int:
        names = METHODS if self.path is None else [read_config(self.path)["method"]["name"]]
        say(bibtex(paper for name in names for paper in METHODS[name].papers))
        return 0


def _kept() -> str:
    """Where compiled code is kept."""
    if (folder := kept_in(add_child)) is not None:
        return f"kept in {folder}"
    return "compiled in every process, some ten seconds at its first search: NUMBA_CACHE_DIR=FOLDER keeps it"
