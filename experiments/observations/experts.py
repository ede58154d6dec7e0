"""What noise-aware values are worth to Feynman-Kac steering: make experts-evidence DATA=mnist.npz

    run        searches at equal NFE, one row each: levels scored by endpoints, by experts, by the label head
    accuracy   the digit classifier on noisy test images, band by band of noise: as it is, by one expert, by five
    report     experts.md of both

    digit       mnist(25), digit(8), λ = 1: endpoints; experts of x_t; experts of x̂_0; experts of x_t as a guide too
    two heads   multitask(25), digit(8), λ = 1: endpoints; the label head
    JPEG size   mnist(25), compressibility(), λ = 40, about 3 over its spread: endpoints; experts of x̂_0

Families and settings were fixed before a search was run; λ of the JPEG size by the spread of 128 rollouts. Spread is
the standard deviation of log Ẑ over seeds, with 95 % bounds of its ratio to that of endpoints (F law, as if log Ẑ were
normal); other differences are paired by seed, with Student's bounds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import f as fisher
from torch import Tensor

import treesearch as ts
from experiments.mnist.train_classifiers import load_split
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import over_seeds
from experiments.shared.sweep import Sweep, command_line
from treesearch.backends.base import expand
from treesearch.backends.guidance import TDS, Valued, banded
from treesearch.backends.guidance.experts import Experts
from treesearch.backends.models.mnist import TRAIN_STEPS, cosine_alphas_cumprod, mnist_kernel, to_images
from treesearch.backends.models.multi_task import LabelHead, multi_task_kernel
from treesearch.report.tables import markdown_table
from treesearch.rewards.base import Reward
from treesearch.rewards.images.classifier import digit, load_classifier
from treesearch.rewards.images.image import compressibility
from treesearch.runs.files import write_text

KEY = ("bed", "arm", "seed")
DIGIT, STEPS, PARTICLES = 8, 25, 32
ARMS = {
    "digit": ("endpoints", "experts of x_t", "experts of x̂_0", "experts of x_t, guide"),
    "two heads": ("endpoints", "label head"),
    "JPEG size": ("endpoints", "experts of x̂_0"),
}
LAM = {"digit": 1.0, "two heads": 1.0, "JPEG size": 40.0}
LEVELS = (20, 15, 10, 5, 0)
BANDS, CHECKED = 5, 1_000
FEWEST = 3  # seeds of a line


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    bed: str
    arm: str
    seed: int


@cache
def kernels() -> tuple[Any, Any]:
    """Both kernels, made once."""
    return mnist_kernel(STEPS), multi_task_kernel(num_steps=STEPS)


def posed(job: Job, jpeg: Path) -> tuple[Any, Reward]:
    """Kernel and reward of a cell."""
    one, two = kernels()
    reward = compressibility() if job.bed == "JPEG size" else digit(DIGIT)
    plain = two if job.bed == "two heads" else one
    seen = str(jpeg) if job.bed == "JPEG size" else "ppap_endpoint.safetensors"
    made: dict[str, Callable[[], Any]] = {
        "endpoints": lambda: plain,
        "experts of x_t": lambda: Valued(plain, reward, "ppap.safetensors"),
        "experts of x_t, guide": lambda: TDS(plain, reward, value="ppap.safetensors", through_network=False),
        "experts of x̂_0": lambda: Valued(plain, reward, seen),
        "label head": lambda: Valued(plain, reward, LabelHead(DIGIT)),
    }
    return made[job.arm](), reward


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    beds: tuple[str, ...] = tuple(ARMS)
    """which beds"""
    seeds: tuple[int, ...] = tuple(range(12))
    """which seeds"""
    jpeg: Path = Path("checkpoints/experts/jpeg.safetensors")
    """experts of the JPEG size, which `train_experts` made"""
    out: Path = Path("runs/results/observations/experts.jsonl")
    """one row a cell"""

    def run(self) -> int:
        every = Sweep(Cells(self.out, KEY), self._cell, said)
        every.fill(Job(bed, arm, seed) for seed in self.seeds for bed in self.beds for arm in ARMS[bed])
        return 0

    def _cell(self, job: Job) -> Row:
        kernel, reward = posed(job, self.jpeg)
        method = ts.FeynmanKac(num_particles=PARTICLES, lam=LAM[job.bed], schedule=LEVELS)
        found = ts.search(kernel, reward, method, seed=job.seed, progress=False)
        task, spent = found.tasks[0], found.cost
        return job.row | {
            "log_z": task.log_z,
            "ess": task.diagnostics["ess_levels"][0],
            "resamplings": task.diagnostics["resamplings"][0],
            "reward": float((task.log_weights.softmax(0) * task.rewards).sum()),
            "nfe": spent.nfe,
            "backward_nfe": spent.backward_nfe,
            "reward_calls": spent.reward_calls,
            "seconds": spent.seconds,
        } | where_it_ran()  # fmt: skip


def said(row: Row) -> str:
    """What a cell says."""
    return f"log Ẑ {row['log_z']:.3f}, ESS {row['ess'][-1]:.1f}"


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of noisy test images that are read aright."""

    data: Path
    """npz file with test_x, test_y: uint8 images (n, 28, 28) and labels"""
    single: Path = Path("checkpoints/experts/single.safetensors")
    """one expert for all levels; left out where it is not there"""
    seed: int = 0
    out: Path = Path("runs/results/observations/experts.json")

    def run(self) -> int:
        images, labels = load_split(self.data, "test", CHECKED)
        reward, kernel = digit(DIGIT), mnist_kernel(TRAIN_STEPS)
        names = {"five experts of x_t": "ppap.safetensors", "five experts of x̂_0": "ppap_endpoint.safetensors"}
        if self.single.exists():
            names |= {"one expert of x_t": str(self.single)}
        families = {name: Valued(kernel, reward, file).value for name, file in names.items()}
        found = accuracies(kernel, families, images.float() / 127.5 - 1, labels, self.seed)
        card = Experts.load("ppap.safetensors")
        told = {"share": banded.share(load_classifier(), card.changes), "seed": self.seed, "images": len(images)}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out, json.dumps({"settings": told, "accuracy": found}, indent=1, ensure_ascii=False) + "\n")
        return 0


