"""Memory of `result.save` beside the size of what it saves: many small samples, and few large ones.

    python -m experiments.bench.saving

Each case runs in a process of its own. `saving` is how far the peak of its resident memory rises above what it was when
the search, whose run folder holds the states, was over.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import treesearch as ts
from experiments.shared.cells import where_it_ran
from treesearch.backends.base import Gaussian
from treesearch.runs.files import write_json

MB = 2**20


class Enlarged:
    """White noise on 3 × 8 × 8, decoded to squares of `side` pixels."""

    num_steps, state_shape = 1, (3, 8, 8)

    def __init__(self, side: int) -> None:
        self.side = side

    def prior(self, noise: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return noise

    def transition(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Gaussian:
        return Gaussian(x, torch.zeros(len(x), 1, 1, 1), endpoint=x)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x0, (self.side, self.side))


def level(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, 0]


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        small: samples of 8 × 8.
        large: samples of `side` × `side`.
        side: in pixels.
        out: file of the figures.
    """

    small: int = 100_000
    large: int = 200
    side: int = 1024
    out: Path = Path("runs/saving.json")


def case(samples: int, side: int) -> dict[str, Any]:
    """Figures of one case, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_case, (samples, side))


def _case(samples: int, side: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kernel, method = Enlarged(side), ts.BestOfN(n=samples)
        result = ts.search(kernel, level, method, store=f"{folder}/run", batch_size=1 if side > 64 else 1024)
        before, began = _peak(), time.perf_counter()
        result.save(f"{folder}/saved")
        took = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(folder, "saved").iterdir())
    saving = round((_peak() - before) / MB, 1)
    return {
        "samples": samples,
        "side": side,
        "saved_mb": round(size / MB, 1),
        "saving_mb": saving,
        "seconds": round(took, 1),
    }


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    args = tyro.cli(Args)
    found = {"cases": [case(args.small, 8), case(args.large, args.side)]} | where_it_ran()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
