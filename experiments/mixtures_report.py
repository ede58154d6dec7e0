"""Tables and the figure of `experiments.mixtures`, and what its numbers say, from its rows alone.

MMD² is unbiased, so exact sampling has mean 0 and the floor that stands beside it; the figure shows its square root. A
method is best on a bed, or level with the best, where its mean MMD² is within two standard errors of the difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from experiments.evidence import Mean, Row, mean_se, read, table
from treesearch.errors import StoreError, missing
from treesearch.report import DASH, markdown

METRICS = {
    "mmd2": ("MMD² × 10³", 1e3),
    "mode_error": ("mode error", 1.0),
    "w1": ("sliced W1", 1.0),
    "log_z_error": ("log Z error", 1.0),
    "mean_reward": ("E[r]", 1.0),
    "distinct": ("distinct leaves", 1.0),
    "roots": ("roots", 1.0),
    "ess": ("ESS", 1.0),
}
COSTS = {
    "nfe": "NFE",
    "work": "NFE + 2·backward",
    "reward_calls": "reward calls",
    "seconds": "seconds",
    "nodes": "nodes",
}
FAILED = "failed"
RULE = (
    "By MMD². Level: within two standard errors of the difference of means over seeds, so that a method whose seeds "
    "spread is easily level; each line is in order of the means, the lowest first.\n\n"
)
EXPLAINED = (
    "Means ± standard errors over seeds, of 2,000 draws with replacement. MMD²: unbiased, to 4,000 reference draws. "
    "Mode error: total variation of the mode shares. Sliced W1: mean over 128 directions of the exact W1. log Z error: "
    "mean of |log Ẑ - log Z|; a dash where the method has no Ẑ. Distinct leaves, roots: among the 2,000 draws. "
    "Published settings are a line of their own where tuning chose others."
)


@dataclass(frozen=True)
class Found:
    """Rows by what identifies them.

    Args:
        beds: reference rows, by bed.
        budgets: of the cells.
        lines: for every bed, (label, method, settings).
        cells: (bed, method, settings as JSON, budget) -> rows, one a seed.
    """

    beds: dict[str, Row]
    budgets: tuple[int, ...]
    lines: dict[str, list[tuple[str, str, str]]]
    cells: dict[tuple[str, str, str, int], list[Row]]
    choices: list[Row]

    def rows(self, bed: str, label: str, budget: int) -> list[Row]:
        """Cells of a line."""
        method, settings = next((m, s) for name, m, s in self.lines[bed] if name == label)
        return self.cells.get((bed, method, settings, budget), [])

    def mean(self, bed: str, label: str, budget: int, metric: str) -> Mean | None:
        """Mean over seeds, None where nothing was run or one of them failed."""
        values = [row.get(metric) for row in self.rows(bed, label, budget)]
        return mean_se(values) if values and None not in values else None


def gather(rows: Sequence[Row]) -> Found:
    """Sort rows.

    Raises:
        StoreError: nothing has been measured.
    """
    beds = {row["bed"]: row for row in rows if row["kind"] == "reference"}
    choices = [row for row in rows if row["kind"] == "choice"]
    cells: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "cell":
            cells.setdefault((row["bed"], row["method"], _text(row["settings"]), row["budget"]), []).append(row)
    if not choices:
        raise StoreError("no method has been tuned yet: go on with the run")
    lines: dict[str, list[tuple[str, str, str]]] = {bed: [] for bed in beds}
    for choice in choices:
        name, picked, published = choice["method"], _text(choice["picked"]), _text(choice["published"])
        lines[choice["bed"]].append((name, name, picked))
        if picked != published:
            lines[choice["bed"]].append((f"{name}, published", name, published))
    budgets = tuple(sorted({key[3] for key in cells})) or (0,)
    return Found(beds, budgets, lines, cells, choices)


def _text(settings: Row) -> str:
    return json.dumps(settings, sort_keys=True)


def metric_table(found: Found, bed: str, budget: int) -> str:
    """One bed at one budget: methods by metrics."""

    def one(label: str, column: str) -> str | None:
        metric, scale = next((m, s) for m, (title, s) in METRICS.items() if title == column)
        if not found.rows(bed, label, budget):
            return None
        if any("error" in row for row in found.rows(bed, label, budget)):
            return FAILED
        mean = found.mean(bed, label, budget, metric)
        return DASH if mean is None else mean.text(scale)

    return table([label for label, _, _ in found.lines[bed]], [title for title, _ in METRICS.values()], one)


def cost_table(found: Found, budget: int) -> str:
    """Costs of a method at one budget, mean over beds and seeds."""
    labels = list(dict.fromkeys(label for lines in found.lines.values() for label, _, _ in lines))

    def one(label: str, column: str) -> str | None:
        name = next(n for n, title in COSTS.items() if title == column)
        beds = [bed for bed, lines in found.lines.items() if label in [line[0] for line in lines]]
        rows = [row for bed in beds for row in found.rows(bed, label, budget)]
        values = [row[name] for row in rows if "error" not in row]
        if not values:
            return FAILED if rows else None
        return Mean(float(np.mean(values)), np.nan).text()

    return table(labels, list(COSTS.values()), one)


def bed_table(found: Found) -> str:
    """What the beds are."""
    lines = []
    for bed, row in found.beds.items():
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
    return markdown(lines, (*columns, "floor: MMD² × 10³", "mode error", "sliced W1"))


def leaders(found: Found, bed: str, budget: int) -> list[str]:
    """The line of lowest MMD² and those that are not beyond it by two standard errors, best first."""
    means = {label: found.mean(bed, label, budget, "mmd2") for label, _, _ in found.lines[bed]}
    known = {label: mean for label, mean in means.items() if mean is not None}
    if not known:
        return []
    order = sorted(known, key=lambda label: known[label].mean)
    return [label for label in order if not known[order[0]].beyond(known[label])]


def duel(found: Found, one: str, other: str, budget: int) -> tuple[list[str], list[str], list[str]]:
    """Beds on which the first has the lower MMD² by two standard errors, the higher, or neither."""
    won, lost, level = [], [], []
    for bed in found.beds:
        labels = [label for label, _, _ in found.lines[bed]]
        means = [found.mean(bed, _published(name, labels), budget, "mmd2") for name in (one, other)]
        if means[0] is None or means[1] is None:
            continue
        (won if means[0].beyond(means[1]) else lost if means[1].beyond(means[0]) else level).append(bed)
    return won, lost, level


def _published(name: str, labels: Sequence[str]) -> str:
    """The published line of "name, published", which is the method's only one where tuning chose the same."""
    plain = name.removesuffix(", published")
    return name if name in labels else plain if plain in labels else labels[0]