@torch.no_grad()
def accuracies(
    kernel: Any, families: Mapping[str, Any], x0: Tensor, labels: Tensor, seed: int
) -> dict[str, list[float]]:
    """Shares by band, least noise first; the same noise for all.

    Args:
        kernel: with a level for every training step.
        families: values of it.
        x0, labels: states (n, 1, 28, 28) and their digits (n,).
        seed: of levels and noise.
    """
    bars, rng = cosine_alphas_cumprod(), torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for band in range(BANDS):
        right: dict[str, int] = {}
        for part, y in zip(x0.split(200), labels.split(200), strict=True):
            width = TRAIN_STEPS // BANDS
            t = band * width + 1 + torch.randint(width, (len(part),), generator=rng)
            alpha, sigma = (expand(a[t - 1].float(), part) for a in (bars.sqrt(), (1 - bars).sqrt()))
            x = alpha * part + sigma * torch.randn(part.shape, generator=rng)
            end = kernel.transition(x, t).endpoint
            read = {"as it is, of x_t": load_classifier()((x + 1) / 2)}
            read["as it is, of x̂_0"] = load_classifier()(to_images(end))
            read |= {name: logits(value, x, end, t) for name, value in families.items()}
            for name, out in read.items():
                right[name] = right.get(name, 0) + int((out.argmax(1) == y).sum())
        for name, count in right.items():
            found.setdefault(name, []).append(count / len(x0))
    return found


