"""What a memory is worth on the clips of `experiments.interventions.clips`: losses and flights.

    python -m experiments.interventions.memory run
    python -m experiments.interventions.memory report

Loss: of the same noised clips, with a memory of their own dynamics ("right"), with the memories of the batch permuted
("shuffled"; half of them are then right), of the other dynamics ("other") and with none. Flights: 25 steps of the
chain, each sample with a memory of its own; a parabola fitted to the dot says which dynamics it has, or neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.interventions.clips import DYNAMICS, SHAPE, clips_of, flight
from experiments.interventions.train_memory import LEVELS, K, noised, references, remembering
from experiments.interventions.video_model import VideoNetwork, build_encoder, kernel_of
from experiments.shared.cells import Cells, Row
from experiments.shared.stats import bootstrap
from experiments.shared.sweep import command_line, reporting
from treesearch.backends.interventions import Away, Intervened
from treesearch.backends.interventions.memory import Memory
from treesearch.backends.models.memory_encoder import MemoryEncoder
from treesearch.report.tables import markdown_table

KEY = ("part", "seed", "memory", "scale")
BATCH, BATCHES = 64, 16
STEPS, SAMPLES = 25, 256
MEMORIES = ("right", "shuffled", "other", "none")
SCALES = (0.0, 1.0, 2.0)
ASKED_SHARE = 0.8  # of samples that follow their memory
ASKED: list[Row] = [
    *({"part": "loss", "memory": memory} for memory in MEMORIES),
    {"part": "flights", "memory": "none", "scale": 0.0},
    *({"part": "flights", "memory": memory, "scale": scale} for scale in SCALES for memory in DYNAMICS),
]
WORDS = """# Memory on moving dots

A `WanTransformer3DModel` of two blocks, trained on clips of 8 × 8 pixels in which a dot flies evenly or as if thrown;
then, the transformer frozen, an encoder of memory that sees {k} other clips of the same dynamics. Written by
`python -m experiments.interventions.memory report` from `memory.jsonl`.

## Loss

Of {clips:,} clips of fresh draws, paired: the same clips, noise and levels for every memory. Differences to the right
memory, with 95 % intervals over clips; positive says that the right memory is better.

{losses}

## Flights

{samples} samples of each, {steps} steps, each with a memory of its own. A sample is of a dynamics where the
acceleration of its fitted parabola is within half the gravity of it and the dot stays within half a pixel of the
parabola; else it is neither. The transformer without memory is the first line. At scale w steps lead away from those
without memory, mean + w (mean - mean without), at two evaluations a step (`away`).

{flights}

Asked was that more than {asked:.0%} of samples are of the dynamics of their memory, whichever it is. The dynamics that
follows its memory least:

{least}

