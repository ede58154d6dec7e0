"""Tables and the figure of `experiments.mixtures.evidence`, and what its numbers say, from its rows alone.

MMD² is unbiased, so exact sampling has mean 0 and the floor that stands beside it; the figure shows its square root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.shared import evidence_duels as duels
from experiments.shared import evidence_figures as figures
from experiments.shared import evidence_report as shared
from experiments.shared.cells import Row
from experiments.shared.evidence_report import Found, gather
from experiments.shared.tables import NOT_RUN
from treesearch.core.tree import Tree
from treesearch.report.tables import DASH, markdown_table

METRICS = {
    "mmd2": ("MMD² × 10³", 1e3),
    "mode_error": ("mode error", 1.0),
    "w1": ("sliced W1", 1.0),
    "log_z_error": ("log Z error", 1.0),
    "mean_reward": ("E[r]", 1.0),
    "distinct": ("distinct leaves", 1.0),
    "roots": ("roots", 1.0),
    "ess": ("ESS", 1.0),
    "samples": ("leaves", 1.0),
}
DUELS = {name: METRICS[name] for name in ("mmd2", "mode_error")}
BUDGETS = (10_000, 100_000, 1_000_000)
OWN = ("tree_sampling", "tree_sampling_guided")
SEEDS = 5  # of a line that is complete
EXPLAINED = (
    "Means ± standard errors over seeds, of 2,000 draws with replacement. MMD²: unbiased, to 4,000 reference draws. "
    "Mode error: total variation of the mode shares. Sliced W1: mean over 128 directions of the exact W1. log Z error: "
    "mean of |log Ẑ - log Z|; a dash where the method has no Ẑ. Distinct leaves, roots (unique ancestors at x_T): "
    "among the 2,000 draws. Tuned and published settings are lines of their own where they differ. Rejection needs a "
    "bounded reward, which mix16 has not."
)


def with_trees(rows: Sequence[Row]) -> list[Row]:
    """Rows with the memory of the tree's topology, which its nodes alone decide."""
    size = sum(getattr(Tree(1, 0), name).itemsize for name in Tree.COLUMNS)
    return [row | {"tree_bytes": row["nodes"] * size} if "nodes" in row else row for row in rows]


def bed_table(found: Found) -> str:
    """What the beds are."""
    lines = []
    for bed, row in found.references.items():
        exact = row["closed_form_log_z"]
        lines.append(
            [
                bed,
                f"{row['lam']:.3g}",
                f"{row['ess_fraction']:.3g}",
                f"{row['log_z']:.3f} ± {row['log_z_se']:.3f}",
                DASH if exact is None else f"{exact:.3f}",
                f"{row['prior_reward']:.2f} → {row['mean_reward']:.2f}",
                f"{row['how']} from {row['rollouts']:,}",
                f"{row['mmd2'] * 1e3:.2f}",
                f"{row['mode_error']:.3f}",
                f"{row['w1']:.3f}",
            ]
        )
    columns = ("bed", "λ", "ESS fraction of IS", "log Z", "of the mixture", "E[r], prior → π", "reference")
    return markdown_table(lines, (*columns, "floor: MMD² × 10³", "mode error", "sliced W1")) if lines else NOT_RUN


def compose(rows: Sequence[Row], figure: str, names: Mapping[str, Sequence[str]] | None = None) -> str:
    """The report."""
    found = gather(with_trees(rows), "bed", names)
    parts = [
        "# Mixtures with known targets: MMD, modes and log Z at equal NFE",
        f"## Who is best, or level with the best\n\nBy MMD². {duels.RULE}",
        duels.verdict(found, "mmd2"),
        f"![MMD against NFE]({figure})\n\nDashed: published settings. Dotted: floor.",
        "## What was run\n\n" + shared.coverage_table(found, BUDGETS, SEEDS),
        "## Beds\n\n" + bed_table(found),
        "Floor: what exact sampling comes out with, from halves of the reference.",
        *(duels.rare_section(found, name, "mmd2") for name in OWN),
        duels.duel_section(found, DUELS),
    ]
    parts += [
        *shared.sections(found, METRICS, BUDGETS),
        EXPLAINED,
        f"## Anytime: MMD² × 10³, mean over log NFE\n\n{duels.area_table(found, 'mmd2')}",
        duels.crossing_section(found, "mmd2", floors_of(rows)),
        shared.tuning_section(found),
        "## Ended below their NFE\n\n" + shared.below(found),
        "## Failed\n\n" + shared.failures(found),
        "## Where\n\n" + shared.where(rows),
    ]
    return "\n\n".join(parts) + "\n"


def floors_of(rows: Sequence[Row]) -> dict[str, float]:
    """MMD² of exact sampling, by bed."""
    return {row["bed"]: row["mmd2"] for row in rows if row["kind"] == "reference"}


def write(files: Sequence[Path], out: Path, key: Sequence[str], names: Mapping[str, Sequence[str]]) -> str:
    """Write the report and its figure; returns the report."""
    rows = shared.read_all(files, key)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = figures.distance_figure(gather(rows, "bed", names), "mmd2", floors_of(rows), out.with_suffix(".png"))
    text = compose(rows, figure, names)
    out.write_text(text, "utf-8")
    return text