def logits(value: Any, x: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """What a family's network returns, (n, 10)."""
    of_end = value.experts.card.reads == "endpoint"
    seen = value.sight.of_endpoint(end) if of_end else value.seen(x, t)
    return banded.call(value.network, value.changes, seen, value.band[t])


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page of both."""

    rows: Path = Path("runs/results/observations/experts.jsonl")
    """what `run` wrote"""
    accuracy: Path = Path("runs/results/observations/experts.json")
    """what `accuracy` wrote"""
    out: Path = Path("runs/results/observations/experts.md")
    """the page"""

    def run(self) -> int:
        write_text(self.out, report(Cells(self.rows, KEY).rows, json.loads(self.accuracy.read_text("utf-8"))))
        print(self.out)
        return 0


COLUMNS = (
    "scored by",
    "log Ẑ",
    "spread",
    "over that of endpoints",
    "ESS of x_0",
    "− that of endpoints",
    "reward calls",
)


def report(rows: Sequence[Row], accuracy: Mapping[str, Any]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    parts = [section(bed, [row for row in rows if row["bed"] == bed]) for bed in ARMS]
    if not any(parts):
        raise ValueError("there are no rows: run the experiment first")
    told = accuracy["settings"]
    body = [[name, *(f"{share:.3f}" for share in each)] for name, each in accuracy["accuracy"].items()]
    bands = [f"{n / BANDS:g} to {(n + 1) / BANDS:g}" for n in range(BANDS)]
    return (
        "# Experts as values of noisy states\n\n"
        f"Feynman-Kac steering, {PARTICLES} particles, {STEPS} steps, five levels. Bounds are of 95 %; spread is the "
        "standard deviation of log Ẑ over seeds; ESS is that of the weights since the last resampling.\n\n"
        + "\n".join(part for part in parts if part)
        + "\n## Reading noisy digits\n\n"
        f"Share of {told['images']:,} test images, noised to training steps drawn from each fifth, that the classifier "
        f"puts first. An expert's changes are {told['share']:.1%} of its weights.\n\n"
        + markdown_table(body, ("classifier", *bands))
        + "\n"
    )


def section(bed: str, rows: Sequence[Row]) -> str:
    """Both tables of a bed; empty where it was not run."""
    arms = {arm: {r["seed"]: r for r in rows if r["arm"] == arm} for arm in ARMS[bed]}
    base = arms["endpoints"]
    shown = {arm: [of[s] for s in sorted(set(of) & set(base))] for arm, of in arms.items()}
    shown = {arm: each for arm, each in shown.items() if len(each) >= FEWEST}
    if not shown:
        return ""
    lines = [line(arm, each, [base[r["seed"]] for r in each]) for arm, each in shown.items()]
    first = shown["endpoints"][0]
    ess = [[arm, *(f"{v:.1f}" for v in np.mean([r["ess"] for r in each], axis=0))] for arm, each in shown.items()]
    title, seeds = f"{bed[0].upper()}{bed[1:]}, λ = {LAM[bed]:g}", len(shown["endpoints"])
    return (
        f"## {title}\n\n{seeds} seeds, {first['nfe']:,} NFE each.\n\n"
        f"{markdown_table(lines, COLUMNS)}\n\nESS by level:\n\n"
        f"{markdown_table(ess, ('scored by', *(f't = {t}' for t in LEVELS)))}\n"
    )


def line(arm: str, rows: Sequence[Row], base: Sequence[Row]) -> list[str]:
    """What a table says of an arm."""
    log_z, ess = np.array([r["log_z"] for r in rows]), np.array([r["ess"][-1] for r in rows])
    half = bound(log_z)
    cells = [arm, f"{log_z.mean():.3f} ± {half:.3f}", f"{log_z.std(ddof=1):.3f}", "", f"{ess.mean():.1f}", "",
             f"{np.mean([r['reward_calls'] for r in rows]):.0f}"]  # fmt: skip
    if arm != "endpoints":
        cells[3] = "{:.2f} ({:.2f} to {:.2f})".format(*spread_ratio(log_z, np.array([r["log_z"] for r in base])))
        gap = ess - np.array([r["ess"][-1] for r in base])
        cells[5] = f"{gap.mean():+.1f} ± {bound(gap):.1f}"
    return cells


def bound(values: np.ndarray) -> float:
    """Half of Student's interval."""
    mean, low, _ = over_seeds(values)
    return mean - low


def spread_ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Ratio of standard deviations, and its bounds."""
    ratio, n, m = a.var(ddof=1) / b.var(ddof=1), len(a) - 1, len(b) - 1
    low, high = ratio / fisher.ppf(0.975, n, m), ratio / fisher.ppf(0.025, n, m)
    return float(ratio**0.5), float(low**0.5), float(high**0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("experts", {"run": Run, "accuracy": Accuracy, "report": Report}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