Encoders: {encoders}. Intervals above are over clips, and say nothing of another encoder.
"""


def networks(folder: Path, seed: int) -> tuple[nn.Module, MemoryEncoder]:
    """The transformer and an encoder, as they were trained."""
    network, encoder = VideoNetwork(), build_encoder()
    network.load_state_dict(_saved(folder / "base")["ema"])
    encoder.load_state_dict(_saved(folder / f"memory-{seed}")["network"])
    for each in (network, encoder):
        each.eval().requires_grad_(False)
    return network, encoder


def _saved(folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / "last.pt", map_location="cpu", weights_only=True)


@torch.no_grad()
def loss_of(network: nn.Module, encoder: MemoryEncoder, memory: str, seed: int = 0) -> list[float]:
    """Of each clip, the same clips for every memory."""
    rng, found = torch.Generator().manual_seed(900_001 + seed), []
    for _ in range(BATCHES):
        labels = torch.randint(len(DYNAMICS), (BATCH,), generator=rng)
        x, sigma, target = noised(clips_of(labels, rng), rng)
        own, other = (encoder(references(each, K, rng)) for each in (labels, 1 - labels))
        tokens = {"right": own, "shuffled": own[torch.randperm(BATCH, generator=rng)], "other": other}
        out = network(x, LEVELS * sigma) if memory == "none" else remembering(network, x, sigma, tokens[memory])
        found += (out - target).square().mean((1, 2, 3, 4)).tolist()
    return found


@torch.no_grad()
def flights_of(network: nn.Module, encoder: MemoryEncoder, memory: str, scale: float = 0.0, seed: int = 0) -> Row:
    """Shares of samples by dynamics; memory is one of them, or none, and scale leads away from no memory."""
    rng, plain, cond = torch.Generator().manual_seed(800_001 + seed), kernel_of(network, STEPS), None
    kernel: Any = plain
    if memory != "none":
        tokens = encoder(references(torch.full((SAMPLES,), DYNAMICS.index(memory)), K, rng))
        kernel = Intervened(plain, Memory(tuple(map(str, range(SAMPLES))), tokens))
        kernel = Away(kernel, plain, scale) if scale else kernel
        cond = {"choices": torch.arange(1, SAMPLES + 1)[:, None]}
    x = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(700_001 + seed))
    for t in range(STEPS, 0, -1):
        x = kernel.transition(x, torch.full((SAMPLES,), t), cond).mean
    seen = flight(x)
    shares = {name: float((seen.labels == i).double().mean()) for i, name in enumerate(DYNAMICS)}
    return {"shares": shares, "neither": float((seen.labels < 0).double().mean()),
            "acceleration": [float(seen.acceleration.mean()), float(seen.acceleration.std())]}  # fmt: skip


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no rows: run the experiment first")
    losses, flights = ([row for row in rows if row["part"] == part] for part in ("loss", "flights"))
    return WORDS.format(
        k=K,
        clips=len(losses[0]["losses"]),
        samples=SAMPLES,
        steps=STEPS,
        losses=markdown_table(
            loss_lines(losses), ("encoder's seed", *MEMORIES, "shuffled - right", "other - right", "none - right")
        ),
        flights=markdown_table(
            flight_lines(flights), ("encoder's seed", "memory", "scale", *DYNAMICS, "neither", "acceleration")
        ),
        asked=ASKED_SHARE,
        least=markdown_table(
            least_lines(flights), ("encoder's seed", "scale", "evaluations a step", "memory", "of its dynamics", "met")
        ),
        encoders=len({row["seed"] for row in rows}),
    )


def loss_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a seed."""
    lines = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        of = {row["memory"]: np.array(row["losses"]) for row in rows if row["seed"] == seed}
        gaps = [bootstrap((of[name] - of["right"])[None]) for name in MEMORIES[1:]]
        lines.append([str(seed), *(f"{of[name].mean():.4f}" for name in MEMORIES),
                      *(f"{gap.mean:.4f} ({gap.low:.4f} to {gap.high:.4f})" for gap in gaps)])  # fmt: skip
    return lines


def flight_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a seed, memory and scale."""
    lines = []
    for row in rows:
        shares = [*(row["shares"][name] for name in DYNAMICS), row["neither"]]
        mean, std = row["acceleration"]
        lines.append([str(row["seed"]), row["memory"], f"{row['scale']:g}", *(f"{share:.0%}" for share in shares),
                      f"{mean:.3f} ± {std:.3f}"])  # fmt: skip
    return lines


def least_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a seed and scale: the memory that is followed least."""
    lines = []
    for seed, scale in dict.fromkeys((row["seed"], row["scale"]) for row in rows):
        own = {row["memory"]: row["shares"][row["memory"]] for row in rows
               if (row["seed"], row["scale"]) == (seed, scale) and row["memory"] != "none"}  # fmt: skip
        least = min(own, key=lambda memory: own[memory])
        met = "yes" if own[least] > ASKED_SHARE else "no"
        lines.append([str(seed), f"{scale:g}", str(2 if scale else 1), least, f"{own[least]:.0%}", met])
    return lines


@dataclass(frozen=True, kw_only=True)
class Run:
    """Measure what is not in the rows."""

    checkpoints: Path = Path("checkpoints/interventions/memory")
    """base/ and memory-SEED/ of `train_memory`."""
    out: Path = Path("runs/results/interventions/memory.jsonl")
    """one row a figure"""
    seeds: tuple[int, ...] = (0,)
    """of encoders"""
    threads: int = 1

    def run(self) -> int:
        torch.set_num_threads(self.threads)
        cells = Cells(self.out, KEY)
        for seed in self.seeds:
            network, encoder = networks(self.checkpoints, seed)
            asked: list[Row] = [{"seed": seed} | row for row in ASKED]
            for row in (row for row in asked if row not in cells):
                measured = (
                    {"losses": loss_of(network, encoder, row["memory"])}
                    if row["part"] == "loss"
                    else flights_of(network, encoder, row["memory"], row["scale"])
                )
                cells.add(row | measured)
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("memory", {"run": Run, "report": reporting("interventions/memory", KEY, report)}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
