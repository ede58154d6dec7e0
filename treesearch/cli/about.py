"""`env` and `cite`: about this library and the machine it is on. Neither needs torch: it may be what is broken."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from treesearch import host
from treesearch.citations import bibtex
from treesearch.cli.base import Command
from treesearch.core.compiled import kept_in
from treesearch.core.tree import add_child
from treesearch.methods import METHODS
from treesearch.report.terminal import say
from treesearch.runs.config import read_config
from treesearch.version import __version__

_GPUS = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


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
        threads = os.environ.get("OMP_NUM_THREADS", "not set")
        say(f"cores {host.cores()}, OMP_NUM_THREADS {threads}, torch is built for CUDA {_built_for()}")
        say(f"GPUs: {_gpus()}")
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


def _built_for() -> str:
    """The CUDA that torch says it is built for, read from its file."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "-"
    try:
        told = (Path(torch.origin).parent / "version.py").read_text("utf-8")
    except OSError:
        return "-"
    found = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)", told, re.MULTILINE)
    return "none" if found is None else found[1]


def _gpus() -> str:
    """Names and driver, as the driver has them."""
    try:
        told = subprocess.run(_GPUS, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "none, as nvidia-smi is not here or fails"
    return "; ".join(" ".join(line.split()) for line in told.splitlines()) or "none"


def _kept() -> str:
    """Where compiled code is kept."""
    if (folder := kept_in(add_child)) is not None:
        return f"kept in {folder}"
    return "compiled in every process, some ten seconds at its first search: NUMBA_CACHE_DIR=FOLDER keeps it"