def verdict(found: Found) -> str:
    """Who wins, counted."""
    parts = []
    for budget in found.budgets:
        best = {bed: leaders(found, bed, budget) for bed in found.beds}
        best = {bed: names for bed, names in best.items() if names}
        if not best:
            continue
        tally: dict[str, int] = {}
        for names in best.values():
            for name in names:
                tally[name] = tally.get(name, 0) + 1
        order = sorted(tally, key=lambda name: -tally[name])
        counted = ", ".join(f"{name} {tally[name]}" for name in order)
        lines = [f"**{budget:,} NFE** ({len(best)} of {len(found.beds)} beds). Best or level with the best: {counted}."]
        lines += [f"- {bed}: {' = '.join(names)}" for bed, names in best.items()]
        for one, other in (
            ("dts, published", "importance"),
            ("dts", "importance"),
            ("dts", "fk_difference"),
            ("fk_difference", "importance"),
            ("tds", "fk_difference"),
        ):
            won, lost, level = duel(found, one, other, budget)
            if won or lost or level:
                lines.append(f"- {one} against {other}: {_beds(won)} better, {_beds(lost)} worse, {_beds(level)} level")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Nothing has been measured yet."


def _beds(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "0"


def choice_table(found: Found) -> str:
    """Chosen settings and their MMD² beside the published settings'."""
    lines = []
    for choice in found.choices:
        if len(choice["grid"]) > 1:
            score = {_text(g["settings"]): g["mmd2"] for g in choice["grid"]}
            shown = [score[_text(choice[which])] for which in ("picked", "published")]
            cells = [FAILED if value is None else f"{value * 1e3:.3g}" for value in shown]
            lines.append([choice["bed"], choice["method"], f"`{_text(choice['picked'])}`", *cells])
    return markdown(lines, ("bed", "method", "chosen", "MMD² × 10³", "of the published settings"))


def draw(found: Found, path: Path) -> Path:
    """MMD against NFE, one panel a bed."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing("matplotlib", "plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(choice["method"] for choice in found.choices))
    style = dict(
        zip(methods, zip(cycle(plt.get_cmap("tab20").colors), cycle("os^Dv*Px<>"), strict=False), strict=False)
    )
    style |= {"dts": ("black", "o")}
    columns = min(4, len(found.beds))
    rows = -(-len(found.beds) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.1 * rows + 1), squeeze=False)
    for axis, (bed, known) in zip(axes.flat, found.beds.items(), strict=False):
        floor = max(known["mmd2"], 1e-12) ** 0.5
        axis.axhline(floor, color="grey", linestyle=":", linewidth=1)
        for label, method, _ in found.lines[bed]:
            means = {n: found.mean(bed, label, n, "mmd2") for n in found.budgets}
            curve = {n: max(m.mean, floor**2) ** 0.5 for n, m in means.items() if m is not None}
            color, marker = style[method]
            look = {"linestyle": "--", "alpha": 0.6} if label != method else {"label": method}
            axis.plot(list(curve), list(curve.values()), color=color, marker=marker, markersize=4, **look)
        axis.set(title=bed, xscale="log", yscale="log", xlabel="NFE", ylabel="MMD")
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(found.beds) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for every cell that failed on some seed."""
    whole: dict[tuple[str, str, str, int], list[Row]] = gather(rows).cells
    lines = []
    for (bed, method, settings, budget), cells in whole.items():
        errors = [row["error"] for row in cells if "error" in row]
        if errors:
            why = errors[0].split(",")[0].split(" (")[0]
            lines.append(f"- {bed}, {method}, `{settings}`, {budget:,} NFE, {len(errors)} of {len(cells)} seeds: {why}")
    return lines


def below(found: Found) -> list[str]:
    """A line for every cell that ended below 95 % of its budget."""
    lines = []
    for (bed, method, settings, budget), rows in found.cells.items():
        nfe = [row["nfe"] for row in rows if "error" not in row]
        if nfe and np.mean(nfe) < 0.95 * budget:
            lines.append(f"- {bed}, {method}, `{settings}`: {np.mean(nfe):,.0f} of {budget:,} NFE")
    return lines


def compose(rows: Sequence[Row], figure: str) -> str:
    """The report."""
    found = gather(rows)
    parts = [
        "# Mixtures with known targets: MMD, modes and log Z at equal NFE",
        "## Who wins\n\n" + RULE + verdict(found),
    ]
    parts.append(f"![MMD against NFE]({figure})\n\nDashed: published settings. Dotted: floor.")
    parts.append("## Beds\n\n" + bed_table(found))
    parts.append("Floor: what exact sampling comes out with, from halves of the reference.")
    for bed in found.beds:
        parts += [f"## {bed}, {n:,} NFE\n\n{metric_table(found, bed, n)}" for n in found.budgets]
    parts.append(EXPLAINED)
    parts += [f"## Costs at {n:,} NFE, mean over beds\n\n{cost_table(found, n)}" for n in found.budgets]
    parts.append("## Tuning\n\n" + choice_table(found))
    parts.append("## Ended below their NFE\n\n" + ("\n".join(below(found)) or "None."))
    parts.append("## Failed\n\n" + ("\n".join(failures(rows)) or "None."))
    where = dict.fromkeys(f"- {row['machine']}; {row['versions']}" for row in rows if "machine" in row)
    parts.append(
        "## Where\n\n" + "\n".join(where) + f"\n\n{sum(row.get('seconds') or 0 for row in rows):,.0f} s in all."
    )
    return "\n\n".join(parts) + "\n"


def write(file: Path, out: Path) -> str:
    """Write the report and its figure; returns the report."""
    rows = read(file)
    draw(gather(rows), out.with_suffix(".png"))
    text = compose(rows, out.with_suffix(".png").name)
    out.write_text(text, "utf-8")
    return text
