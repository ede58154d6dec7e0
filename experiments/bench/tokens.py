"""What a step of masked text costs beside the network: a table of all positions against logits of the masked ones.

    python -m experiments.bench.tokens --rows 4 --length 64 --vocabulary 126464

Each form runs in a process of its own, from the network's float32 logits (whose memory is not counted) to x_{t-1} and
its log-probability, with half of the positions masked and a tenth of those revealed. Memory is the growth of the
process's peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import tyro

from treesearch.backends.base import Categorical, Tokens

REVEAL = 0.1


@dataclass(frozen=True)
class Args:
    """Arguments."""

    rows: int = 4
    length: int = 64
    vocabulary: int = 126_464
    form: str = "both"
    """table, tokens, or both in turn"""


def measure(args: Args) -> dict[str, float]:
    """Seconds and mebibytes of one step in this process."""
    draw = torch.Generator("cpu").manual_seed(0)
    logits = torch.randn(args.rows, args.length, args.vocabulary, generator=draw)
    x = torch.zeros(args.rows, args.length, dtype=torch.int64)
    x[:, ::2] = args.vocabulary
    noise = torch.randn(x.shape, generator=draw)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    law = table(logits, x) if args.form == "table" else tokens(logits, x)
    law.log_prob(law.sample(noise))
    spent = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return asdict(args) | {"seconds": round(spent, 3), "MiB": round(grown)}


def table(logits: torch.Tensor, x: torch.Tensor) -> Categorical:
    """All probabilities in float64, the mask's in the last column."""
    size = logits.shape[-1]
    probs = torch.zeros(*x.shape, size + 1, dtype=torch.float64)
    masked = x == size
    probs[..., :size][masked] = REVEAL * logits[masked].double().softmax(-1)
    probs[masked, size] = 1 - REVEAL
    probs.scatter_(-1, x[..., None], torch.where(masked, 1 - REVEAL, 1.0).double()[..., None])
    return Categorical(probs, torch.where(masked, logits.argmax(-1), x))


def tokens(logits: torch.Tensor, x: torch.Tensor) -> Tokens:
    """Logits of masked positions, in the network's dtype."""
    masked = x == logits.shape[-1]
    at = torch.where(masked, masked.flatten().cumsum(0).reshape(x.shape) - 1, -1)
    picked, endpoint = logits[masked], x.clone()
    endpoint[masked] = picked.argmax(-1)
    return Tokens(x, at, picked, torch.full((len(picked),), REVEAL, dtype=torch.float64), endpoint)


def main(args: Args) -> None:
    """Measure one form here, or each in a process of its own."""
    if args.form != "both":
        print(json.dumps(measure(args)))
        return
    for form in ("table", "tokens"):
        told = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(replace(args, form=form)).items()]
        subprocess.run([sys.executable, "-m", "experiments.bench.tokens", *told], check=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
