"""Where and with what a session computes, and the memory that it takes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from typing import Any

import torch

from treesearch.backends.base import Kernel, describe

PACKAGES = ("treesearch", "torch", "diffusers", "transformers", "numpy")


class Peak:
    """Peak memory from here on: of the GPU where the kernel is on one, else of this process since its start."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.name = torch.cuda.get_device_name(device) if self._cuda is not None else "cpu, whole process"
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def megabytes(self) -> float:
        """In units of 2^20 bytes."""
        if self._cuda is not None:
            return round(torch.cuda.max_memory_allocated(self._cuda) / 2**20, 1)
        unit = 1 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def machine(kernel: Kernel) -> dict[str, Any]:
    """Record of where and with what a session computes."""
    spec = describe(kernel)
    device = torch.cuda.get_device_name(spec.device) if spec.device.type == "cuda" else platform.machine()
    return {
        "kind": "session",
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "num_steps": spec.num_steps,
        "rows_per_nfe": max(spec.rows_per_nfe),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
